//! The programs that tests run, and how to get those that are missing.

use std::env;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::reap;

/// A program, and Debian's package that brings it.
pub type Tool = (&'static str, &'static str);

/// What tests that are in no group need.
pub const TOOLS: &[Tool] = &[
    ("git", "git"),
    ("gzip", "gzip"),
    ("readelf", "binutils"),
    ("strace", "strace"),
    ("tar", "tar"),
    ("unshare", "util-linux"),
];

/// Sees to it that these tools are there, or says what has to be installed.
pub fn provide(tools: &[Tool]) -> Result<(), String> {
    let missing = missing(tools);
    if missing.is_empty() {
        return Ok(());
    }
    let packages: Vec<&str> = missing.iter().map(|(_, package)| *package).collect();
    if !(found("apt-get") && nix::unistd::geteuid().is_root()) {
        return Err(describe(&missing));
    }
    eprintln!("xtask: installing {}", packages.join(", "));
    apt_get(&["update"])?;
    apt_get(&[&["install", "-y", "--no-install-recommends"], &packages[..]].concat())?;
    match self::missing(tools) {
        still if still.is_empty() => Ok(()),
        still => Err(describe(&still)),
    }
}

fn missing(tools: &[Tool]) -> Vec<Tool> {
    tools.iter().copied().filter(|(program, _)| !found(program)).collect()
}

fn found(program: &str) -> bool {
    locate(program).is_some()
}

/// Where a program is.
pub fn locate(program: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    env::split_paths(&path).map(|folder| folder.join(program)).find(|file| is_program(file))
}

fn is_program(file: &Path) -> bool {
    use std::os::unix::fs::PermissionsExt;
    file.metadata().is_ok_and(|file| file.is_file() && file.permissions().mode() & 0o111 != 0)
}

fn describe(missing: &[Tool]) -> String {
    let mut text = String::from("the tests need programs that are missing here:\n");
    for (program, package) in missing {
        text += &format!("  {program} (Debian's package {package})\n");
    }
    let packages: Vec<&str> = missing.iter().map(|(_, package)| *package).collect();
    text + &format!("On Debian: apt-get install --no-install-recommends {}", packages.join(" "))
}

fn apt_get(arguments: &[&str]) -> Result<(), String> {
    let mut apt_get = Command::new("apt-get");
    apt_get.args(arguments).env("DEBIAN_FRONTEND", "noninteractive").stdin(Stdio::null());
    apt_get.stdout(io::stderr());
    match reap::succeeds(&mut apt_get)? {
        true => Ok(()),
        false => Err(format!("apt-get {} failed", arguments.join(" "))),
    }
}
