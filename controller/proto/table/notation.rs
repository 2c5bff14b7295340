//! Values as strace(1) writes them, and back.

use std::borrow::Cow;

use nix::libc;

use super::{Blocks, Command, Commands, Names, Row, Shape};

/// The types of files, the bits of a mode that are no permissions.
const FILE_TYPES: Names = Names {
    names: &[
        ("S_IFREG", libc::S_IFREG as u64),
        ("S_IFDIR", libc::S_IFDIR as u64),
        ("S_IFCHR", libc::S_IFCHR as u64),
        ("S_IFBLK", libc::S_IFBLK as u64),
        ("S_IFIFO", libc::S_IFIFO as u64),
        ("S_IFSOCK", libc::S_IFSOCK as u64),
        ("S_IFLNK", libc::S_IFLNK as u64),
    ],
    field: libc::S_IFMT as u64,
};

/// Signals; those of real time have numbers.
pub(super) const SIGNALS: Names = Names {
    names: &[
        ("SIGHUP", libc::SIGHUP as u64),
        ("SIGINT", libc::SIGINT as u64),
        ("SIGQUIT", libc::SIGQUIT as u64),
        ("SIGILL", libc::SIGILL as u64),
        ("SIGTRAP", libc::SIGTRAP as u64),
        ("SIGABRT", libc::SIGABRT as u64),
        ("SIGBUS", libc::SIGBUS as u64),
        ("SIGFPE", libc::SIGFPE as u64),
        ("SIGKILL", libc::SIGKILL as u64),
        ("SIGUSR1", libc::SIGUSR1 as u64),
        ("SIGSEGV", libc::SIGSEGV as u64),
        ("SIGUSR2", libc::SIGUSR2 as u64),
        ("SIGPIPE", libc::SIGPIPE as u64),
        ("SIGALRM", libc::SIGALRM as u64),
        ("SIGTERM", libc::SIGTERM as u64),
        ("SIGSTKFLT", libc::SIGSTKFLT as u64),
        ("SIGCHLD", libc::SIGCHLD as u64),
        ("SIGCONT", libc::SIGCONT as u64),
        ("SIGSTOP", libc::SIGSTOP as u64),
        ("SIGTSTP", libc::SIGTSTP as u64),
        ("SIGTTIN", libc::SIGTTIN as u64),
        ("SIGTTOU", libc::SIGTTOU as u64),
        ("SIGURG", libc::SIGURG as u64),
        ("SIGXCPU", libc::SIGXCPU as u64),
        ("SIGXFSZ", libc::SIGXFSZ as u64),
        ("SIGVTALRM", libc::SIGVTALRM as u64),
        ("SIGPROF", libc::SIGPROF as u64),
        ("SIGWINCH", libc::SIGWINCH as u64),
        ("SIGIO", libc::SIGIO as u64),
        ("SIGPWR", libc::SIGPWR as u64),
        ("SIGSYS", libc::SIGSYS as u64),
    ],
    field: 0,
};

/// The int in the low half of a register, if the other half says nothing else: it is zero, or the sign.
fn int(value: u64) -> Option<i32> {
    let low = value as i32;
    let is_int = value >> 32 == 0 || value == i64::from(low).cast_unsigned();
    is_int.then_some(low)
}

/// What the kernel looks at where it looks at an int: both ways to write a negative one are the same.
fn canonical(value: u64) -> u64 {
    int(value).map_or(value, |low| u64::from(low.cast_unsigned()))
}

impl Shape {
    /// Whether values are ints: then the kernel does not look at the high half of the register.
    #[must_use]
    pub const fn is_int(&self) -> bool {
        matches!(
            self,
            Self::Int
                | Self::Fd
                | Self::DirFd
                | Self::Pid
                | Self::Id
                | Self::Signal
                | Self::One(_)
                | Self::Command(_)
        )
    }

    /// A value as text.
    #[must_use]
    pub fn show(&self, value: u64) -> String {
        match self {
            Self::Int | Self::Fd | Self::Pid | Self::Id => signed_int(value),
            Self::Zero | Self::Long => value.cast_signed().to_string(),
            Self::Size => value.to_string(),
            Self::Bits => format!("{value:#x}"),
            Self::Address | Self::Text | Self::Bytes | Self::Struct(_) | Self::Filled(_) => {
                if value == 0 { "NULL".into() } else { format!("{value:#x}") }
            }
            Self::Mode => mode(value),
            Self::DirFd if int(value) == Some(libc::AT_FDCWD) => "AT_FDCWD".into(),
            Self::DirFd => signed_int(value),
            Self::Signal => one(&SIGNALS, value),
            Self::Device => {
                let (major, minor) = (libc::major(value), libc::minor(value));
                match libc::makedev(major, minor) == value {
                    true => format!("makedev({major:#x}, {minor:#x})"),
                    false => format!("{value:#x}"),
                }
            }
            Self::One(names) => one(names, value),
            Self::Flags(names) => flags(names, value),
            Self::Command(commands) => commands.show(value),
        }
    }

    /// The value that a text means: names, numbers as C writes them, any of those joined by `|`, NULL,
    /// makedev(MAJOR, MINOR). `None`: it is none of these.
    #[must_use]
    pub fn read(&self, text: &str) -> Option<u64> {
        let text = text.trim();
        if let Some(device) = matches!(self, Self::Device).then(|| makedev(text)).flatten() {
            return Some(device);
        }
        let part = |word: &str| self.value_of(word).or_else(|| integer(word));
        text.split('|').map(|word| part(word.trim())).try_fold(0, |all, part| Some(all | part?))
    }

    /// The names that a value may have, each with its number.
    pub fn names(&self) -> impl Iterator<Item = (&'static str, u64)> {
        let (names, commands): (&[_], Option<&'static Commands>) = match self {
            Self::One(names) | Self::Flags(names) => (names.names, None),
            Self::Signal => (SIGNALS.names, None),
            Self::Mode => (FILE_TYPES.names, None),
            Self::DirFd => (&[("AT_FDCWD", libc::AT_FDCWD as u32 as u64)], None),
            Self::Command(commands) => (commands.flags.names, Some(commands)),
            _ => (&[], None),
        };
        let commands = commands.map_or(&[][..], |commands| commands.commands);
        let commands = commands.iter().map(|command| (command.name, command.number));
        commands.chain(names.iter().copied())
    }

    /// The number of a name that this shape has.
    fn value_of(&self, name: &str) -> Option<u64> {
        let is_pointer = matches!(
            self,
            Self::Address | Self::Text | Self::Bytes | Self::Struct(_) | Self::Filled(_)
        );
        if is_pointer && name == "NULL" {
            return Some(0);
        }
        let found = self.names().find(|(known, _)| *known == name);
        // As an int in a register has its sign in the other half too.
        let value = |value: u64| match self.is_int() && int(value).is_some() {
            true => i64::from(value as i32).cast_unsigned(),
            false => value,
        };
        found.map(|(_, number)| value(number))
    }
}

impl Commands {
    /// The command that a value is.
    #[must_use]
    pub fn find(&self, value: u64) -> Option<&'static Command> {
        let value = canonical(value) & !self.flags();
        self.commands.iter().find(|command| command.number == value)
    }

    /// The bits that are joined to a command.
    fn flags(&self) -> u64 {
        self.flags.names.iter().fold(0, |all, (_, bit)| all | bit)
    }

    fn show(&self, value: u64) -> String {
        match (self.find(value), canonical(value) & self.flags()) {
            (None, _) if value < 4096 => value.to_string(),
            (None, _) => format!("{value:#x}"),
            (Some(command), 0) => command.name.into(),
            (Some(command), rest) => format!("{}|{}", command.name, flags(&self.flags, rest)),
        }
    }
}

/// An int in decimal. What is none is shown as the bits that it is.
fn signed_int(value: u64) -> String {
    int(value).map_or_else(|| format!("{value:#x}"), |value| value.to_string())
}

/// The permissions of a file with leading zero, behind its type if it has one.
fn mode(value: u64) -> String {
    let kind = value & FILE_TYPES.field;
    let known = FILE_TYPES.names.iter().find(|(_, number)| *number == kind);
    match known {
        Some((name, _)) if value & !kind != 0 => format!("{name}|{:#o}", C(value & !kind)),
        Some((name, _)) => (*name).into(),
        None => format!("{:#o}", C(value)),
    }
}

/// A number in octal as C writes it, with a zero in front.
struct C(u64);

impl std::fmt::Octal for C {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}{:o}", if self.0 == 0 { "" } else { "0" }, self.0)
    }
}

/// A number by its name, or in decimal.
fn one(names: &Names, value: u64) -> String {
    let name = names.names.iter().find(|(_, number)| *number == canonical(value));
    match name {
        Some((name, _)) => (*name).into(),
        None if value < 4096 => value.to_string(),
        None => format!("{value:#x}"),
    }
}

/// Bits by their names, and what has none in hexadecimal.
fn flags(names: &Names, value: u64) -> String {
    let mut shown: Vec<Cow<str>> = Vec::new();
    let field = value & names.field;
    let mut rest = value & !names.field;
    let in_field = |number: u64| number & !names.field == 0;
    if names.field != 0 {
        let name = names.names.iter().find(|(_, number)| in_field(*number) && *number == field);
        match name {
            Some((name, _)) => shown.push((*name).into()),
            None if field != 0 => rest |= field,
            None => {}
        }
    }
    for (name, bits) in names.names {
        if !in_field(*bits) && rest & bits == *bits {
            shown.push((*name).into());
            rest &= !bits;
        }
    }
    if rest != 0 {
        shown.push(format!("{rest:#x}").into());
    }
    if shown.is_empty() {
        // No bit, which some flags have a name for.
        let none = names.names.iter().find(|(_, bits)| *bits == 0);
        shown.push(none.map_or("0", |(name, _)| name).into());
    }
    shown.join("|")
}

fn makedev(text: &str) -> Option<u64> {
    let (major, minor) = text.strip_prefix("makedev(")?.strip_suffix(')')?.split_once(',')?;
    let number = |text: &str| u32::try_from(integer(text.trim())?).ok();
    Some(libc::makedev(number(major)?, number(minor)?))
}

/// A number as C writes it, and with 0o and 0b: from -2^63 up to 2^64 - 1.
#[must_use]
pub fn integer(text: &str) -> Option<u64> {
    let (negative, digits) = match text.strip_prefix('-') {
        Some(digits) => (true, digits),
        None => (false, text),
    };
    let (radix, digits) = radix_of(digits)?;
    let number = u64::from_str_radix(digits, radix).ok()?;
    let signed = || 0i64.checked_sub_unsigned(number).map(i64::cast_unsigned);
    if negative { signed() } else { Some(number) }
}

/// The radix that a number is written in, and its digits. `None`: it has a sign where none belongs.
#[must_use]
pub fn radix_of(text: &str) -> Option<(u32, &str)> {
    let (radix, digits) = match text.as_bytes() {
        [b'0', b'x' | b'X', ..] => (16, &text[2..]),
        [b'0', b'o', ..] => (8, &text[2..]),
        [b'0', b'b', ..] => (2, &text[2..]),
        [b'0', _, ..] => (8, &text[1..]),
        _ => (10, text),
    };
    if digits.starts_with(['+', '-']) { None } else { Some((radix, digits)) }
}

impl Row {
    /// The shapes of the arguments, as many as there are: those that depend on a command are the
    /// command's.
    #[must_use]
    pub fn shapes(&self, args: &[u64; 6]) -> Vec<Shape> {
        let mut shapes: Vec<Shape> = self.args.iter().map(|argument| argument.shape).collect();
        if let Some((place, command)) = self.command(args)
            && let Some(args) = command.args
        {
            shapes.truncate(place + 1);
            shapes.extend(args);
        }
        shapes
    }

    /// The command that a call with these arguments is, and its place among them.
    #[must_use]
    pub fn command(&self, args: &[u64; 6]) -> Option<(usize, &'static Command)> {
        self.args.iter().zip(args).enumerate().find_map(|(place, (argument, value))| {
            let Shape::Command(commands) = argument.shape else { return None };
            Some((place, commands.find(*value)?))
        })
    }

    /// The call with these arguments, such as `openat(AT_FDCWD, 0x7f00000000, O_RDONLY)`. What is in
    /// registers that the call does not have is not shown.
    #[must_use]
    pub fn show(&self, args: &[u64; 6]) -> String {
        let shapes = self.shapes(args);
        let is_given = |place: usize| args.get(place).is_some_and(|value| *value != 0);
        // A command has as many arguments as it says.
        let by_command = self.command(args).is_some_and(|(_, command)| command.args.is_some());
        let optional = if by_command { 0 } else { self.optional };
        let least = shapes.len() - optional;
        let count =
            (least..shapes.len()).rev().find(|place| is_given(*place)).map_or(least, |n| n + 1);
        let shown: Vec<String> =
            shapes.iter().zip(args).take(count).map(|(shape, value)| shape.show(*value)).collect();
        format!("{}({})", self.number.name(), shown.join(", "))
    }

    /// What a call with these arguments has returned.
    #[must_use]
    pub fn show_result(&self, args: &[u64; 6], result: u64) -> String {
        let by_command = self.command(args).and_then(|(_, command)| command.result);
        by_command.unwrap_or(self.result).show(result)
    }

    /// The call with the names of its arguments: `openat(dirfd, pathname, flags[, mode])`.
    #[must_use]
    pub fn usage(&self) -> String {
        let needed = self.args.len() - self.optional;
        let mut text = format!("{}(", self.number.name());
        for (place, argument) in self.args.iter().enumerate() {
            text += if place == needed { "[" } else { "" };
            text += if place > 0 { ", " } else { "" };
            text += argument.name;
        }
        text += if self.optional > 0 { "]" } else { "" };
        text + ")"
    }

    /// Whether a call may wait, as far as its arguments are known: an argument that is another call's
    /// result is not.
    #[must_use]
    pub fn may_wait(&self, known: impl Fn(usize) -> Option<u64>) -> bool {
        let has = |place, bit: u64| known(place).map(|value| value & bit != 0);
        match self.blocks {
            Blocks::No => false,
            Blocks::Yes => true,
            Blocks::Unless(place, bit) => has(place, bit) != Some(true),
            Blocks::If(place, bit) => has(place, bit) != Some(false),
            Blocks::ByCommand(place) => {
                let Shape::Command(commands) = self.args[place].shape else { return true };
                let command = known(place).and_then(|value| commands.find(value));
                !command.is_some_and(|command| command.quick)
            }
        }
    }
}
