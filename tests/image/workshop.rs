//! Servers built by the code that build.rs runs, whole or with a fault put in.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

use nix::fcntl::{Flock, FlockArg};

use crate::{compile, judge};

/// One folder of sources and one target directory for all servers of these tests: what they have
/// in common is compiled once. Whoever holds the workshop is alone in it.
pub struct Workshop {
    server: PathBuf,
    _alone: Flock<File>,
}

impl Workshop {
    /// Waits for the workshop and lays out the sources as they are in the checkout.
    pub fn open() -> Self {
        let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("image");
        fs::create_dir_all(&folder).unwrap();
        let lock = File::create(folder.join("lock")).unwrap();
        let alone = Flock::lock(lock, FlockArg::LockExclusive).map_err(|(_, e)| e).unwrap();
        let server = compile::lay_out(root(), &folder).unwrap();
        Self { server, _alone: alone }
    }

    /// The linked server, with everything that the image leaves out.
    pub fn compile(&self) -> Result<Vec<u8>, String> {
        compile::compile(&self.server, root(), std::env::consts::ARCH)
    }

    /// Puts `to` in the place of `from`, which stands once in a file of the server's sources.
    pub fn replace(&self, file: &str, from: &str, to: &str) {
        let path = self.server.join("src").join(file);
        let whole = fs::read_to_string(&path).unwrap();
        assert_eq!(whole.matches(from).count(), 1, "{file}: {from}");
        fs::write(&path, whole.replace(from, to)).unwrap();
    }

    /// Adds `items` to the server, among them a function `fault` that it calls when it starts.
    pub fn add(&self, items: &str) {
        let main = self.server.join("src/main.rs");
        let whole = fs::read_to_string(&main).unwrap();
        fs::write(&main, format!("{whole}\n{items}\n")).unwrap();

        let start = self.server.join("src/start.rs");
        let whole = fs::read_to_string(&start).unwrap();
        let body = whole.find("fn start(").and_then(|at| Some(at + whole[at..].find('{')? + 1));
        let (head, body) = whole.split_at(body.expect("src/start.rs has a function `start`"));
        fs::write(&start, format!("{head}\ncrate::fault();{body}")).unwrap();
    }
}

/// Why a server with these items is refused. Panics if it is not.
pub fn refusal(items: &str) -> String {
    let workshop = Workshop::open();
    workshop.add(items);
    match workshop.compile() {
        Err(error) => error,
        Ok(elf) => judge::judge(&elf).expect_err("this server is refused").join("\n"),
    }
}

/// What readelf prints. Panics if it can't be run.
pub fn readelf(what: &str, file: &Path) -> String {
    let output = Command::new("readelf").arg(what).arg(file).env("LC_ALL", "C").output();
    let output = output.expect("readelf is needed: install the package binutils");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
    text
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}
