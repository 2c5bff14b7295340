//! All that a guest has: an initramfs with the release binary, the test programs, and what these need.

use std::collections::BTreeSet;
use std::env;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use super::files::{copy, entries, make, output, write};
use crate::tools;

/// What a guest has besides busybox: tests run these.
const PROGRAMS: [&str; 4] = ["bash", "setpriv", "strace", "unshare"];

/// Test programs that run in guests: each is a step of its name as well.
const TESTS: [&str; 4] = ["suite", "wire", "footprint", "survival"];

/// Builds it in this folder.
pub fn build(folder: &Path, target: &Path) -> Result<PathBuf, String> {
    cargo(&["build", "--release", "--bin", "farcall"])?;
    let tests = TESTS.iter().flat_map(|name| ["--test", *name]);
    let built = cargo(
        &[&["test", "--no-run", "--features", "faults"][..], &tests.collect::<Vec<_>>()].concat(),
    )?;
    eprintln!("xtask: packing the initramfs");
    let guest = folder.join("guest");
    let _ = fs::remove_dir_all(&guest);
    let mut contents = Contents { guest: guest.clone(), libraries: BTreeSet::new() };
    contents.put(&target.join("release/farcall"), "farcall")?;
    for name in TESTS {
        contents.put(&executable(&built, name)?, &format!("tests/{name}"))?;
    }
    // Where tests look for the program that was built with them.
    let debug = target.join("debug/farcall");
    contents.put(&debug, &debug.display().to_string())?;
    // Tests read what these show.
    copy_all(&super::root().join("docs"), &guest)?;
    let readme = super::root().join("README.md");
    copy(&readme, &below(&guest, &readme))?;
    contents.put_program("busybox", "bin")?;
    for program in PROGRAMS {
        contents.put_program(program, "usr/bin")?;
    }
    for library in contents.libraries {
        copy(Path::new(&library), &below(&guest, Path::new(&library)))?;
    }
    for name in ["dev", "etc", "mnt", "sbin"] {
        make(&guest.join(name))?;
    }
    let users = "root:x:0:0::/root:/bin/sh\nuser:x:1000:1000::/home/user:/bin/sh\n\
                 nobody:x:65534:65534::/:/bin/sh\n";
    write(&guest.join("etc/passwd"), users.as_bytes())?;
    write(&guest.join("etc/hostname"), b"guest\n")?;
    write(&guest.join("etc/group"), b"root:x:0:\nuser:x:1000:\nnogroup:x:65534:\n")?;
    write(&guest.join("steps"), include_bytes!("../../guest/steps"))?;
    write(&guest.join("init"), include_bytes!("../../guest/init"))?;
    let all = fs::Permissions::from_mode(0o755);
    fs::set_permissions(guest.join("init"), all).map_err(|error| error.to_string())?;
    let pack = "mknod -m 600 dev/console c 5 1 && \
                find . | cpio -o -H newc --quiet | gzip -1 > ../part.gz && mv ../part.gz ../initramfs";
    output(Command::new("/bin/sh").args(["-ec", pack]).current_dir(&guest))?;
    let _ = fs::remove_dir_all(&guest);
    Ok(folder.join("initramfs"))
}

/// The folder that is to be the initramfs, and the libraries that are still to be put there.
struct Contents {
    guest: PathBuf,
    libraries: BTreeSet<String>,
}

impl Contents {
    fn put(&mut self, from: &Path, to: &str) -> Result<(), String> {
        let to = below(&self.guest, Path::new(to));
        copy(from, &to)?;
        // What can't be stripped is as it is.
        let _ = Command::new("strip").arg(&to).stderr(Stdio::null()).status();
        // A static program needs none, which is an error of ldd's.
        let needed = Command::new("ldd").arg(from).output();
        let needed = needed.map_err(|error| format!("ldd: {error}"))?;
        let needed = String::from_utf8_lossy(&needed.stdout).into_owned();
        let files = needed.split_whitespace().filter(|word| word.starts_with('/'));
        self.libraries.extend(files.map(|file| file.trim_end_matches(':').to_owned()));
        Ok(())
    }

    fn put_program(&mut self, name: &str, folder: &str) -> Result<(), String> {
        let from = tools::locate(name).ok_or_else(|| format!("{name} is not in PATH"))?;
        self.put(&from, &format!("{folder}/{name}"))
    }
}

/// The same place in the guest.
fn below(guest: &Path, path: &Path) -> PathBuf {
    guest.join(path.strip_prefix("/").unwrap_or(path))
}

/// Copies the files of a folder to the same place in the guest.
fn copy_all(folder: &Path, guest: &Path) -> Result<(), String> {
    entries(folder)?
        .iter()
        .filter(|path| path.is_file())
        .try_for_each(|path| copy(path, &below(guest, path)))
}

/// Where cargo says that a test program is.
fn executable(built: &str, name: &str) -> Result<PathBuf, String> {
    let sources = [format!("tests/{name}.rs"), format!("tests/{name}/main.rs")];
    let file = built.lines().find_map(|line| {
        let (source, file) = line.trim().strip_prefix("Executable ")?.split_once(" (")?;
        sources.iter().any(|own| own == source).then(|| file.trim_end_matches(')'))
    });
    let file =
        file.ok_or_else(|| format!("cargo does not say where the test program {name} is"))?;
    Ok(super::root().join(file))
}

/// What cargo says.
fn cargo(arguments: &[&str]) -> Result<String, String> {
    eprintln!("xtask: cargo {}", arguments.join(" "));
    let mut cargo = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    let output = cargo.args(arguments).args(["--package", "farcall"]).current_dir(super::root());
    let output = output.stdin(Stdio::null()).output().map_err(|error| format!("cargo: {error}"))?;
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    if output.status.success() { Ok(text) } else { Err(text) }
}
