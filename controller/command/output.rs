//! What commands print: JSON on request, and nothing else on standard output then.

use std::io::{self, BufWriter, ErrorKind, StdoutLock, Write};

use farcall::Process;
use nix::libc;
use serde::Serialize;

use super::Failure;

/// Writes text to standard output.
pub fn print(text: &str) -> Result<(), Failure> {
    let mut stdout = Stdout::new();
    stdout.write_all(text.as_bytes())?;
    stdout.finish()
}

/// Text of several lines for a terminal, which paths and what others have written must not control.
pub fn harmless(text: &str) -> String {
    text.split('\n').map(plain).collect::<Vec<_>>().join("\n")
}

/// Text for one line of a terminal: control characters are escaped.
pub fn plain(text: &str) -> String {
    text.chars().fold(String::new(), |mut plain, char| {
        if char.is_control() {
            plain.extend(char.escape_default());
        } else {
            plain.push(char);
        }
        plain
    })
}

/// Tells what went wrong beside what was done in a process.
pub fn warn(process: &Process) {
    for warning in process.take_warnings() {
        eprintln!("farcall: warning: {}", harmless(&warning.to_string()));
    }
}

/// Writes one JSON value and a newline.
pub fn print_json(value: &impl Serialize) -> Result<(), Failure> {
    print(&format!("{}\n", serde_json::to_string(value)?))
}

/// Lines of a table, its header the first, with columns to the left or to the right. On a terminal that
/// is too narrow for it each line becomes a list.
pub fn columns<const N: usize>(lines: &[[String; N]], left: [bool; N]) -> String {
    let table = table(lines, left);
    let widest = table.lines().map(|line| line.chars().count()).max().unwrap_or(0);
    match terminal_width() {
        Some(width) if width < widest => lists(lines),
        _ => table,
    }
}

/// A line for each cell, behind the header's word for it.
fn lists<const N: usize>(lines: &[[String; N]]) -> String {
    let [header, rows @ ..] = lines else { return String::new() };
    let width = header.iter().map(|word| word.chars().count()).max().unwrap_or(0);
    let list = |row: &[String; N]| -> String {
        header.iter().zip(row).map(|(word, cell)| format!("{word:<width$}  {cell}\n")).collect()
    };
    rows.iter().map(list).collect::<Vec<_>>().join("\n")
}

/// The columns of the terminal that is standard output, if it is one and says so.
pub fn terminal_width() -> Option<usize> {
    let mut size = libc::winsize { ws_row: 0, ws_col: 0, ws_xpixel: 0, ws_ypixel: 0 };
    // SAFETY: the request fills such a structure, or nothing where there is no terminal.
    let told = unsafe { libc::ioctl(libc::STDOUT_FILENO, libc::TIOCGWINSZ, &raw mut size) };
    Some(usize::from(size.ws_col)).filter(|width| told == 0 && *width > 0)
}

fn table<const N: usize>(lines: &[[String; N]], left: [bool; N]) -> String {
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
