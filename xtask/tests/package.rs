//! What people get: a checkout builds in any folder and any environment, and so does what
//! `cargo package` makes of it, alone.

// The code that build.rs runs.
#[allow(dead_code, reason = "only a part of it is used here")]
#[path = "../../build/compile.rs"]
mod compile;

#[path = "package/checkout.rs"]
mod checkout;

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use checkout::{Checkout, succeed};

fn target() -> String {
    format!("{}-unknown-linux-gnu", std::env::consts::ARCH)
}

/// Fault points and mutants are in builds with the feature for them alone. The variable's name is in no
/// other place than the code that reads it.
fn has_no_faults(program: &Path) {
    let bytes = fs::read(program).unwrap();
    let name = b"FARCALL_MUTANT";
    let found = bytes.windows(name.len()).any(|window| window == name);
    assert!(!found, "{} looks for mutants", program.display());
}

#[test]
fn a_checkout_builds_and_stays_as_it_was() {
    let checkout = Checkout::new();
    succeed(&mut checkout.cargo(&checkout.path(), &["build"]));
    has_no_faults(&checkout.target().join("debug/farcall"));
    succeed(&mut checkout.cargo(&checkout.path(), &["build", "--release", "--target", &target()]));
    has_no_faults(&checkout.target().join(target()).join("release/farcall"));
    assert_eq!(checkout.changes(), "");
}

#[test]
fn a_package_is_complete_and_builds_alone() {
    let checkout = Checkout::new();
    // Cargo builds it to see that it is complete, but it does that inside of this workspace.
    succeed(&mut checkout.cargo(&checkout.path(), &["package"]));
    let name = format!("farcall-{}", version());
    let archive = checkout.target().join("package").join(format!("{name}.crate"));
    let unpack = ["--extract", "--gzip", "--touch", "--file"];
    succeed(Command::new("tar").args(unpack).arg(archive).current_dir(checkout.beside()));

    let alone = checkout.beside().join(&name);
    for source in ["abi.toml", "server.toml", "server.lock", "abi/lib.rs", "server/main.rs"] {
        assert!(alone.join("embedded").join(source).is_file(), "{source} is missing");
    }
    assert!(!has_links(&alone), "a link leads out of the package");
    for source in ["abi", "server", "xtask"] {
        assert!(!alone.join(source).exists(), "{source} is not meant to be in it");
    }
    fs::remove_dir_all(checkout.path()).unwrap();
    succeed(&mut checkout.cargo(&alone, &["build"]));
}

/// As in a program whose other dependencies ask for versions that are not in the server's lock file.
#[test]
fn the_server_builds_with_other_versions_of_what_it_uses() {
    let folder = tempfile::tempdir().unwrap();
    let root = checkout::root();
    let sources = compile::lay_out(root, &folder.path().join("image")).unwrap();
    let vendored = folder.path().join("vendored");
    let vendor = ["vendor", "--quiet", "--offline", "--locked", "--versioned-dirs"];
    succeed(Command::new(env!("CARGO")).args(vendor).arg(&vendored).current_dir(&sources));
    for (name, minor) in [("heapless", "0.9"), ("syscalls", "0.8")] {
        // Nothing but a later version of it is at hand.
        let has_name = |path: &PathBuf| {
            path.file_name().unwrap().to_str().unwrap().starts_with(&format!("{name}-{minor}."))
        };
        let folders = fs::read_dir(&vendored).unwrap().map(|entry| entry.unwrap().path());
        let [folder] = &folders.filter(has_name).collect::<Vec<_>>()[..] else {
            panic!("not one folder of {name}")
        };
        let manifest = fs::read_to_string(folder.join("Cargo.toml")).unwrap();
        let is_version = |line: &&str| line.starts_with("version = ");
        let before = manifest.lines().find(is_version).unwrap();
        let after = format!("version = \"{minor}.99\"");
        fs::write(folder.join("Cargo.toml"), manifest.replacen(before, &after, 1)).unwrap();
        fs::write(folder.join(".cargo-checksum.json"), "{\"files\":{}}").unwrap();
        fs::rename(folder, vendored.join(format!("{name}-{minor}.99"))).unwrap();
    }
    // Cargo reads configuration from the working directory upwards.
    let configuration = format!(
        "[source.crates-io]\nreplace-with = \"vendored\"\n\n[source.vendored]\ndirectory = {vendored:?}\n"
    );
    fs::create_dir(folder.path().join(".cargo")).unwrap();
    fs::write(folder.path().join(".cargo/config.toml"), configuration).unwrap();
    let elf = compile::compile(&sources, root, std::env::consts::ARCH).unwrap();
    assert!(elf.starts_with(b"\x7fELF"));
    let lock = fs::read_to_string(sources.join("Cargo.lock")).unwrap();
    assert!(lock.contains("0.9.99") && lock.contains("0.8.99"), "{lock}");
}

#[test]
fn the_environment_of_a_build_does_not_reach_the_server() {
    let checkout = Checkout::new();
    let wrapper = checkout.beside().join("wrapper");
    fs::write(&wrapper, "#!/bin/sh\nexec \"$@\"\n").unwrap();
    fs::set_permissions(&wrapper, fs::Permissions::from_mode(0o755)).unwrap();
    // The least that has a server built: whatever else is in the package, that is the same.
    succeed(
        checkout
            .cargo(&checkout.path(), &["check", "--lib", "--no-default-features"])
            .env("RUSTFLAGS", "-Ctarget-cpu=native -Cforce-frame-pointers=yes")
            .env("CARGO_BUILD_TARGET", target())
            .env("CARGO_BUILD_RUSTFLAGS", "--cfg=of_the_outer_build")
            .env("CARGO_PROFILE_RELEASE_LTO", "fat")
            .env("CARGO_PROFILE_RELEASE_OPT_LEVEL", "3")
            .env("CARGO_PROFILE_RELEASE_PANIC", "unwind")
            .env("RUSTC_WRAPPER", &wrapper)
            // What `cargo clippy` sets.
            .env("RUSTC_WORKSPACE_WRAPPER", &wrapper),
    );
}

/// The version of the package, which stands first in its manifest.
fn version() -> String {
    let manifest = fs::read_to_string(checkout::root().join("Cargo.toml")).unwrap();
    let version = manifest.lines().find_map(|line| line.strip_prefix("version = \""));
    version.unwrap().trim_end_matches('"').into()
}

fn has_links(folder: &Path) -> bool {
    fs::read_dir(folder).unwrap().map(Result::unwrap).any(|entry| {
        let kind = entry.file_type().unwrap();
        kind.is_symlink() || kind.is_dir() && has_links(&entry.path())
    })
}
