//! Tells what a call has done. What it has left in buffers is fetched and written piece by piece.

use std::fs::{File, OpenOptions};
use std::io::{self, IsTerminal, Write};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use farcall::Process;
use farcall::error::errno_name;
use nix::errno::Errno;
use serde_json::json;

use super::made::{Filled, Made};
use crate::cli::progress::{PIECE, Transfer};
use crate::command::Failure;
use crate::command::output::{Stdout, Wanted};

#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Format {
    Text,
    Json,
}

/// The file that gets the content of output buffers.
pub struct Target {
    path: PathBuf,
    file: File,
    /// It is standard output, which gets nothing else then.
    is_stdout: bool,
}

impl Target {
    /// Opens it, so that this fails before the call is made. Its content stays until the call has
    /// succeeded.
    pub fn open(path: PathBuf) -> Result<Self, Failure> {
        let is_stdout = path == Path::new("-");
        let opened = if is_stdout {
            io::stdout().as_fd().try_clone_to_owned().map(File::from)
        } else {
            OpenOptions::new().write(true).create(true).truncate(false).open(&path)
        };
        match opened {
            Ok(file) => Ok(Self { path, file, is_stdout }),
            Err(error) => Err(failed(&path, &error)),
        }
    }

    /// What is said of a buffer whose content is in it.
    fn told(&self, Filled { argument, size, .. }: &Filled, format: Format) -> String {
        let path = self.path.display().to_string();
        let path = if self.is_stdout { "standard output".into() } else { path };
        match format {
            Format::Text => format!("argument {argument}: {size} bytes in {path}\n"),
            Format::Json => {
                json!({ "argument": argument, "bytes": size, "file": path }).to_string()
            }
        }
    }

    /// Makes a regular file empty.
    fn clear(&self) -> io::Result<()> {
        // What is before in the file that is standard output is others'.
        let clears = !self.is_stdout && self.file.metadata()?.is_file();
        if clears { self.file.set_len(0) } else { Ok(()) }
    }
}

fn failed(path: &Path, error: &io::Error) -> Failure {
    Failure::new(format!("{}: {error}", path.display()))
}

/// Prints the call's result, and what is in its buffers, unless that goes to `target`.
pub async fn print(
    process: &Process,
    mut made: Made,
    format: Format,
    mut target: Option<Target>,
    stdout: &mut Stdout,
) -> Result<(), Failure> {
    if made.result.is_err() && (target.is_some() || format == Format::Text) {
        made.buffers.clear();
    } else if let Some(target) = &target {
        target.clear().map_err(|error| failed(&target.path, &error))?;
    }
    let total = made.buffers.iter().map(|buffer| buffer.size).sum();
    let shown = target.is_some() || !io::stdout().is_terminal();
    let transfer = Transfer::new("received", if shown { total } else { 0 })?;
    let fetch = Fetch { process, transfer: &transfer };
    let aside = target.as_ref().is_some_and(|target| target.is_stdout);
    match format {
        Format::Text if aside => eprint!("{}", result(made.result)),
        Format::Text => stdout.write_all(result(made.result).as_bytes())?,
        Format::Json => stdout.write_all(b"{\"buffers\":[")?,
    }
    for (place, buffer) in made.buffers.iter().enumerate() {
        if format == Format::Json && place > 0 {
            stdout.write_all(b",")?;
        }
        match (&mut target, format) {
            (None, Format::Text) => fetch.as_text(buffer, stdout).await?,
            (None, Format::Json) => fetch.as_json(buffer, stdout).await?,
            (Some(target), _) => {
                fetch.to_file(buffer, target).await?;
                let told = target.told(buffer, format);
                if aside {
                    eprint!("{told}");
                } else {
                    stdout.write_all(told.as_bytes())?;
                }
            }
        }
    }
    if format == Format::Json {
        let result = made.result;
        let rest = json!({
            "call": made.call.name(),
            "result": result.map_or_else(|errno| -i64::from(errno as i32), u64::cast_signed),
            "errno": result.err().map(errno_name),
            "error": result.err().map(Errno::desc),
        });
        // The other keys of the same object.
        writeln!(stdout, "],{}", rest.to_string().trim_start_matches('{'))?;
    }
    Ok(())
}

fn result(result: Result<u64, Errno>) -> String {
    match result {
        // Addresses are read better in hexadecimal.
        Ok(value) if value > u64::from(u32::MAX) => format!("{value:#x}\n"),
        Ok(value) => format!("{value}\n"),
        Err(errno) => format!("{} ({})\n", errno_name(errno), errno.desc()),
    }
}

/// Fetches buffers.
struct Fetch<'a> {
    process: &'a Process,
    transfer: &'a Transfer,
}

impl Fetch<'_> {
    /// Hands out what is in a buffer, a piece at a time, until there is no more or nobody wants it.
    async fn pieces(
        &self,
        buffer: &Filled,
        mut take: impl FnMut(&[u8]) -> Result<Wanted, Failure>,
    ) -> Result<(), Failure> {
        let mut at = 0;
        while at < buffer.size {
            let n = (buffer.size - at).min(PIECE);
            let piece = self.process.read_memory(buffer.address + at as u64, n).await?;
            if take(&piece)? == Wanted::NoMore {
                break;
            }
            at += n;
        }
        Ok(())
    }

    async fn to_file(&self, buffer: &Filled, target: &mut Target) -> Result<(), Failure> {
        let Target { path, file, .. } = target;
        let take = |piece: &[u8]| {
            file.write_all(piece).map_err(|error| failed(path, &error))?;
            self.transfer.add(piece.len());
            Ok(Wanted::More)
        };
        self.pieces(buffer, take).await
    }

    /// Escaped, with the zeros at its end counted.
    async fn as_text(&self, buffer: &Filled, stdout: &mut Stdout) -> Result<(), Failure> {
        write!(stdout, "argument {}: \"", buffer.argument)?;
        let mut zeros = 0;
        let take = |piece: &[u8]| {
            let used = piece.iter().rposition(|byte| *byte != 0).map_or(0, |last| last + 1);
            if used > 0 {
                // Something follows those of earlier pieces.
                for _ in 0..std::mem::take(&mut zeros) {
                    stdout.write_all(b"\\x00")?;
                }
                write!(stdout, "{}", piece[..used].escape_ascii())?;
            }
            zeros += piece.len() - used;
            self.transfer.add(piece.len());
            Ok(stdout.wanted())
        };
        self.pieces(buffer, take).await?;
        match zeros {
            0 => writeln!(stdout, "\"")?,
            zeros => writeln!(stdout, "\" and {zeros} zero bytes")?,
        }
        Ok(())
    }

    /// In hexadecimal, and as a string if it is UTF-8: for that it is fetched again.
    async fn as_json(&self, buffer: &Filled, stdout: &mut Stdout) -> Result<(), Failure> {
        write!(stdout, "{{\"argument\":{},\"hex\":\"", buffer.argument)?;
        let mut text = Utf8::default();
        let take = |piece: &[u8]| {
            text.push(piece);
            stdout.write_all(&hex(piece))?;
            self.transfer.add(piece.len());
            Ok(stdout.wanted())
        };
        self.pieces(buffer, take).await?;
        stdout.write_all(b"\",\"text\":")?;
        if !text.is_complete() {
            stdout.write_all(b"null}")?;
            return Ok(());
        }
        stdout.write_all(b"\"")?;
        let mut text = Utf8::default();
        let take = |piece: &[u8]| {
            let quoted = serde_json::to_string(text.push(piece))?;
            stdout.write_all(&quoted.as_bytes()[1..quoted.len() - 1])?;
            Ok(stdout.wanted())
        };
        self.pieces(buffer, take).await?;
        stdout.write_all(b"\"}")?;
        Ok(())
    }
}

fn hex(bytes: &[u8]) -> Vec<u8> {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    let digits = |byte: &u8| [DIGITS[usize::from(byte >> 4)], DIGITS[usize::from(byte & 15)]];
    bytes.iter().flat_map(digits).collect()
}

/// UTF-8 that comes in pieces, which may end inside of a character.
#[derive(Default)]
struct Utf8 {
    text: String,
    /// The beginning of a character.
    rest: Vec<u8>,
    broken: bool,
}

impl Utf8 {
    /// The characters that are whole with this piece.
    fn push(&mut self, piece: &[u8]) -> &str {
        self.text.clear();
        self.rest.extend_from_slice(piece);
        let valid = match std::str::from_utf8(&self.rest) {
            Ok(text) => text.len(),
            Err(error) => {
                self.broken |= error.error_len().is_some();
                error.valid_up_to()
            }
        };
        self.text.push_str(std::str::from_utf8(&self.rest[..valid]).unwrap_or_default());
        self.rest.drain(..valid);
        if self.broken {
            self.rest.clear();
        }
        &self.text
    }

    /// Whether all of it was UTF-8, to its end.
    fn is_complete(&self) -> bool {
        !self.broken && self.rest.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_in_pieces_of_any_size_is_the_same_text() {
        let whole = "a\u{e4}\u{20ac}\u{1f980}\0\"z";
        for size in 1..=whole.len() {
            let mut utf8 = Utf8::default();
            let parts: String =
                whole.as_bytes().chunks(size).map(|piece| utf8.push(piece).to_owned()).collect();
            assert!(utf8.is_complete());
            assert_eq!(parts, whole, "in pieces of {size}");
        }
    }

    #[test]
    fn what_is_no_text_or_ends_inside_of_a_character_is_not_complete() {
        for bytes in [&b"a\xff"[..], b"\x80a", b"a\xe2\x82", b"\xe2\x82a"] {
            for size in 1..=bytes.len() {
                let mut utf8 = Utf8::default();
                for piece in bytes.chunks(size) {
                    utf8.push(piece);
                }
                assert!(!utf8.is_complete(), "{bytes:?} in pieces of {size}");
            }
        }
    }
}
