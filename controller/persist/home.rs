//! Where the sockets of persistent processes live: one directory a user, one socket a process.
//!
//! Beside `NAME.sock` lies `NAME.json`, see [`State`](super::State).

use std::ffi::OsString;
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use nix::libc;
use nix::unistd::geteuid;

use super::directory::Directory;
use super::place::Place;
use super::reserved::Reserved;
use crate::error::{Error, Result};

/// The name of a persistent process: 1 to 64 letters, digits, `-`, `_` or `.`, not beginning with
/// `.` or `-`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Name(String);

impl FromStr for Name {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let allowed = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
        if text.is_empty() || text.len() > 64 {
            return Err("a name has 1 to 64 characters".into());
        }
        if text.starts_with(['.', '-']) || !text.chars().all(allowed) {
            return Err(
                "a name has letters, digits, '-', '_' and '.', and begins with none of '.' and '-'"
                    .into(),
            );
        }
        Ok(Self(text.into()))
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// What helps where a directory does not do.
const CHOOSE: &str = "choose a directory of your own, as with FARCALL_DIR (one that does not exist is \
                      made, with mode 700)";

/// The directory of the sockets: `$FARCALL_DIR`, or `$XDG_RUNTIME_DIR/farcall`, or for root
/// `/run/farcall`.
#[derive(Clone, Debug)]
pub struct Home {
    path: PathBuf,
}

impl Home {
    /// This user's directory, which is not made before something is put there.
    ///
    /// # Errors
    ///
    /// [`Error::Home`] where no variable says where it is and the user is not root.
    pub fn find() -> Result<Self> {
        let variable = |name| std::env::var_os(name).filter(|value: &OsString| !value.is_empty());
        let path = if let Some(path) = variable("FARCALL_DIR") {
            path.into()
        } else if geteuid().is_root() {
            PathBuf::from("/run/farcall")
        } else if let Some(runtime) = variable("XDG_RUNTIME_DIR") {
            PathBuf::from(runtime).join("farcall")
        } else {
            return Err(Error::Home {
                path: "$XDG_RUNTIME_DIR/farcall".into(),
                reason: "there is no place for sockets: set XDG_RUNTIME_DIR or FARCALL_DIR".into(),
            });
        };
        Ok(Self { path })
    }

    /// A directory of the caller's choice.
    #[must_use]
    pub fn at(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into() }
    }

    /// The directory.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Where the process of that name is.
    #[must_use]
    pub fn place(&self, name: &Name) -> Place {
        Place::at(self.path.join(format!("{name}.sock")))
    }

    /// All names that have a socket or a record here, or a process whose socket's file was removed, in order.
    ///
    /// # Errors
    ///
    /// [`Error::Home`] if the directory is there and can't be read.
    pub fn names(&self) -> Result<Vec<Name>> {
        let directory = match Directory::open(&self.path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(self.unlinked(&[])),
            directory => directory.map_err(|error| self.error(&error))?,
        };
        let files = directory.names().map_err(|error| self.error(&error))?;
        let mut names: Vec<Name> = files
            .iter()
            .filter_map(|file| file.to_str())
            .filter_map(|file| file.strip_suffix(".sock").or_else(|| file.strip_suffix(".json")))
            .filter_map(|name| name.parse().ok())
            .collect();
        names.sort();
        names.dedup();
        names.extend(self.unlinked(&names));
        names.sort();
        Ok(names)
    }

    /// Reserves a name for a process that is about to become persistent: makes the directory and
    /// binds the socket, on which nobody listens yet. What a dead process left there is replaced.
    ///
    /// # Errors
    ///
    /// [`Error::Home`] if the name is in use, or the directory is somebody else's or open to
    /// others.
    pub fn reserve(&self, name: &Name) -> Result<Reserved> {
        let directory =
            Directory::open_or_make(&self.path).map_err(|error| self.can_not_make(&error))?;
        if directory.owner() != geteuid() {
            let owner = directory.owner();
            return Err(self.refuse(format!("belongs to uid {owner}, not to you: {CHOOSE}")));
        }
        if directory.mode() & 0o077 != 0 {
            return Err(self.refuse(self.open_to_others(&directory)));
        }
        self.place(name).reserve()
    }

    /// What to do about a directory that others may enter. Nobody is told to close one that others
    /// may need.
    fn open_to_others(&self, directory: &Directory) -> String {
        let mode = directory.mode();
        let ours = |file: &OsString| {
            let name = file.to_str().unwrap_or_default();
            name.ends_with(".sock") || name.ends_with(".json")
        };
        let own_make = mode & libc::S_ISVTX == 0
            && directory.names().is_ok_and(|all| !all.is_empty() && all.iter().all(ours));
        if own_make || self.path.file_name().is_some_and(|name| name == "farcall") {
            format!("has mode {mode:o}, which lets others in: chmod 700 it")
        } else {
            format!("has mode {mode:o}, which lets others in: {CHOOSE}")
        }
    }

    /// That a directory can't be made here, as in a container whose root is read-only.
    fn can_not_make(&self, error: &io::Error) -> Error {
        match error.kind() {
            io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => {
                self.refuse(format!("{error}: {CHOOSE}"))
            }
            _ => self.error(error),
        }
    }

    fn error(&self, error: &io::Error) -> Error {
        self.refuse(error.to_string())
    }

    fn refuse(&self, reason: String) -> Error {
        Error::Home { path: self.path.clone(), reason }
    }
}
