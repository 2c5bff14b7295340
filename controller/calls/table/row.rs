//! A row of the table, and the shapes of its arguments.

use syscalls::Sysno;

/// A system call.
#[derive(Debug)]
pub struct Row {
    /// Its number, and by that its name.
    pub number: Sysno,
    /// Its arguments, in the order of the kernel's registers.
    pub args: &'static [Argument],
    /// What it returns where it succeeds.
    pub result: Shape,
    /// It may wait for something else than the processor and locks of the kernel's.
    pub may_block: bool,
}

/// An argument of a system call.
#[derive(Debug)]
pub struct Argument {
    /// Its name in the man page.
    pub name: &'static str,
    /// How its value is shown and read.
    pub shape: Shape,
}

/// How a value is shown, and read back: both are the notation of strace(1).
#[derive(Clone, Copy, Debug)]
pub enum Shape {
    /// An `int` or a `long`: in decimal, with its sign.
    Int,
    /// A size or a count, in decimal.
    Size,
    /// An address in the process, in hexadecimal; zero is NULL.
    Address,
    /// Bits without names, in hexadecimal.
    Bits,
    /// The permissions of a file, in octal.
    Mode,
    /// A descriptor.
    Fd,
    /// A descriptor of a directory, or AT_FDCWD.
    DirFd,
    /// The pid of a process, or of a thread.
    Pid,
    /// The id of a user or group; -1 leaves it as it is.
    Id,
    /// A signal, by its name.
    Signal,
    /// One of these numbers.
    One(&'static Names),
    /// Any of these bits, joined by `|`.
    Flags(&'static Names),
}

/// Numbers that have names.
#[derive(Debug)]
pub struct Names {
    /// The numbers with their names. Where several names fit, the first one is shown.
    pub names: &'static [(&'static str, u64)],
    /// Of flags: the bits that are one number and no flags, such as O_ACCMODE; zero for the others.
    pub field: u64,
}
