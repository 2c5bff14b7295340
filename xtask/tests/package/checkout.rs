//! Copies of this checkout, as a clone would be if everything were committed.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

use nix::fcntl::{Flock, FlockArg};
use tempfile::TempDir;

use crate::compile;

/// A copy in a folder of its own, whose path has spaces. It is a repository with one commit.
///
/// All copies share a target directory, so that dependencies are compiled once; whoever has a
/// copy is alone in there.
pub struct Checkout {
    folder: TempDir,
    target: PathBuf,
    _alone: Flock<File>,
}

impl Checkout {
    pub fn new() -> Self {
        let target = Path::new(env!("CARGO_TARGET_TMPDIR")).join("package with spaces");
        fs::create_dir_all(&target).unwrap();
        let lock = File::create(target.join("lock")).unwrap();
        let alone = Flock::lock(lock, FlockArg::LockExclusive).map_err(|(_, e)| e).unwrap();
        // Whatever was compiled from the last package in there would be taken for fresh, by those sources.
        let _ = fs::remove_dir_all(target.join("package"));
        let folder = tempfile::Builder::new().prefix("a folder with spaces ").tempdir().unwrap();
        let checkout = Self { folder, target, _alone: alone };
        copy_work_tree(&checkout.path());
        checkout.git(&["init", "--quiet"]);
        checkout.git(&["add", "--all"]);
        checkout.git(&["commit", "--quiet", "--no-verify", "--message", "Everything"]);
        checkout
    }

    /// The copy.
    pub fn path(&self) -> PathBuf {
        self.folder.path().join("farcall")
    }

    /// Room beside the copy, outside of its workspace.
    pub fn beside(&self) -> &Path {
        self.folder.path()
    }

    /// The target directory.
    pub fn target(&self) -> &Path {
        &self.target
    }

    /// A cargo to be run in `folder`, without a network and without changing Cargo.lock.
    pub fn cargo(&self, folder: &Path, arguments: &[&str]) -> Command {
        let mut cargo = Command::new(env!("CARGO"));
        compile::forget_outer_build(&mut cargo);
        cargo
            .current_dir(folder)
            .args(arguments)
            .args(["--offline", "--locked"])
            .env("CARGO_TARGET_DIR", &self.target)
            // A third of the time and of the room: what is built counts, not how fast that is.
            .env("CARGO_PROFILE_DEV_DEBUG", "0")
            .env("CARGO_PROFILE_RELEASE_LTO", "off")
            .env("CARGO_PROFILE_RELEASE_OPT_LEVEL", "0")
            .env("CARGO_PROFILE_RELEASE_CODEGEN_UNITS", "16")
            .env("CARGO_INCREMENTAL", "0");
        cargo
    }

    /// What git says about the copy, whose files nothing may have changed.
    pub fn changes(&self) -> String {
        self.git(&["status", "--porcelain"])
    }

    fn git(&self, arguments: &[&str]) -> String {
        git(&self.path(), arguments)
    }
}

/// The checkout that this is.
pub fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap()
}

/// What git and ls-files call the current state: tracked files, and new ones that are not ignored.
fn copy_work_tree(to: &Path) {
    let root = root();
    let files = git(root, &["ls-files", "-z", "--cached", "--others", "--exclude-standard"]);
    for file in files.split_terminator('\0') {
        let (from, to) = (root.join(file), to.join(file));
        // One that was deleted and is still in the index is listed too.
        let Ok(metadata) = from.symlink_metadata() else { continue };
        fs::create_dir_all(to.parent().unwrap()).unwrap();
        if metadata.is_symlink() {
            std::os::unix::fs::symlink(fs::read_link(from).unwrap(), to).unwrap();
        } else {
            fs::copy(from, to).unwrap();
        }
    }
}

fn git(folder: &Path, arguments: &[&str]) -> String {
    let mut git = Command::new("git");
    for (name, _) in std::env::vars_os() {
        // Those of a hook would lead to another repository.
        if name.as_encoded_bytes().starts_with(b"GIT_") {
            git.env_remove(name);
        }
    }
    let output = git
        .args(["-c", "safe.directory=*", "-c", "commit.gpgSign=false"])
        // It would go on in the background.
        .args(["-c", "gc.auto=0", "-c", "maintenance.auto=false"])
        .args(["-c", "user.name=farcall", "-c", "user.email=farcall@localhost"])
        .args(arguments)
        .current_dir(folder)
        .output()
        .expect("git is needed: install the package git");
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "git {arguments:?} in {}: {error}", folder.display());
    String::from_utf8(output.stdout).expect("the paths here are UTF-8")
}

/// Runs a command that has to succeed.
#[track_caller]
pub fn succeed(command: &mut Command) {
    let output = command.output().unwrap();
    let (out, error) =
        (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{command:?}: {}\n{out}{error}", output.status);
}
