//! Servers built by the code that build.rs runs, whole or changed: all of them by one cargo, when the
//! first of them is asked for.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{ErrorKind, Write};
use std::path::Path;
use std::process::Command;
use std::sync::LazyLock;

use nix::fcntl::{Flock, FlockArg};

use super::refused;
use crate::{compile, judge};

/// A server that is not quite the one in the checkout.
pub struct Server {
    name: &'static str,
    change: Change,
}

enum Change {
    /// It has these items as well, among them a function `fault` that it calls when it starts.
    Adds(&'static str),
    /// In each of these files of its sources the first text, which stands there once, is replaced by
    /// the second.
    Replaces(&'static [[&'static str; 3]]),
}

/// What becomes of each server: the linked file, with everything that the image leaves out, or why
/// there is none.
static BUILT: LazyLock<BTreeMap<&'static str, Result<Vec<u8>, String>>> = LazyLock::new(|| {
    let mut servers = refused::FAULTS.to_vec();
    #[cfg(feature = "cli")]
    servers.push(&crate::torture::ENTERS_LATE);
    build(&servers)
});

/// The name of the server in the checkout.
const GOOD: &str = "farcall-server";

/// The linked server of the checkout. Panics if there is none.
pub fn good() -> &'static [u8] {
    linked(GOOD)
}

fn linked(name: &str) -> &'static [u8] {
    match &BUILT[name] {
        Ok(elf) => elf,
        Err(error) => panic!("{name} is not linked: {error}"),
    }
}

impl Server {
    pub const fn that_adds(name: &'static str, items: &'static str) -> Self {
        Self { name, change: Change::Adds(items) }
    }

    pub const fn that_replaces(name: &'static str, texts: &'static [[&'static str; 3]]) -> Self {
        Self { name, change: Change::Replaces(texts) }
    }

    /// The linked server. Panics if there is none.
    pub fn linked(&self) -> &'static [u8] {
        linked(self.name)
    }

    /// Why the linker refuses it. Panics if it does not.
    pub fn link_error(&self) -> &'static str {
        BUILT[self.name].as_ref().expect_err("this server is not linked")
    }

    /// Why it is refused when it is linked. Panics if it is not.
    pub fn refusal(&self) -> String {
        judge::judge(self.linked()).expect_err("this server is refused").join("\n")
    }

    /// Lays out its sources beside those of the checkout's, as one more program of the manifest.
    fn lay_out(&self, server: &Path, manifest: &mut File) {
        let Self { name, change } = self;
        let sources = server.join(name);
        let _ = fs::remove_dir_all(&sources);
        compile::copy(&server.join("src"), &sources).unwrap();
        match change {
            Change::Adds(items) => add(&sources, items),
            Change::Replaces(texts) => {
                for [file, from, to] in *texts {
                    replace(&sources.join(file), from, to);
                }
            }
        }
        let path = format!("{name}/main.rs");
        writeln!(manifest, "\n[[bin]]\nname = {name:?}\npath = {path:?}").unwrap();
    }
}

fn replace(path: &Path, from: &str, to: &str) {
    let whole = fs::read_to_string(path).unwrap();
    assert_eq!(whole.matches(from).count(), 1, "{}: {from}", path.display());
    fs::write(path, whole.replace(from, to)).unwrap();
}

fn add(sources: &Path, items: &str) {
    let main = sources.join("main.rs");
    let whole = fs::read_to_string(&main).unwrap();
    fs::write(&main, format!("{whole}\n{items}\n")).unwrap();

    let start = sources.join("start.rs");
    let whole = fs::read_to_string(&start).unwrap();
    let body = whole.find("fn start(").and_then(|at| Some(at + whole[at..].find('{')? + 1));
    let (head, body) = whole.split_at(body.expect("start.rs has a function `start`"));
    fs::write(&start, format!("{head}\ncrate::fault();{body}")).unwrap();
}

/// Builds servers in one folder with one target directory: what they have in common is compiled once.
fn build(servers: &[&Server]) -> BTreeMap<&'static str, Result<Vec<u8>, String>> {
    let (root, arch) = (Path::new(env!("CARGO_MANIFEST_DIR")), std::env::consts::ARCH);
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("image");
    fs::create_dir_all(&folder).unwrap();
    // Who has the lock is alone in the folder.
    let lock = File::create(folder.join("lock")).unwrap();
    let _alone = Flock::lock(lock, FlockArg::LockExclusive).map_err(|(_, e)| e).unwrap();
    let server = compile::lay_out(root, &folder).unwrap();
    let good = compile::compile(&server, root, arch);
    let manifest = OpenOptions::new().append(true).open(server.join("Cargo.toml"));
    let mut manifest = manifest.unwrap();
    for one in servers {
        one.lay_out(&server, &mut manifest);
        // What an earlier run has left is no success of this one's.
        match fs::remove_file(compile::linked(&server, arch, one.name)) {
            Err(error) if error.kind() != ErrorKind::NotFound => panic!("{}: {error}", one.name),
            _ => {}
        }
    }
    // Those that can't be linked keep no other one from it.
    let error = compile::build(&server, root, arch, &["--keep-going"]).err().unwrap_or_default();
    let linked = servers.iter().map(|Server { name, .. }| {
        let elf = fs::read(compile::linked(&server, arch, name));
        (*name, elf.map_err(|missing| format!("{missing}\n{error}")))
    });
    linked.chain([(GOOD, good)]).collect()
}

/// What readelf prints. Panics if it can't be run.
pub fn readelf(what: &str, file: &Path) -> String {
    let output = Command::new("readelf").arg(what).arg(file).env("LC_ALL", "C").output();
    let output = output.expect("readelf is needed: install the package binutils");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
    text
}
