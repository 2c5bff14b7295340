//! `cargo xtask test`.

use std::env;
use std::path::Path;
use std::process::{Command, Stdio};

use crate::reap;
use crate::residue::Before;
use crate::tools;

/// Tests of every target, then those in the documentation, which `--all-targets` leaves out, and the
/// models, which are a workspace of their own.
const RUNS: [&[&str]; 3] = [
    &["test", "--workspace", "--all-targets", "--no-fail-fast"],
    &["test", "--workspace", "--doc"],
    &["test", "--manifest-path", "models/Cargo.toml", "--target-dir", "target/loom"],
];

/// Runs all tests. The error says what is wrong.
pub fn run() -> Result<(), String> {
    tools::provide()?;
    let before = Before::look()?;
    let mut problems = Vec::new();
    for arguments in RUNS {
        let line = format!("cargo {}", arguments.join(" "));
        println!("xtask: {line}");
        if !reap::succeeds(cargo(arguments).env("TMPDIR", before.temporary()))? {
            problems.push(format!("{line} failed"));
        }
    }
    let residue = before.residue();
    problems.extend(residue.iter().map(|what| format!("left behind: {what}")));
    if !problems.is_empty() {
        return Err(problems.join("\nxtask: "));
    }
    println!("xtask: all tests pass, and they left nothing behind");
    Ok(())
}

fn cargo(arguments: &[&str]) -> Command {
    let mut cargo = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("xtask/ lies in the root");
    cargo.args(arguments).current_dir(root).stdin(Stdio::null());
    cargo
}
