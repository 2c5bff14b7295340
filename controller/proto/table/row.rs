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
    /// So many arguments at the end are left out where they are zero: the call often has none.
    pub optional: usize,
    /// Whether it may wait for something else than the processor and locks of the kernel's.
    pub blocks: Blocks,
    /// Its result is how many bytes of its buffer it has filled.
    pub counted: bool,
    /// Which descriptors it closes or replaces.
    pub closes: Closes,
    /// A signal may interrupt it on behalf of whoever waits for it. Not so where what the call does to
    /// descriptors, signals or processes would meet what it takes to interrupt it.
    pub interruptible: bool,
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
    /// Nothing: a call that returns zero, or a register that is not looked at.
    Zero,
    /// An `int`: in decimal, with its sign.
    Int,
    /// A `long`, or an offset in a file: in decimal, with its sign.
    Long,
    /// A size or a count, in decimal.
    Size,
    /// An address in the process, in hexadecimal; zero is NULL.
    Address,
    /// Bits without names, in hexadecimal.
    Bits,
    /// The mode of a file: its type by name, its permissions in octal.
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
    /// The number of a device: its major and minor number.
    Device,
    /// One of these numbers.
    One(&'static Names),
    /// Any of these bits, joined by `|`.
    Flags(&'static Names),
    /// One of these numbers, which says what the arguments behind it are.
    Command(&'static Commands),
    /// The address of a string that ends with a zero.
    Text,
    /// The address of bytes that the call reads.
    Bytes,
    /// The address of a structure of this name, or an array of those, that the call reads, or reads and
    /// writes.
    Struct(&'static str),
    /// The address of memory that the call fills.
    Filled(&'static Memory),
}

/// Numbers that have names.
#[derive(Debug)]
pub struct Names {
    /// The numbers with their names. Where several names fit, the first one is shown.
    pub names: &'static [(&'static str, u64)],
    /// Of flags: the bits that are one number and no flags, such as O_ACCMODE; zero for the others.
    pub field: u64,
}

/// The commands of a call such as fcntl(2).
#[derive(Debug)]
pub struct Commands {
    /// The commands. Where several names have one number, the first one is shown.
    pub commands: &'static [Command],
    /// Flags that are joined to a command, such as FUTEX_PRIVATE_FLAG.
    pub flags: Names,
}

/// A command, with the arguments that it has behind it.
#[derive(Debug)]
pub struct Command {
    /// Its name.
    pub name: &'static str,
    /// Its number.
    pub number: u64,
    /// The arguments behind the command; `None`: those of the row.
    pub args: Option<&'static [Shape]>,
    /// What the call returns; `None`: as the row says.
    pub result: Option<Shape>,
    /// It never waits, though the call may.
    pub quick: bool,
}

/// Memory that a call fills.
#[derive(Debug)]
pub struct Memory {
    /// What it gets.
    pub item: Item,
    /// How many of them.
    pub count: Count,
}

/// What is in memory that a call fills.
#[derive(Clone, Copy, Debug)]
pub enum Item {
    /// Any bytes.
    Byte,
    /// A string, with a zero at its end where there is room for it.
    Text,
    /// A number of 32 bits, and its shape.
    Word(Shape),
    /// A number of 64 bits, and its shape.
    Long(Shape),
    /// A structure.
    Struct(&'static Layout),
}

/// How many items there are in memory that a call fills.
#[derive(Clone, Copy, Debug)]
pub enum Count {
    /// Always so many.
    Fixed(usize),
    /// At most as many as the argument of this name says.
    Argument(&'static str),
}

/// Where the members of a structure are.
#[derive(Debug)]
pub struct Layout {
    /// Its name, behind `struct`.
    pub name: &'static str,
    /// How many bytes it has.
    pub size: usize,
    /// Its members.
    pub members: &'static [Member],
}

/// A member of a structure.
#[derive(Debug)]
pub struct Member {
    /// Its name.
    pub name: &'static str,
    /// Where it begins.
    pub offset: usize,
    /// How many bytes it has.
    pub size: usize,
    /// How it is shown: as a string, or as a number of this shape.
    pub shape: Shape,
}

/// Whether a call may wait for something else than the processor and locks of the kernel's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Blocks {
    /// Never.
    No,
    /// It may.
    Yes,
    /// Unless this argument has this bit: the argument's place and the bit.
    Unless(usize, u64),
    /// Only if this argument has this bit, or if it is not known.
    If(usize, u64),
    /// Unless the command in this place is one that never waits.
    ByCommand(usize),
}

/// Which descriptors a call closes or replaces. The kernel looks at the low half of these arguments.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Closes {
    /// None.
    Nothing,
    /// That of its first argument.
    First,
    /// That of its second argument, unless it is that of the first.
    Second,
    /// All from the first to the second argument, unless the third one has CLOSE_RANGE_CLOEXEC, by which
    /// they are only marked.
    Range,
}

impl Row {
    /// A call of which nothing else is known.
    #[must_use]
    pub const fn new(number: Sysno, args: &'static [Argument], result: Shape) -> Self {
        assert!(args.len() <= 6);
        Self {
            number,
            args,
            result,
            optional: 0,
            blocks: Blocks::No,
            counted: false,
            closes: Closes::Nothing,
            interruptible: true,
        }
    }

    /// So many arguments at the end are left out where they are zero.
    #[must_use]
    pub const fn optional(mut self, count: usize) -> Self {
        assert!(count <= self.args.len());
        self.optional = count;
        self
    }

    /// It may wait.
    #[must_use]
    pub const fn may_block(mut self) -> Self {
        self.blocks = Blocks::Yes;
        self
    }

    /// It may wait, unless this argument has this bit.
    #[must_use]
    pub const fn may_block_unless(mut self, argument: &str, bit: i32) -> Self {
        self.blocks = Blocks::Unless(self.place(argument), bit as u32 as u64);
        self
    }

    /// It waits if this argument has this bit.
    #[must_use]
    pub const fn may_block_if(mut self, argument: &str, bit: i32) -> Self {
        self.blocks = Blocks::If(self.place(argument), bit as u32 as u64);
        self
    }

    /// It may wait, unless this argument is a command that does not.
    #[must_use]
    pub const fn may_block_by_command(mut self, argument: &str) -> Self {
        self.blocks = Blocks::ByCommand(self.place(argument));
        self
    }

    /// Its result is how many bytes of its buffer it has filled.
    #[must_use]
    pub const fn counted(mut self) -> Self {
        self.counted = true;
        self
    }

    /// It closes or replaces descriptors.
    #[must_use]
    pub const fn closes(mut self, closes: Closes) -> Self {
        self.closes = closes;
        self
    }

    /// It is not interrupted on behalf of whoever waits for it.
    #[must_use]
    pub const fn not_interrupted(mut self) -> Self {
        self.interruptible = false;
        self
    }

    /// The place of the argument of this name.
    const fn place(&self, name: &str) -> usize {
        let mut place = 0;
        while !same_text(self.args[place].name, name) {
            place += 1;
        }
        place
    }
}

/// Whether two texts are one: `==` is not for constants.
const fn same_text(one: &str, other: &str) -> bool {
    let (one, other) = (one.as_bytes(), other.as_bytes());
    let mut same = one.len() == other.len();
    let mut at = 0;
    while same && at < one.len() {
        same = one[at] == other[at];
        at += 1;
    }
    same
}
