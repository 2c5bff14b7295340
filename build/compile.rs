//! Compiles the server with a cargo of its own: other flags, another profile, another lock file.
//!
//! Its sources are taken from `embedded/`, which holds links to `abi/` and `server/` under names
//! that `cargo package` takes along (it leaves out folders that have a Cargo.toml), and are laid
//! out in a folder of the build's.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs};

/// Variables that belong to the outer build and would change, or stop, the inner one.
const OUTER: [&str; 6] = [
    "CARGO_PROFILE_",
    "CARGO_TARGET_",
    "CARGO_BUILD_",
    "CARGO_ENCODED_RUSTFLAGS",
    "RUSTC_WRAPPER",
    "RUSTC_WORKSPACE_WRAPPER",
];

/// Copies the sources from `root/embedded` to `to`, with the names that cargo expects. Returns the
/// server's folder.
pub fn lay_out(root: &Path, to: &Path) -> Result<PathBuf, String> {
    let from = root.join("embedded");
    for (file, name) in [
        ("abi.toml", "abi/Cargo.toml"),
        ("server.toml", "server/Cargo.toml"),
        ("server.lock", "server/Cargo.lock"),
    ] {
        copy(&from.join(file), &to.join(name))?;
    }
    for part in ["abi", "server"] {
        let sources = to.join(part).join("src");
        // A file that was deleted in the checkout must not live on here.
        if sources.exists() {
            fs::remove_dir_all(&sources).map_err(|e| format!("{}: {e}", sources.display()))?;
        }
        copy(&from.join(part), &sources)?;
    }
    Ok(to.join("server"))
}

pub fn copy(from: &Path, to: &Path) -> Result<(), String> {
    let failed = |error| format!("copying {} to {}: {error}", from.display(), to.display());
    if from.is_dir() {
        for entry in fs::read_dir(from).map_err(failed)? {
            let entry = entry.map_err(failed)?;
            copy(&entry.path(), &to.join(entry.file_name()))?;
        }
        return Ok(());
    }
    if let Some(parent) = to.parent() {
        fs::create_dir_all(parent).map_err(failed)?;
    }
    // Contents alone: a packaged source may be read-only, and its copy must be replaceable.
    fs::write(to, fs::read(from).map_err(failed)?).map_err(failed)
}

/// Compiles the server in `sources` for `arch` and returns the linked ELF file, unjudged.
pub fn compile(sources: &Path, root: &Path, arch: &str) -> Result<Vec<u8>, String> {
    // Where the outer build has chosen other versions of what both use, only those are at hand: the
    // server's own lock file can't be followed, and what its manifest allows is.
    if let Err(locked) = build(sources, root, arch, &["--locked"]) {
        let _ = fs::remove_file(sources.join("Cargo.lock"));
        build(sources, root, arch, &[]).map_err(|error| {
            format!("building the server failed:\n{locked}\nand without its lock file:\n{error}")
        })?;
    }
    let elf = linked(sources, arch, "farcall-server");
    fs::read(&elf).map_err(|error| format!("{}: {error}", elf.display()))
}

/// Where [`build`] leaves the program of that name.
pub fn linked(sources: &Path, arch: &str, name: &str) -> PathBuf {
    sources.join("target").join(target(arch)).join("release").join(name)
}

fn target(arch: &str) -> String {
    format!("{arch}-unknown-linux-gnu")
}

/// Has cargo build the programs of the manifest in `sources`, with these arguments besides.
pub fn build(sources: &Path, root: &Path, arch: &str, arguments: &[&str]) -> Result<(), String> {
    let script = root.join("linker").join(format!("{arch}.ld"));
    if !script.is_file() {
        return Err(format!("farcall has no server for {arch}: {} is missing", script.display()));
    }
    let script = script.to_str().ok_or("the path of the linker script is not UTF-8")?;
    let flags = [
        "-Crelocation-model=pie",
        "-Crelro-level=off",
        // For size: without a red zone a small constant is loaded in 3 bytes (push, pop) instead of
        // up to 10, and five operations are told apart in less than a jump table takes.
        "-Cno-redzone=yes",
        "-Cllvm-args=-min-jump-table-entries=20",
        "-Clink-arg=-nostartfiles",
        "-Clink-arg=-nostdlib",
        "-Clink-arg=-static-pie",
        // Two arguments: the path may contain spaces.
        "-Clink-arg=-T",
        &format!("-Clink-arg={script}"),
        "-Clink-arg=-Wl,-z,max-page-size=4096,--build-id=none,--gc-sections",
    ];
    let mut cargo = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    forget_outer_build(&mut cargo);
    let output = cargo
        .args(["build", "--release", "--offline", "--target", &target(arch)])
        .args(arguments)
        .arg("--manifest-path")
        .arg(sources.join("Cargo.toml"))
        .arg("--target-dir")
        .arg(sources.join("target"))
        .env("CARGO_ENCODED_RUSTFLAGS", flags.join("\x1f"))
        // Cargo reads configuration from the working directory upwards.
        .current_dir(sources)
        .output()
        .map_err(|error| format!("starting cargo for the server: {error}"))?;
    match output.status.success() {
        true => Ok(()),
        false => Err(String::from_utf8_lossy(&output.stderr).into_owned()),
    }
}

/// Keeps the variables of the build that is going on from a cargo that is to know nothing of it.
pub fn forget_outer_build(cargo: &mut Command) {
    for (name, _) in env::vars_os() {
        if name.to_str().is_some_and(|name| OUTER.iter().any(|outer| name.starts_with(outer))) {
            cargo.env_remove(&name);
        }
    }
}
