//! Builds the server image freestanding, refuses what must not be in it, and hands it to the
//! library as `$OUT_DIR/server.image`.

#[path = "build/compile.rs"]
mod compile;
#[path = "build/judge.rs"]
mod judge;

use std::path::PathBuf;
use std::process::ExitCode;
use std::{env, fs};

fn main() -> ExitCode {
    for input in ["build.rs", "build", "embedded", "linker"] {
        println!("cargo::rerun-if-changed={input}");
    }
    match image() {
        Ok(()) => ExitCode::SUCCESS,
        Err(problems) => {
            for line in problems.lines() {
                println!("cargo::error={line}");
            }
            ExitCode::FAILURE
        }
    }
}

fn image() -> Result<(), String> {
    let variable = |name| env::var(name).map_err(|_| format!("cargo did not set {name}"));
    let root = PathBuf::from(variable("CARGO_MANIFEST_DIR")?);
    let out = PathBuf::from(variable("OUT_DIR")?);
    if variable("CARGO_CFG_TARGET_OS")? != "linux" {
        return Err("farcall runs Linux system calls: build it for a Linux target".into());
    }
    let sources = compile::lay_out(&root, &out.join("image"))?;
    let elf = compile::compile(&sources, &root, &variable("CARGO_CFG_TARGET_ARCH")?)?;
    let image = judge::judge(&elf).map_err(|offenders| {
        format!("the server image can't be used:\n{}", offenders.join("\n"))
    })?;
    fs::write(out.join("server.image"), image)
        .map_err(|error| format!("writing the image to {}: {error}", out.display()))
}
