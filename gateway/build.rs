//! Compiles the gateway's proto without a system protoc, and keeps its description for reflection.
use std::error::Error;
use std::path::PathBuf;

use prost::Message;

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo:rerun-if-changed=proto");
    let files = protox::compile(["vasto/v1/kv.proto"], ["proto"])?;
    let out = PathBuf::from(std::env::var_os("OUT_DIR").ok_or("cargo gives OUT_DIR")?);
    std::fs::write(out.join("kv.bin"), files.encode_to_vec())?;
    tonic_prost_build::configure().bytes(".").build_client(false).compile_fds(files)?;
    Ok(())
}
