//! What arguments on the command line mean.

use farcall::calls::table::{self, Row, Shape};

use super::input::Input;
use crate::cli::constants::{constant, constants};
use crate::cli::suggest::suggest;
use crate::command::Failure;

/// The largest buffer.
pub const MAX_BUFFER: usize = 1 << 30;

/// An argument as it was given.
pub enum Argument {
    Number(i64),
    Text(Vec<u8>),
    Input(Input),
    Output(usize),
}

impl Argument {
    /// How many bytes of memory it takes in the process.
    pub fn size(&self) -> usize {
        match self {
            Self::Number(_) => 0,
            // And the zero behind it.
            Self::Text(bytes) => bytes.len() + 1,
            Self::Input(input) => input.size(),
            Self::Output(size) => *size,
        }
    }

    /// How long it is as a buffer, if it is one.
    fn buffer(&self) -> Option<usize> {
        match self {
            Self::Number(_) => None,
            Self::Text(bytes) => Some(bytes.len()),
            other => Some(other.size()),
        }
    }
}

/// What all arguments of a call say, in order. Names are those of its row in the table, and the general ones.
pub fn arguments(row: Option<&Row>, texts: &[String]) -> Result<Vec<Argument>, Failure> {
    let mut values = [0; 6];
    let mut arguments: Vec<Argument> = Vec::with_capacity(texts.len());
    for (place, text) in texts.iter().enumerate() {
        let next = if text == "@len" {
            let before = arguments.iter().rev().find_map(Argument::buffer);
            let size = before
                .ok_or_else(|| Failure::usage("@len: there is no string or buffer before it"))?;
            // At most what this process has opened or been given.
            Argument::Number(size as i64)
        } else {
            let shape = row.and_then(|row| row.shapes(&values).get(place).copied());
            argument(text, shape).map_err(|failure| match row {
                Some(row) => usage(failure, row, place, shape),
                None => failure,
            })?
        };
        if let (Argument::Number(number), Some(value)) = (&next, values.get_mut(place)) {
            *value = number.cast_unsigned();
        }
        arguments.push(next);
    }
    Ok(arguments)
}

/// Tells beside what is wrong with an argument what the call takes.
fn usage(failure: Failure, row: &Row, place: usize, shape: Option<Shape>) -> Failure {
    let names: Vec<&str> = shape.iter().flat_map(Shape::names).map(|(name, _)| name).collect();
    let name = row.args.get(place).map_or("", |argument| argument.name);
    let names = match names[..] {
        [] => String::new(),
        _ => format!("\n  {name}: {}", names.join(" ")),
    };
    // A file that can't be read is another matter.
    match failure.code {
        2 => Failure::usage(format!("{}\n  usage: {}{names}", failure.message, row.usage())),
        _ => failure,
    }
}

fn argument(text: &str, shape: Option<Shape>) -> Result<Argument, Failure> {
    if let Some(path) = text.strip_prefix("@@") {
        return Input::open(path).map(Argument::Input);
    }
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
    if is_too_large(text) {
        return Err(too_large(text));
    }
    let words: Vec<&str> = text.split('|').map(str::trim).collect();
    let value = |word: &str| {
        let own = shape.and_then(|shape| shape.read(word)).map(u64::cast_signed);
        own.or_else(|| constant(word)).or_else(|| integer(word))
    };
    let values: Option<Vec<i64>> = words.iter().map(|word| value(word)).collect();
    if let Some(values) = values {
        return Ok(Argument::Number(values.into_iter().fold(0, |all, value| all | value)));
    }
    let like_a_constant = |word: &&str| {
        word.starts_with(|c: char| c.is_ascii_uppercase())
            && word.chars().all(|c| c.is_ascii_uppercase() || c.is_ascii_digit() || c == '_')
    };
    if let Some(word) = words.iter().find(|word| words.len() > 1 && is_too_large(word)) {
        return Err(too_large(word));
    }
    if words.iter().all(like_a_constant) || text.starts_with(|c: char| c.is_ascii_digit()) {
        let unknown = words.iter().find(|word| value(word).is_none());
        let own = || shape.iter().flat_map(Shape::names).map(|(name, _)| name);
        let all = || own().chain(constants().filter(|known| own().all(|own| own != *known)));
        let like = unknown.map_or(String::new(), |word| suggest(word, all()));
        return Err(Failure::usage(format!(
            "{text} is no number, and no constant that farcall knows; write its value, or for a string \
             '\"{text}\"'{like}"
        )));
    }
    Ok(Argument::Text(text.as_bytes().to_vec()))
}

/// Whether the last character is escaped: then a quote after it would be text.
fn ends_escaped(text: &str) -> bool {
    text.chars().rev().take_while(|c| *c == '\\').count() % 2 == 1
}

/// A number as C writes it, and with 0o and 0b: those above 2^63 - 1 by their bits.
fn integer(text: &str) -> Option<i64> {
    table::integer(text).map(u64::cast_signed)
}

/// Whether it is written as a number, and has more than 64 bits.
fn is_too_large(text: &str) -> bool {
    let Some((radix, digits)) = table::radix_of(text.strip_prefix('-').unwrap_or(text)) else {
        return false;
    };
    integer(text).is_none() && !digits.is_empty() && digits.chars().all(|c| c.is_digit(radix))
}

fn too_large(text: &str) -> Failure {
    Failure::usage(format!("{text} is too large: numbers have 64 bits, from -2^63 up to 2^64 - 1"))
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

#[cfg(test)]
mod tests {
    use super::*;

    /// A number or string, or the size of an output buffer.
    #[derive(Debug, PartialEq, Eq)]
    enum Parsed {
        Number(i64),
        Text(Vec<u8>),
        Output(usize),
    }

    fn parsed(text: &str) -> Option<Parsed> {
        Some(match argument(text, None).ok()? {
            Argument::Number(number) => Parsed::Number(number),
            Argument::Text(bytes) => Parsed::Text(bytes),
            Argument::Output(size) => Parsed::Output(size),
            Argument::Input(_) => return None,
        })
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
            assert_eq!(parsed(text), Some(Parsed::Number(number)), "{text}");
        }
    }

    #[test]
    fn constants_are_joined() {
        let flags = i64::from(nix::libc::O_WRONLY | nix::libc::O_CREAT);
        assert_eq!(parsed("O_WRONLY|O_CREAT"), Some(Parsed::Number(flags)));
        assert_eq!(parsed("AT_FDCWD"), Some(Parsed::Number(-100)));
    }

    #[test]
    fn what_looks_like_a_constant_and_is_none_is_an_error() {
        assert!(parsed("O_RDOLNY").is_none());
        assert!(parsed("O_RDONLY|O_RDOLNY").is_none());
        assert!(parsed("12monkeys").is_none());
    }

    #[test]
    fn strings_need_quotes_only_where_they_are_ambiguous() {
        assert_eq!(parsed("/etc/hosts"), Some(Parsed::Text(b"/etc/hosts".to_vec())));
        assert_eq!(parsed("\"42\""), Some(Parsed::Text(b"42".to_vec())));
        assert_eq!(parsed("\"a\\n\\x00\\\"\""), Some(Parsed::Text(b"a\n\0\"".to_vec())));
        assert_eq!(parsed("\""), None);
        assert_eq!(parsed("\"a\\\""), None);
        assert_eq!(parsed("\"\\q\""), None);
    }

    #[test]
    fn buffers_have_a_size_in_bounds() {
        assert_eq!(parsed("@16"), Some(Parsed::Output(16)));
        assert_eq!(parsed("@-1"), None);
        assert_eq!(parsed("@0x80000000"), None);
        assert_eq!(parsed("@"), None);
    }
}
