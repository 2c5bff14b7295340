//! Which descriptors of a server's own a raw call would take from it.

use std::collections::BTreeSet;
use std::ops::RangeInclusive;

use nix::libc;
use syscalls::Sysno;

use super::Process;
use crate::calls::table::{self, Closes};

impl Process {
    /// The descriptors among [`Process::server_descriptors`] that a call would close or replace:
    /// close(2), close_range(2), dup2(2) and dup3(2) do so. No other call of the kernel's takes a number
    /// away from a process, except that execve(2) closes them all. What an io_uring of the process is told to
    /// do is not looked at.
    #[must_use]
    pub fn server_descriptors_taken_by(&self, call: Sysno, args: [u64; 6]) -> BTreeSet<i32> {
        let Some(taken) = taken_by(call, args) else { return BTreeSet::new() };
        let mut own = self.server_descriptors();
        // Those that are there are not negative.
        own.retain(|number| taken.contains(&number.cast_unsigned()));
        own
    }
}

/// The numbers that a call closes or replaces. The kernel looks at the low half of an argument that is
/// an int.
fn taken_by(call: Sysno, args: [u64; 6]) -> Option<RangeInclusive<u32>> {
    let [first, second, flags, ..] = args.map(|arg| arg as u32);
    match table::row(call.id() as usize)?.closes {
        Closes::Nothing => None,
        Closes::First => Some(first..=first),
        // A duplicate of itself is left as it is by dup2(2), and refused by dup3(2).
        Closes::Second => (first != second).then_some(second..=second),
        // With this flag they are only marked to be closed on exec, which a server's own are.
        Closes::Range => (flags & libc::CLOSE_RANGE_CLOEXEC == 0).then_some(first..=second),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Whether the call takes descriptor 5.
    fn takes_five(call: Sysno, args: [u64; 3]) -> bool {
        let [a, b, c] = args;
        taken_by(call, [a, b, c, 0, 0, 0]).is_some_and(|taken| taken.contains(&5))
    }

    #[test]
    fn what_closes_or_replaces_a_descriptor_takes_it() {
        const HIGH: u64 = 0xffff_ffff_0000_0000;
        let all = u64::from(u32::MAX);
        for (call, args) in [
            (Sysno::close, [5, 0, 0]),
            (Sysno::close, [HIGH | 5, 0, 0]),
            (Sysno::dup2, [0, 5, 0]),
            (Sysno::dup3, [0, 5, 0o2000000]),
            (Sysno::dup3, [0, HIGH | 5, 0]),
            (Sysno::close_range, [0, all, 0]),
            (Sysno::close_range, [5, 5, 0]),
            (Sysno::close_range, [HIGH | 3, HIGH | all, u64::from(libc::CLOSE_RANGE_UNSHARE)]),
        ] {
            assert!(takes_five(call, args), "{call} {args:x?}");
        }
        let cloexec = u64::from(libc::CLOSE_RANGE_CLOEXEC);
        for (call, args) in [
            (Sysno::close, [4, 5, 0]),
            (Sysno::dup, [5, 0, 0]),
            (Sysno::dup2, [5, 6, 0]),
            (Sysno::dup2, [5, 5, 0]),
            (Sysno::dup3, [5, 5, 0]),
            (Sysno::close_range, [6, all, 0]),
            (Sysno::close_range, [0, 4, 0]),
            (Sysno::close_range, [6, 4, 0]),
            (Sysno::close_range, [0, all, cloexec]),
            (Sysno::fcntl, [5, 0, 5]),
        ] {
            assert!(!takes_five(call, args), "{call} {args:x?}");
        }
    }
}
