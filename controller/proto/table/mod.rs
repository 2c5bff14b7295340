//! The table of system calls: what is known of each, once.
//!
//! A row has a call's name and its arguments as the man page names them, and for each argument its
//! [`Shape`]: how its value is shown, and how text is read back into it. Its other columns say what else has
//! to be known of a call by its number: whether it may wait, which descriptors it closes, whether it counts
//! what it fills. Rows are for whoever meets a call by its number or its name: `farcall log`, `farcall call`,
//! errors. Files are the topics of man pages, names of flags stand beside the rows that use them.

mod macros;
mod notation;
mod row;

mod control;
mod directories;
mod events;
mod files;
mod identity;
mod ipc;
mod memory;
mod mounts;
mod namespaces;
mod processes;
mod sockets;
mod system;
mod time;

pub(crate) use macros::{commands, layouts, names, rows};
pub use notation::{integer, radix_of};
pub use row::{
    Argument, Blocks, Closes, Command, Commands, Count, Item, Layout, Member, Memory, Names, Row,
    Shape,
};
pub use syscalls::Sysno;

/// A topic of man pages, and its rows.
#[derive(Debug)]
pub struct Topic {
    /// Its name.
    pub name: &'static str,
    /// Its rows.
    pub rows: &'static [Row],
}

/// All rows.
pub static TOPICS: &[Topic] = &[
    Topic { name: "Files", rows: files::ROWS },
    Topic { name: "Events", rows: events::ROWS },
    Topic { name: "Directories and names", rows: directories::ROWS },
    Topic { name: "Mounts", rows: mounts::ROWS },
    Topic { name: "Sockets", rows: sockets::ROWS },
    Topic { name: "Processes", rows: processes::ROWS },
    Topic { name: "Identity", rows: identity::ROWS },
    Topic { name: "Namespaces and sandboxes", rows: namespaces::ROWS },
    Topic { name: "Memory", rows: memory::ROWS },
    Topic { name: "Queues, semaphores, shared memory", rows: ipc::ROWS },
    Topic { name: "Time and signals", rows: time::ROWS },
    Topic { name: "System", rows: system::ROWS },
];

/// How many numbers of system calls there may be.
const NUMBERS: usize = 512;

/// Each row at its number.
static BY_NUMBER: [Option<&Row>; NUMBERS] = by_number();

const fn by_number() -> [Option<&'static Row>; NUMBERS] {
    let mut rows = [None; NUMBERS];
    let mut topic = 0;
    while topic < TOPICS.len() {
        let mut row = 0;
        while row < TOPICS[topic].rows.len() {
            let found = &TOPICS[topic].rows[row];
            let number = found.number.id() as usize;
            assert!(rows[number].is_none(), "a system call has two rows");
            rows[number] = Some(found);
            row += 1;
        }
        topic += 1;
    }
    rows
}

/// The row of the system call of this number.
#[must_use]
pub fn row(number: usize) -> Option<&'static Row> {
    BY_NUMBER.get(number).copied().flatten()
}

/// How many bytes a member of a structure has.
pub(crate) const fn size_of_member<T, M>(_: fn(&T) -> *const M) -> usize {
    size_of::<M>()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn rows() -> impl Iterator<Item = &'static Row> {
        TOPICS.iter().flat_map(|topic| topic.rows)
    }

    #[test]
    fn each_system_call_has_exactly_one_row() {
        for call in (0..NUMBERS).filter_map(Sysno::new) {
            let count = rows().filter(|row| row.number == call).count();
            assert_eq!(count, 1, "{call}");
            assert_eq!(row(call.id() as usize).map(|row| row.number), Some(call));
        }
        assert_eq!(rows().count(), Sysno::count());
    }

    #[test]
    fn calls_are_shown_as_strace_does() {
        let at = -100i64 as u64;
        for (call, args, shown) in [
            (
                Sysno::openat,
                [at, 0x7f00, 0o2000000, 0],
                "openat(AT_FDCWD, 0x7f00, O_RDONLY|O_CLOEXEC)",
            ),
            (Sysno::openat, [3, 0, 0o101, 0o644], "openat(3, NULL, O_WRONLY|O_CREAT, 0644)"),
            (Sysno::open, [1, 1 << 30, 0, 0], "open(0x1, O_RDONLY|0x40000000)"),
            (Sysno::fcntl, [4, 2, 1, 0], "fcntl(4, F_SETFD, FD_CLOEXEC)"),
            (Sysno::fcntl, [4, 1, 77, 0], "fcntl(4, F_GETFD)"),
            (Sysno::fcntl, [4, 999, 7, 0], "fcntl(4, 999, 0x7)"),
            (Sysno::prctl, [1, 9, 0, 0], "prctl(PR_SET_PDEATHSIG, SIGKILL)"),
            (Sysno::futex, [16, 129, 1, 0], "futex(0x10, FUTEX_WAKE|FUTEX_PRIVATE_FLAG, 1)"),
            (Sysno::clone, [0x4011, 0, 0, 0], "clone(CLONE_VFORK|SIGCHLD, NULL, NULL, NULL, NULL)"),
            (Sysno::kill, [0xffff_ffff, 15, 0, 0], "kill(-1, SIGTERM)"),
            (Sysno::close, [at, 0, 0, 0], "close(-100)"),
        ] {
            let [a, b, c, d] = args;
            let row = row(call.id() as usize).unwrap();
            let got = row.show(&[a, b, c, d, 0, 0]);
            let flags: fn(&str) -> Vec<String> = |text| {
                let mut words: Vec<String> =
                    text.split(['|', '(', ')', ',', ' ']).map(str::to_owned).collect();
                words.sort();
                words
            };
            assert_eq!(flags(&got), flags(shown), "{got}");
        }
        let openat = row(Sysno::openat.id() as usize).unwrap();
        assert_eq!(openat.usage(), "openat(dirfd, pathname, flags[, mode])");
        let fcntl = row(Sysno::fcntl.id() as usize).unwrap();
        assert_eq!(fcntl.show_result(&[3, 3, 0, 0, 0, 0], 2), "O_RDWR");
    }

    proptest! {
        #[test]
        fn what_is_shown_is_read_back_to_the_same_value(random: u64, bits in 0u32..64) {
            let small = random >> bits;
            let values = [random, small, 1 << bits, small as u32 as u64, -1i64 as u64, small & 0xff];
            for row in rows() {
                for value in values {
                    let args = [value; 6];
                    for shape in row.shapes(&args) {
                        let shown = shape.show(value);
                        let read = shape.read(&shown);
                        let same = |read: u64| read == value || shape.is_int() && read as u32 == value as u32;
                        prop_assert!(read.is_some_and(same), "{} {:?}: {value:#x} {shown}", row.number, shape);
                    }
                }
                for argument in row.args {
                    for (name, number) in argument.shape.names() {
                        let read = argument.shape.read(name).unwrap();
                        prop_assert_eq!(read as u32, number as u32, "{}", name);
                        let again = argument.shape.read(&argument.shape.show(read));
                        prop_assert_eq!(again, Some(read), "{}", name);
                    }
                }
            }
        }
    }
}
