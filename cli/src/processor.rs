//! Refuses a processor that lacks what RocksDB is compiled for (`.cargo/config.toml`). RocksDB's globals, made before `main`,
//! would end the process without a word, so this comes before them.

#[used]
// The linker's list of what runs before all else; safe, since it uses nothing that is set up later.
#[allow(unsafe_code)]
#[unsafe(link_section = ".preinit_array")]
static CHECK: extern "C" fn() = check;

extern "C" fn check() {
    if !std::arch::is_x86_feature_detected!("sse4.2") {
        eprintln!(
            "error: this processor lacks SSE 4.2, which vasto needs on x86-64 (x86-64-v2). A virtual machine may be told to \
             hide it: choose another processor type for it, such as the host's own"
        );
        std::process::exit(1);
    }
}
