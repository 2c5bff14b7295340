//! Which calls are made: random ones that mean something in the state that the ones before left.
//!
//! None of them blocks, leaves the directory, or depends on the process that makes it.

use farcall::calls::Sysno;
use nix::libc;

use super::Slot;
use super::sides::MEMORY;
use crate::common::Random;

/// An argument, of which each side makes its own.
#[derive(Clone, Copy, Debug)]
pub enum Arg {
    Value(u64),
    /// The descriptor in that slot.
    Slot(usize),
    /// The address of that byte of the memory.
    Memory(usize),
}

/// What a descriptor is of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Directory,
    /// What openat made of a name, unless it is a directory.
    Opened,
    Pipe,
    Event,
    Timer,
}

/// What is compared of the memory where it does not have to be the same.
#[derive(Debug)]
pub enum Out {
    /// A `struct stat`: mode, links, owner, and of files the size.
    Stat(usize),
    /// Directory entries: names and types, in any order.
    Entries(usize),
    /// Two descriptors.
    Descriptors(usize),
}

/// One call.
#[derive(Debug)]
pub struct Plan {
    pub name: &'static str,
    pub number: u32,
    pub args: [Arg; 6],
    /// What lies in memory before.
    pub input: Vec<(usize, Vec<u8>)>,
    /// Memory is as it says; `None`: the same on both sides.
    pub out: Option<Out>,
    /// The result, if none is an errno, is a descriptor of that kind.
    pub makes: Option<Kind>,
    /// That slot's descriptor is closed on success.
    pub closes: Option<usize>,
}

impl Out {
    /// What can be compared.
    pub fn seen(&self, memory: &[u8], result: i64) -> Vec<Vec<u8>> {
        if result < 0 {
            return vec![memory.to_vec()];
        }
        match self {
            Self::Stat(at) => {
                let stat = &memory[*at..at + size_of::<libc::stat>()];
                let word = |offset: usize| &stat[offset..offset + 4];
                let mode = u32::from_le_bytes(
                    word(std::mem::offset_of!(libc::stat, st_mode)).try_into().unwrap(),
                );
                let size = std::mem::offset_of!(libc::stat, st_size);
                let mut seen = vec![
                    mode.to_le_bytes().to_vec(),
                    word(std::mem::offset_of!(libc::stat, st_nlink)).to_vec(),
                    word(std::mem::offset_of!(libc::stat, st_uid)).to_vec(),
                    word(std::mem::offset_of!(libc::stat, st_gid)).to_vec(),
                ];
                if [libc::S_IFREG, libc::S_IFLNK].contains(&(mode & libc::S_IFMT)) {
                    seen.push(stat[size..size + 8].to_vec());
                }
                seen
            }
            Self::Entries(at) => {
                let mut entries = Vec::new();
                let mut rest = &memory[*at..at + result as usize];
                while !rest.is_empty() {
                    // struct linux_dirent64: inode, offset, length, type, name.
                    let length = usize::from(u16::from_le_bytes([rest[16], rest[17]]));
                    let name = rest[19..length].split(|byte| *byte == 0).next().unwrap();
                    entries.push([&[rest[18]], name].concat());
                    rest = &rest[length..];
                }
                entries.sort();
                entries
            }
            Self::Descriptors(at) => {
                let mut memory = memory.to_vec();
                memory[*at..at + 8].fill(0);
                vec![memory]
            }
        }
    }
}

/// Where paths and buffers lie.
const PATH: usize = 0;
const OTHER_PATH: usize = 8 * 1024;
const BUFFER: usize = 16 * 1024;

/// Names, as often as they are to be used. None has "..": behind a link it would lead out.
const NAMES: [&str; 20] = [
    "a",
    "a",
    "b",
    "b",
    "c",
    "d",
    "dir",
    "dir",
    "dir/a",
    "dir/b",
    "dir/sub",
    "other",
    "other/a",
    "link",
    "link2",
    "link/a",
    "a/b",
    "missing/a",
    ".",
    "dir/.",
];

/// Addresses where no process has anything.
const NOWHERE: [u64; 5] = [0, 1, 0x7fff_ffff_f000, 0xffff_8000_0000_0000, u64::MAX];

/// Numbers that no descriptor has.
const NO_DESCRIPTORS: [u64; 4] = [u64::MAX, 1_000_000, i32::MAX as u64, i32::MIN as u32 as u64];

/// The next call.
pub fn next(random: &mut Random, slots: &[Slot]) -> Plan {
    let mut planner = Planner { random, slots };
    if planner.random.once_in(5) { planner.pure() } else { planner.on_files() }
}

struct Planner<'a> {
    random: &'a mut Random,
    slots: &'a [Slot],
}

fn plan(number: Sysno, args: &[Arg]) -> Plan {
    let mut all = [Arg::Value(0); 6];
    all[..args.len()].copy_from_slice(args);
    Plan {
        name: number.name(),
        number: number.id() as u32,
        args: all,
        input: Vec::new(),
        out: None,
        makes: None,
        closes: None,
    }
}

/// A flag word, or a small number.
fn flags(flags: i32) -> Arg {
    Arg::Value(flags as u64)
}

impl Planner<'_> {
    /// A call whose result is the same in parent and child.
    fn pure(&mut self) -> Plan {
        let number = self.random.below(8) as u64;
        let (number, buffer) = (Arg::Value(number), Arg::Memory(BUFFER));
        let policy = Arg::Value(self.random.below(9) as u64);
        let buffer = if self.random.once_in(12) { self.nowhere() } else { buffer };
        match self.random.below(22) {
            0 => plan(Sysno::getuid, &[]),
            1 => plan(Sysno::geteuid, &[]),
            2 => plan(Sysno::getgid, &[]),
            3 => plan(Sysno::getegid, &[]),
            4 => plan(Sysno::sched_get_priority_max, &[policy]),
            5 => plan(Sysno::sched_get_priority_min, &[policy]),
            6 => plan(Sysno::getpriority, &[number, Arg::Value(0)]),
            7 => plan(Sysno::umask, &[Arg::Value(self.random.below(0o100) as u64)]),
            8 => plan(Sysno::umask, &[Arg::Value(0o022)]),
            9 => {
                plan(Sysno::getresuid, &[buffer, Arg::Memory(BUFFER + 4), Arg::Memory(BUFFER + 8)])
            }
            10 => plan(Sysno::getresgid, &[Arg::Memory(BUFFER), buffer, Arg::Memory(BUFFER + 8)]),
            11 => plan(Sysno::getgroups, &[Arg::Value(1024), buffer]),
            12 => plan(Sysno::uname, &[buffer]),
            13 => plan(Sysno::clock_getres, &[number, buffer]),
            14 => plan(Sysno::prlimit64, &[Arg::Value(0), number, Arg::Value(0), buffer]),
            15 => plan(Sysno::sched_getaffinity, &[Arg::Value(0), Arg::Value(512), buffer]),
            16 => plan(Sysno::sched_getscheduler, &[Arg::Value(0)]),
            17 => plan(Sysno::membarrier, &[Arg::Value(0), number]),
            18 => plan(Sysno::getrandom, &[buffer, Arg::Value(0), number]),
            19 => plan(Sysno::kill, &[Arg::Value(0), Arg::Value(65)]),
            _ => {
                // Numbers that no call has, now or soon.
                let number = self.random.one_of(&[600, 1000, 4096, 0x3fff_ffff, 0xffff_ffff]);
                let args = [Arg::Value(self.random.next()), number_arg(self.random)];
                Plan { name: "a number that is no call", number, ..plan(Sysno::getuid, &args) }
            }
        }
    }

    /// A call on descriptors and names.
    fn on_files(&mut self) -> Plan {
        let many = self.slots.len() > 24;
        let few = self.slots.len() < 8;
        match self.random.below(if few { 50 } else { 100 }) {
            0..16 if !many => self.openat(),
            16..20 if !many => self.pipe2(),
            20..23 if !many => self.eventfd2(),
            23..25 if !many => self.timerfd_create(),
            25..29 if !many => self.dup(),
            0..29 => self.close(),
            29..33 => self.mkdirat(),
            33..38 => self.write(),
            38..43 => self.read(),
            43..47 => self.linkat(),
            47..49 => self.symlinkat(),
            49..51 => self.readlinkat(),
            51..54 => self.unlinkat(),
            54..57 => self.renameat2(),
            57..60 => self.faccessat(),
            60..64 => self.fstat(),
            64..68 => self.newfstatat(),
            68..73 => self.lseek(),
            73..76 => self.ftruncate(),
            76..79 => self.getdents64(),
            79..82 => self.fchmod(),
            82..88 => self.fcntl(),
            88..90 => plan(self.random.one_of(&[Sysno::fsync, Sysno::fdatasync]), &[self.fd()]),
            90..92 => self.fallocate(),
            92..94 => self.timerfd_gettime(),
            94..96 => self.sendfile(),
            _ => self.close(),
        }
    }

    fn nowhere(&mut self) -> Arg {
        match self.random.below(NOWHERE.len() + 1) {
            0 => Arg::Memory(MEMORY),
            n => Arg::Value(NOWHERE[n - 1]),
        }
    }

    /// A descriptor, sometimes none.
    fn fd(&mut self) -> Arg {
        if self.random.once_in(14) {
            return Arg::Value(self.random.one_of(&NO_DESCRIPTORS));
        }
        Arg::Slot(self.random.below(self.slots.len()))
    }

    /// A slot of that kind, or any.
    fn slot_of(&mut self, kinds: &[Kind]) -> Arg {
        let of_kind: Vec<usize> =
            (0..self.slots.len()).filter(|slot| kinds.contains(&self.slots[*slot].kind)).collect();
        if of_kind.is_empty() || self.random.once_in(6) {
            return self.fd();
        }
        Arg::Slot(self.random.one_of(&of_kind))
    }

    fn kind(&self, fd: Arg) -> Option<Kind> {
        match fd {
            Arg::Slot(slot) => Some(self.slots[slot].kind),
            _ => None,
        }
    }

    /// The directory mostly, sometimes another descriptor.
    fn at(&mut self) -> Arg {
        if self.random.once_in(12) { self.fd() } else { Arg::Slot(0) }
    }

    /// A path, put in place.
    fn path(&mut self, at: usize, input: &mut Vec<(usize, Vec<u8>)>) -> Arg {
        if self.random.once_in(25) {
            return self.nowhere();
        }
        let name = match self.random.below(30) {
            0 => String::new(),
            1 => "n".repeat(300),
            2 => "dir/".repeat(1100),
            _ => self.random.one_of(&NAMES).to_owned(),
        };
        input.push((at, [name.as_bytes(), b"\0"].concat()));
        Arg::Memory(at)
    }

    /// A call `number(at, path, rest)`.
    fn with_path(&mut self, number: Sysno, rest: &[Arg]) -> Plan {
        let mut input = Vec::new();
        let mut args = vec![self.at(), self.path(PATH, &mut input)];
        args.extend(rest);
        Plan { input, ..plan(number, &args) }
    }

    fn openat(&mut self) -> Plan {
        let access =
            self.random.one_of(&[libc::O_RDONLY, libc::O_RDWR, libc::O_RDWR, libc::O_WRONLY, 3]);
        let create = if self.random.once_in(2) { libc::O_CREAT } else { 0 };
        let common = self.random.some_of(&[libc::O_APPEND, libc::O_CLOEXEC, libc::O_NONBLOCK], 5);
        let rare = [
            libc::O_EXCL,
            libc::O_TRUNC,
            libc::O_DIRECTORY,
            libc::O_NOFOLLOW,
            libc::O_PATH,
            libc::O_SYNC,
            libc::O_TMPFILE,
        ];
        let rare = self.random.some_of(&rare, 14);
        let mode = Arg::Value(0o400 | self.random.below(0o1000) as u64);
        let opened = flags(access | create | common | rare);
        Plan { makes: Some(Kind::Opened), ..self.with_path(Sysno::openat, &[opened, mode]) }
    }

    fn pipe2(&mut self) -> Plan {
        // Never blocking: an empty one would wait for ever.
        let more = self.random.some_of(&[libc::O_CLOEXEC, libc::O_APPEND], 4);
        let to = if self.random.once_in(10) { self.nowhere() } else { Arg::Memory(BUFFER) };
        let out = Some(Out::Descriptors(BUFFER));
        Plan { out, ..plan(Sysno::pipe2, &[to, flags(libc::O_NONBLOCK | more)]) }
    }

    fn eventfd2(&mut self) -> Plan {
        let more = self.random.some_of(&[libc::EFD_CLOEXEC, libc::EFD_SEMAPHORE, 4], 4);
        let args = [Arg::Value(self.random.below(4) as u64), flags(libc::EFD_NONBLOCK | more)];
        Plan { makes: Some(Kind::Event), ..plan(Sysno::eventfd2, &args) }
    }

    fn timerfd_create(&mut self) -> Plan {
        let more = self.random.some_of(&[libc::TFD_CLOEXEC, 4], 4);
        let clock = Arg::Value(self.random.below(12) as u64);
        let args = [clock, flags(libc::TFD_NONBLOCK | more)];
        Plan { makes: Some(Kind::Timer), ..plan(Sysno::timerfd_create, &args) }
    }

    fn timerfd_gettime(&mut self) -> Plan {
        let fd = self.slot_of(&[Kind::Timer]);
        let to = if self.random.once_in(10) { self.nowhere() } else { Arg::Memory(BUFFER) };
        plan(Sysno::timerfd_gettime, &[fd, to])
    }

    fn dup(&mut self) -> Plan {
        let fd = self.fd();
        let command = self.random.one_of(&[libc::F_DUPFD, libc::F_DUPFD_CLOEXEC]);
        let least = Arg::Value(self.random.one_of(&[0, 300, u64::MAX]));
        let made = match self.random.below(3) {
            0 => plan(Sysno::dup, &[fd]),
            1 => plan(Sysno::fcntl, &[fd, flags(command), least]),
            // Onto itself: never a success.
            _ => plan(Sysno::dup3, &[fd, fd, flags(self.random.some_of(&[libc::O_CLOEXEC, 1], 3))]),
        };
        Plan { makes: self.kind(fd), ..made }
    }

    fn close(&mut self) -> Plan {
        // The directory of the test stays.
        if self.slots.len() == 1 || self.random.once_in(6) {
            return plan(Sysno::close, &[Arg::Value(self.random.one_of(&NO_DESCRIPTORS))]);
        }
        let slot = 1 + self.random.below(self.slots.len() - 1);
        Plan { closes: Some(slot), ..plan(Sysno::close, &[Arg::Slot(slot)]) }
    }

    /// A buffer of some bytes and how many; it may end where no memory is.
    fn buffer(&mut self) -> (Arg, usize) {
        let len = self.random.one_of(&[0, 1, 7, 8, 8, 8, 100, 100, 4096, 9000]);
        match self.random.below(25) {
            0 => (self.nowhere(), len),
            1 => (Arg::Memory(MEMORY - len / 2), len),
            _ => (Arg::Memory(BUFFER), len),
        }
    }

    fn offset(&mut self) -> Arg {
        match self.random.below(8) {
            0 => Arg::Value(-1_i64 as u64),
            1 => Arg::Value(i64::MIN as u64),
            2 => Arg::Value(self.random.below(1 << 20) as u64),
            _ => Arg::Value(self.random.below(6000) as u64),
        }
    }

    fn read(&mut self) -> Plan {
        let fd = self.fd();
        let (buffer, len) = self.buffer();
        let mut args = vec![fd, buffer, Arg::Value(len as u64)];
        if self.random.once_in(2) {
            return plan(Sysno::read, &args);
        }
        args.push(self.offset());
        plan(Sysno::pread64, &args)
    }

    fn write(&mut self) -> Plan {
        let fd = self.fd();
        let (buffer, len) = self.buffer();
        let input = match (self.kind(fd), buffer) {
            // A small number: one that is too large only ever fails.
            (Some(Kind::Event), Arg::Memory(at)) if at + 8 <= MEMORY => {
                vec![(at, (self.random.below(5) as u64).to_le_bytes().to_vec())]
            }
            (_, Arg::Memory(at)) => vec![(at, self.random.bytes(len.min(MEMORY - at)))],
            _ => Vec::new(),
        };
        let mut args = vec![fd, buffer, Arg::Value(len as u64)];
        if self.random.once_in(3) {
            args.push(self.offset());
            return Plan { input, ..plan(Sysno::pwrite64, &args) };
        }
        Plan { input, ..plan(Sysno::write, &args) }
    }

    fn mkdirat(&mut self) -> Plan {
        // Its owner can always empty it.
        let mode = Arg::Value(0o700 | self.random.below(0o1000) as u64);
        self.with_path(Sysno::mkdirat, &[mode])
    }

    fn unlinkat(&mut self) -> Plan {
        let how = self.random.one_of(&[0, 0, libc::AT_REMOVEDIR, 1]);
        self.with_path(Sysno::unlinkat, &[flags(how)])
    }

    fn faccessat(&mut self) -> Plan {
        let mode = Arg::Value(self.random.below(9) as u64);
        self.with_path(Sysno::faccessat, &[mode])
    }

    fn newfstatat(&mut self) -> Plan {
        let how = [libc::AT_SYMLINK_NOFOLLOW, libc::AT_EMPTY_PATH, 1];
        let rest = [Arg::Memory(BUFFER), flags(self.random.some_of(&how, 4))];
        Plan { out: Some(Out::Stat(BUFFER)), ..self.with_path(Sysno::newfstatat, &rest) }
    }

    fn two_paths(&mut self, number: Sysno, how: i32) -> Plan {
        let mut input = Vec::new();
        let (from, to) = (self.path(PATH, &mut input), self.path(OTHER_PATH, &mut input));
        Plan { input, ..plan(number, &[self.at(), from, self.at(), to, flags(how)]) }
    }

    fn linkat(&mut self) -> Plan {
        let how = self.random.one_of(&[0, 0, libc::AT_SYMLINK_FOLLOW, 1]);
        self.two_paths(Sysno::linkat, how)
    }

    fn renameat2(&mut self) -> Plan {
        let all = libc::RENAME_NOREPLACE | libc::RENAME_EXCHANGE;
        let how = [0, 0, libc::RENAME_NOREPLACE, libc::RENAME_EXCHANGE, all].map(|how| how as i32);
        let how = self.random.one_of(&how);
        self.two_paths(Sysno::renameat2, how)
    }

    fn symlinkat(&mut self) -> Plan {
        let mut input = Vec::new();
        let target = self.path(OTHER_PATH, &mut input);
        let link = if self.random.once_in(3) {
            self.path(PATH, &mut input)
        } else {
            let name = self.random.one_of(&["link\0", "link2\0", "dir/link\0"]);
            input.push((PATH, name.as_bytes().to_vec()));
            Arg::Memory(PATH)
        };
        Plan { input, ..plan(Sysno::symlinkat, &[target, self.at(), link]) }
    }

    fn readlinkat(&mut self) -> Plan {
        let len = Arg::Value(self.random.one_of(&[0, 2, 4096]));
        if self.random.once_in(2) {
            return self.with_path(Sysno::readlinkat, &[Arg::Memory(BUFFER), len]);
        }
        let name = self.random.one_of(&["link\0", "link2\0"]);
        let input = vec![(PATH, name.as_bytes().to_vec())];
        let args = [Arg::Slot(0), Arg::Memory(PATH), Arg::Memory(BUFFER), len];
        Plan { input, ..plan(Sysno::readlinkat, &args) }
    }

    fn fstat(&mut self) -> Plan {
        let to = if self.random.once_in(12) { self.nowhere() } else { Arg::Memory(BUFFER) };
        Plan { out: Some(Out::Stat(BUFFER)), ..plan(Sysno::fstat, &[self.fd(), to]) }
    }

    fn lseek(&mut self) -> Plan {
        let fd = self.slot_of(&[Kind::Opened]);
        if self.kind(fd) == Some(Kind::Directory) {
            // Other places in a directory are a file system's own numbers.
            return plan(Sysno::lseek, &[fd, Arg::Value(0), flags(libc::SEEK_SET)]);
        }
        let whence =
            [libc::SEEK_SET, libc::SEEK_CUR, libc::SEEK_END, libc::SEEK_DATA, libc::SEEK_HOLE, 9];
        let whence = self.random.one_of(&whence);
        plan(Sysno::lseek, &[fd, self.offset(), flags(whence)])
    }

    fn ftruncate(&mut self) -> Plan {
        plan(Sysno::ftruncate, &[self.slot_of(&[Kind::Opened]), self.offset()])
    }

    fn fallocate(&mut self) -> Plan {
        let how = self.random.some_of(&[libc::FALLOC_FL_KEEP_SIZE, libc::FALLOC_FL_PUNCH_HOLE], 3);
        let fd = self.slot_of(&[Kind::Opened]);
        plan(Sysno::fallocate, &[fd, flags(how), self.offset(), self.offset()])
    }

    fn sendfile(&mut self) -> Plan {
        let (to, from) = (self.fd(), self.slot_of(&[Kind::Opened]));
        let len = Arg::Value(self.random.one_of(&[0, 10, 5000]));
        plan(Sysno::sendfile, &[to, from, Arg::Value(0), len])
    }

    fn getdents64(&mut self) -> Plan {
        // Room for all of them, or for none: which ones fit would depend on their order.
        let len = Arg::Value(self.random.one_of(&[0, 8192, 8192]));
        let fd = self.slot_of(&[Kind::Directory]);
        let args = [fd, Arg::Memory(BUFFER), len];
        Plan { out: Some(Out::Entries(BUFFER)), ..plan(Sysno::getdents64, &args) }
    }

    fn fchmod(&mut self) -> Plan {
        // With these bits a directory can still be emptied, whichever it is.
        let mode = Arg::Value(0o700 | self.random.below(0o10000) as u64);
        plan(Sysno::fchmod, &[self.fd(), mode])
    }

    fn fcntl(&mut self) -> Plan {
        let fd = self.fd();
        let get = self.random.one_of(&[libc::F_GETFL, libc::F_GETFD, libc::F_GETFL, 9999]);
        match self.random.below(4) {
            0 => {
                // What does not block stays so.
                let set = self.random.some_of(&[libc::O_APPEND, libc::O_NONBLOCK], 2);
                plan(Sysno::fcntl, &[fd, flags(libc::F_SETFL), flags(set | libc::O_NONBLOCK)])
            }
            1 => {
                let set = self.random.below(2) as i32;
                plan(Sysno::fcntl, &[fd, flags(libc::F_SETFD), flags(set)])
            }
            _ => plan(Sysno::fcntl, &[fd, flags(get)]),
        }
    }
}

fn number_arg(random: &mut Random) -> Arg {
    Arg::Value(random.next())
}
