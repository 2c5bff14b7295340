//! `farcall call`: one system call in a persistent process.

use std::fmt::Write as _;
use std::process::ExitCode;

use clap::Args;
use farcall::call::{Call, errno_name};
use farcall::persist::{Home, Name, attach};
use farcall::sys::Sysno;
use farcall::{Error, Process};
use serde_json::{Value, json};

use crate::constants::constant;
use crate::output::{print, print_json};
use crate::{Done, Failure};

/// Makes one system call in a persistent process and prints its result.
///
/// Arguments are numbers (42, -1, 0x1f, 0o644 or 0644, 0b101), names of constants (O_RDONLY,
/// AT_FDCWD) joined by '|', strings, or output buffers:
///
///   "text"   a string, in double quotes of its own ('"text"' in a shell), with \n, \t, \0, \", \\
///            and \xNN; the quotes can be left out where it is not a number, and not all capitals
///   @N       the address of a buffer of N bytes, printed after the call
///
/// Examples:
///
///   farcall call web getpid
///   farcall call web openat AT_FDCWD /etc/hostname 'O_RDONLY|O_CLOEXEC'
///   farcall call web read 4 @100 100
///
/// Exits with 1 if the call failed.
#[derive(Args)]
#[command(verbatim_doc_comment)]
pub struct CallCommand {
    /// The process
    name: Name,
    /// The call's name in its man page, or its number
    syscall: String,
    /// Up to six arguments; those left out are 0
    #[arg(allow_hyphen_values = true, num_args = 0..=6)]
    arguments: Vec<String>,
    /// Print {"call", "result", "errno", "error", "buffers"} instead of text (before the name)
    #[arg(long)]
    json: bool,
}

/// The calls whose result is how many bytes of their buffer they have filled.
const COUNTED: [Sysno; 13] = [
    Sysno::read,
    Sysno::pread64,
    Sysno::recvfrom,
    Sysno::readlink,
    Sysno::readlinkat,
    Sysno::getcwd,
    Sysno::getdents64,
    Sysno::getrandom,
    Sysno::getxattr,
    Sysno::listxattr,
    Sysno::fgetxattr,
    Sysno::flistxattr,
    Sysno::syslog,
];

/// The largest output buffer.
const MAX_BUFFER: usize = 1 << 30;

/// An argument as it was given.
#[derive(Debug, PartialEq, Eq)]
enum Argument {
    Number(i64),
    Text(Vec<u8>),
    Output(usize),
}

/// What a call has left in an output buffer.
struct Filled {
    /// Counted from 1.
    argument: usize,
    bytes: Vec<u8>,
}

impl CallCommand {
    pub async fn run(mut self) -> Done {
        // What may begin with a hyphen takes options as well: this one is told apart here.
        let before = self.arguments.len();
        self.arguments.retain(|argument| argument != "--json");
        self.json |= self.arguments.len() != before;
        let syscall = number(&self.syscall)?;
        let arguments: Vec<Argument> =
            self.arguments.iter().map(|text| argument(text)).collect::<Result<_, _>>()?;
        let process = attach(Home::find()?.place(&self.name)).await?;
        spare_the_server(&process, syscall, &arguments)?;
        let made = make(&process, syscall, &arguments).await;
        let (result, buffers) = match made {
            Ok(made) => made,
            Err(Error::Lost(_)) => {
                let name = syscall.name();
                return Err(Failure::new(format!(
                    "{name} did not return: the process ended, or its connection did"
                )));
            }
            Err(error) => return Err(error.into()),
        };
        process.prepare_for_reconnect().await?;
        let failed = result.is_err();
        if self.json {
            print_json(&report(syscall, result, &buffers))?;
        } else {
            print(&text(result, &buffers))?;
        }
        Ok(if failed { ExitCode::from(1) } else { ExitCode::SUCCESS })
    }
}

/// Refuses to close what the server runs on.
fn spare_the_server(
    process: &Process,
    syscall: Sysno,
    arguments: &[Argument],
) -> Result<(), Failure> {
    let closed = match syscall {
        Sysno::close => arguments.first(),
        Sysno::dup2 | Sysno::dup3 => arguments.get(1),
        _ => None,
    };
    match closed {
        Some(Argument::Number(fd))
            if process.server_descriptors().iter().any(|own| i64::from(*own) == *fd) =>
        {
            Err(Failure::new(format!(
                "descriptor {fd} is one that the server itself runs on: closing it would end the \
                 connection, or make the process unreachable"
            )))
        }
        _ => Ok(()),
    }
}

type Result6 = Result<u64, nix::errno::Errno>;

/// Makes the call: strings and buffers lie in memory that is mapped for it and unmapped after it.
async fn make(
    process: &Process,
    syscall: Sysno,
    arguments: &[Argument],
) -> farcall::Result<(Result6, Vec<Filled>)> {
    use nix::sys::mman::{MapFlags, ProtFlags};
    let size = |argument: &Argument| match argument {
        Argument::Number(_) => 0,
        Argument::Text(bytes) => bytes.len() + 1,
        Argument::Output(size) => *size,
    };
    let total: usize = arguments.iter().map(|a| size(a).next_multiple_of(64)).sum();
    let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
    let memory = match total {
        0 => None,
        total => Some(process.mmap(total, protection, MapFlags::MAP_PRIVATE, None).await?),
    };
    let mut next = memory.as_ref().map_or(0, farcall::Mapping::address);
    let (mut before, mut after, mut outputs) = (Vec::new(), Vec::new(), Vec::new());
    let mut args = [0; 6];
    for (index, (slot, argument)) in args.iter_mut().zip(arguments).enumerate() {
        *slot = next;
        match argument {
            Argument::Number(number) => *slot = number.cast_unsigned(),
            Argument::Text(bytes) => before.push(Call::copy_in(next, bytes.clone())),
            Argument::Output(size) => {
                after.push(Call::copy_out(next, *size));
                outputs.push(index + 1);
            }
        }
        next += size(argument).next_multiple_of(64) as u64;
    }
    let at = before.len();
    let mut calls = before;
    calls.push(Call::syscall(syscall, args));
    calls.extend(after);
    let counted = COUNTED.contains(&syscall);
    process
        .connection()
        .submit(calls, move |replies| {
            let _memory = memory;
            let result = replies[at].value();
            let filled = replies.into_iter().skip(at + 1).zip(outputs);
            let buffers = filled.map(|(reply, argument)| {
                let mut bytes = reply.data;
                if let (true, Ok(count)) = (counted, result) {
                    bytes.truncate(count as usize);
                }
                Filled { argument, bytes }
            });
            Ok((result, buffers.collect()))
        })
        .await
}

fn number(text: &str) -> Result<Sysno, Failure> {
    let known = match text.parse::<usize>() {
        Ok(number) => Sysno::new(number),
        Err(_) => text.parse().ok(),
    };
    known.ok_or_else(|| Failure::usage(format!("{text} is no system call of this architecture")))
}

fn argument(text: &str) -> Result<Argument, Failure> {
    if let Some(size) = text.strip_prefix('@') {
        let size = integer(size).and_then(|size| usize::try_from(size).ok());
        return match size.filter(|size| *size <= MAX_BUFFER) {
            Some(size) => Ok(Argument::Output(size)),
            None => Err(Failure::usage(format!("{text}: @N is a buffer of N bytes, up to 2^30"))),
        };
    }
    if let Some(quoted) = text.strip_prefix('"') {
        let inner = quoted.strip_suffix('"').filter(|inner| !ends_escaped(inner));
        let bytes = inner.and_then(unescape);
        return bytes.map(Argument::Text).ok_or_else(|| {
            Failure::usage(format!("{text}: a string that does not end, or an unknown escape"))
        });
    }
    if let Some(number) = integer(text) {
        return Ok(Argument::Number(number));
    }
    let words: Vec<&str> = text.split('|').map(str::trim).collect();
    let values: Option<Vec<i64>> =
        words.iter().map(|word| constant(word).or_else(|| integer(word))).collect();
    if let Some(values) = values {
        return Ok(Argument::Number(values.into_iter().fold(0, |all, value| all | value)));
    }
    let like_a_constant = |word: &&str| {
        word.starts_with(|c: char| c.is_ascii_uppercase())
            && word.chars().all(|c| c.is_ascii_uppercase() || c.is_ascii_digit() || c == '_')
    };
    if words.iter().all(like_a_constant) || text.starts_with(|c: char| c.is_ascii_digit()) {
        return Err(Failure::usage(format!(
            "{text} is no number, and no constant that farcall knows: write its value, or for a \
             string '\"{text}\"'"
        )));
    }
    Ok(Argument::Text(text.as_bytes().to_vec()))
}

/// Whether the last character is escaped: then a quote after it would be text.
fn ends_escaped(text: &str) -> bool {
    text.chars().rev().take_while(|c| *c == '\\').count() % 2 == 1
}

/// A number as C writes it, and with 0o and 0b.
fn integer(text: &str) -> Option<i64> {
    let (negative, digits) = match text.strip_prefix('-') {
        Some(digits) => (true, digits),
        None => (false, text),
    };
    let (radix, digits) = match digits.as_bytes() {
        [b'0', b'x' | b'X', ..] => (16, &digits[2..]),
        [b'0', b'o', ..] => (8, &digits[2..]),
        [b'0', b'b', ..] => (2, &digits[2..]),
        [b'0', _, ..] => (8, &digits[1..]),
        _ => (10, digits),
    };
    if digits.starts_with(['+', '-']) {
        return None;
    }
    let number = u64::from_str_radix(digits, radix).ok()?;
    if negative { 0i64.checked_sub_unsigned(number) } else { Some(number.cast_signed()) }
}

fn unescape(text: &str) -> Option<Vec<u8>> {
    let mut bytes = Vec::new();
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        if byte != b'\\' {
            bytes.push(byte);
            continue;
        }
        bytes.push(match rest.next()? {
            b'n' => b'\n',
            b't' => b'\t',
            b'r' => b'\r',
            b'0' => 0,
            b'x' => {
                let digits = [rest.next()?, rest.next()?];
                u8::from_str_radix(std::str::from_utf8(&digits).ok()?, 16).ok()?
            }
            quoted @ (b'"' | b'\\') => quoted,
            _ => return None,
        });
    }
    Some(bytes)
}

fn report(syscall: Sysno, result: Result6, buffers: &[Filled]) -> Value {
    let buffers: Vec<Value> = buffers
        .iter()
        .map(|Filled { argument, bytes }| {
            let hex = bytes.iter().fold(String::new(), |mut hex, byte| {
                let _ = write!(hex, "{byte:02x}");
                hex
            });
            json!({ "argument": argument, "hex": hex, "text": std::str::from_utf8(bytes).ok() })
        })
        .collect();
    json!({
        "call": syscall.name(),
        "result": result.map_or_else(|errno| -i64::from(errno as i32), u64::cast_signed),
        "errno": result.err().map(errno_name),
        "error": result.err().map(nix::errno::Errno::desc),
        "buffers": buffers,
    })
}

fn text(result: Result6, buffers: &[Filled]) -> String {
    let mut text = match result {
        // Addresses are read better in hexadecimal.
        Ok(value) if value > u64::from(u32::MAX) => format!("{value:#x}\n"),
        Ok(value) => format!("{value}\n"),
        Err(errno) => format!("{} ({})\n", errno_name(errno), errno.desc()),
    };
    if result.is_err() {
        return text;
    }
    for Filled { argument, bytes } in buffers {
        let used = bytes.len() - bytes.iter().rev().take_while(|byte| **byte == 0).count();
        let zeros = bytes.len() - used;
        let _ = write!(text, "argument {argument}: \"{}\"", bytes[..used].escape_ascii());
        text.push_str(&match zeros {
            0 => "\n".into(),
            zeros => format!(" and {zeros} zero bytes\n"),
        });
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(text: &str) -> Option<Argument> {
        argument(text).ok()
    }

    #[test]
    fn numbers_are_read_as_in_c() {
        for (text, number) in [
            ("0", 0),
            ("42", 42),
            ("-1", -1),
            ("0x1F", 31),
            ("0644", 0o644),
            ("0o644", 0o644),
            ("0b101", 5),
            ("18446744073709551615", -1),
            ("-9223372036854775808", i64::MIN),
        ] {
            assert_eq!(parsed(text), Some(Argument::Number(number)), "{text}");
        }
    }

    #[test]
    fn constants_are_joined() {
        let flags = i64::from(nix::libc::O_WRONLY | nix::libc::O_CREAT);
        assert_eq!(parsed("O_WRONLY|O_CREAT"), Some(Argument::Number(flags)));
        assert_eq!(parsed("AT_FDCWD"), Some(Argument::Number(-100)));
    }

    #[test]
    fn what_looks_like_a_constant_and_is_none_is_an_error() {
        assert!(parsed("O_RDOLNY").is_none());
        assert!(parsed("O_RDONLY|O_RDOLNY").is_none());
        assert!(parsed("12monkeys").is_none());
    }

    #[test]
    fn strings_need_quotes_only_where_they_are_ambiguous() {
        assert_eq!(parsed("/etc/hosts"), Some(Argument::Text(b"/etc/hosts".to_vec())));
        assert_eq!(parsed("\"42\""), Some(Argument::Text(b"42".to_vec())));
        assert_eq!(parsed("\"a\\n\\x00\\\"\""), Some(Argument::Text(b"a\n\0\"".to_vec())));
        assert_eq!(parsed("\""), None);
        assert_eq!(parsed("\"a\\\""), None);
        assert_eq!(parsed("\"\\q\""), None);
    }

    #[test]
    fn buffers_have_a_size_in_bounds() {
        assert_eq!(parsed("@16"), Some(Argument::Output(16)));
        assert_eq!(parsed("@-1"), None);
        assert_eq!(parsed("@0x80000000"), None);
        assert_eq!(parsed("@"), None);
    }
}
