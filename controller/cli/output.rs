//! What commands print: JSON on request, and nothing else on standard output then.

use std::io::{self, BufWriter, ErrorKind, StdoutLock, Write};

use farcall::Process;
use serde::Serialize;

use crate::Failure;

/// Writes text to standard output.
pub fn print(text: &str) -> Result<(), Failure> {
    let mut stdout = Stdout::new();
    stdout.write_all(text.as_bytes())?;
    stdout.finish()
}

/// Tells what went wrong beside what was done in a process.
pub fn warn(process: &Process) {
    for warning in process.take_warnings() {
        eprintln!("farcall: warning: {warning}");
    }
}

/// Writes one JSON value and a newline.
pub fn print_json(value: &impl Serialize) -> Result<(), Failure> {
    print(&format!("{}\n", serde_json::to_string(value)?))
}

/// Lines of a table, its header the first, with columns to the left or to the right.
pub fn columns<const N: usize>(lines: &[[String; N]], left: [bool; N]) -> String {
    let width = |column: usize| lines.iter().map(|line| line[column].chars().count()).max();
    let widths: [usize; N] = std::array::from_fn(|column| width(column).unwrap_or(0));
    lines.iter().fold(String::new(), |mut text, line| {
        for ((cell, width), left) in line.iter().zip(&widths).zip(left) {
            if left {
                text.push_str(&format!("{cell:<width$}  "));
            } else {
                text.push_str(&format!("{cell:>width$}  "));
            }
        }
        text.truncate(text.trim_end().len());
        text.push('\n');
        text
    })
}

/// Bytes that are kept until there are so many of them, or the end.
const KEPT: usize = 1 << 20;

/// Standard output. A reader that has gone away is no error: there is nothing to be written then.
pub struct Stdout {
    to: BufWriter<StdoutLock<'static>>,
    wanted: Wanted,
}

/// Whether somebody reads on.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Wanted {
    More,
    NoMore,
}

impl Stdout {
    pub fn new() -> Self {
        Self { to: BufWriter::with_capacity(KEPT, io::stdout().lock()), wanted: Wanted::More }
    }

    pub fn wanted(&self) -> Wanted {
        self.wanted
    }

    /// Writes what is kept.
    pub fn finish(mut self) -> Result<(), Failure> {
        Ok(self.flush()?)
    }

    fn unless_gone<T>(&mut self, result: io::Result<T>, otherwise: T) -> io::Result<T> {
        match result {
            Err(error) if error.kind() == ErrorKind::BrokenPipe => {
                self.wanted = Wanted::NoMore;
                Ok(otherwise)
            }
            result => result,
        }
    }
}

impl Write for Stdout {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.wanted == Wanted::NoMore {
            return Ok(bytes.len());
        }
        let result = self.to.write(bytes);
        self.unless_gone(result, bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        if self.wanted == Wanted::NoMore {
            return Ok(());
        }
        let result = self.to.flush().and_then(|()| self.to.get_mut().flush());
        self.unless_gone(result, ())
    }
}
