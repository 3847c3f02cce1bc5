//! Compiles the wire's protos without a system protoc.
use std::error::Error;

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo:rerun-if-changed=proto");
    let files =
        protox::compile(["vasto/v1/topology.proto", "vasto/v1/operator.proto", "vasto/v1/store.proto"], ["proto"])?;
    // What few answers have would make every answer as large as itself.
    tonic_prost_build::configure()
        .bytes(".")
        .boxed("vasto.v1.Answer.result.failure")
        .boxed("vasto.v1.Written.value")
        .compile_fds(files)?;
    Ok(())
}
