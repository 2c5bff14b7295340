//! What commands have in common: how they end, what they print, what they learn about processes.

pub mod output;
pub mod process;

use std::io;
use std::path::Path;
use std::process::ExitCode;

/// Why a command failed, and with which exit code.
pub struct Failure {
    pub message: String,
    pub code: u8,
}

/// How a command ends.
pub type Done = Result<ExitCode, Failure>;

impl Failure {
    pub fn new(message: impl Into<String>) -> Self {
        Self { message: message.into(), code: 1 }
    }

    /// A temporary file or directory can't be made.
    pub fn temporary(path: &Path, error: &io::Error) -> Self {
        Self::new(format!("{}: {error}\n  TMPDIR names another place", path.display()))
    }

    /// The command line is wrong.
    pub fn usage(message: impl Into<String>) -> Self {
        Self { message: message.into(), code: 2 }
    }
}

impl<E: std::error::Error> From<E> for Failure {
    fn from(error: E) -> Self {
        Self::new(error.to_string())
    }
}
