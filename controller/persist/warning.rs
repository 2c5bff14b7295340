//! What went wrong beside something that was done all the same.

use std::path::PathBuf;
use std::sync::PoisonError;

use crate::error::{Error, Result};
use crate::process::Process;

/// Warnings that are kept for who asks.
const MAX_WARNINGS: usize = 16;

/// What went wrong beside something that was done all the same: see [`Process::take_warnings`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Warning {
    /// Who holds the process, or that nobody does, could not be written into its NAME.json. Others
    /// who attach while it is blocked in a call, and `farcall ls`, are told what was true before.
    #[error(
        "{}: {reason}: who holds the process could not be written down; nothing else is affected",
        path.display()
    )]
    NotRecorded {
        /// The file.
        path: PathBuf,
        /// Why not.
        reason: String,
    },
    /// The file of the socket is gone, and the process was reached by the descriptor that it has of it.
    /// [`Process::restore_socket`] makes the file anew.
    #[error(
        "{}: was removed; the process lives, and was found through /proc: `farcall restore {}` makes its socket anew",
        path.display(),
        path.file_stem().unwrap_or_default().display()
    )]
    SocketRemoved {
        /// Where it was.
        path: PathBuf,
    },
}

impl Process {
    /// What went wrong since it was asked last beside an attach, a reconnect or a detach that was done
    /// all the same. The same warning is told once.
    #[must_use]
    pub fn take_warnings(&self) -> Vec<Warning> {
        std::mem::take(&mut *self.warnings())
    }

    /// NAME.json is advice: whoever holds the process does so also where it can't be written.
    pub(super) fn recorded(&self, written: Result<()>) {
        let warning = match written {
            Ok(()) => return,
            Err(Error::Home { path, reason }) => Warning::NotRecorded { path, reason },
            Err(error) => {
                let path = self.place().map(|place| place.socket().to_owned()).unwrap_or_default();
                Warning::NotRecorded { path, reason: error.to_string() }
            }
        };
        self.warn(warning);
    }

    pub(super) fn warn(&self, warning: Warning) {
        let mut warnings = self.warnings();
        if warnings.len() < MAX_WARNINGS && !warnings.contains(&warning) {
            warnings.push(warning);
        }
    }

    fn warnings(&self) -> std::sync::MutexGuard<'_, Vec<Warning>> {
        self.inner().warnings.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
