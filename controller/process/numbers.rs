//! Pids of children, where they mean the same in the parent as here: then a pidfd of a child can be
//! opened here, and need not be passed from the parent, which costs several calls on both sides.
//!
//! Numbers can be used again, so each pidfd is asked whose child it refers to. The parent has no other
//! child that nobody here knows of, and that one has just been made: the number would have to have
//! been reaped by somebody else, have come round, and be a child of the same parent again.
//!
//! Both questions need Linux 6.13; where they can't be answered pidfds are passed.

use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

use nix::errno::Errno;
use nix::libc;
use nix::sys::stat::fstat;

use super::{Process, pidfd_open};

/// What a pidfd tells of its process.
fn info(pidfd: &OwnedFd) -> Option<libc::pidfd_info> {
    // SAFETY: made of numbers, which may all be zeros.
    let mut info: libc::pidfd_info = unsafe { std::mem::zeroed() };
    let pids = libc::PIDFD_INFO_PID as u64;
    info.mask = pids;
    // SAFETY: for a pidfd the kernel reads and writes as much as the number of the request says, which is
    // the size of the structure.
    let asked = unsafe { libc::ioctl(pidfd.as_raw_fd(), libc::PIDFD_GET_INFO, &raw mut info) };
    (asked == 0 && info.mask & pids != 0).then_some(info)
}

/// The pid namespace of a process, as what tells it from others.
fn pid_namespace(pidfd: &OwnedFd) -> Result<(u64, u64), Errno> {
    // SAFETY: the request takes no pointer.
    let namespace = unsafe { libc::ioctl(pidfd.as_raw_fd(), libc::PIDFD_GET_PID_NAMESPACE, 0) };
    let namespace = Errno::result(namespace)?;
    // SAFETY: the kernel just made this descriptor for us.
    let namespace = unsafe { OwnedFd::from_raw_fd(namespace) };
    let stat = fstat(namespace.as_fd())?;
    Ok((stat.st_dev, stat.st_ino))
}

impl Process {
    /// The process's pid here, if the pids of its children are the same for it and here. A process
    /// stays in its pid namespace for life.
    pub(super) fn number_here(&self) -> Option<u32> {
        if let Some(number) = self.inner().number.get() {
            return *number;
        }
        // Where no descriptor is free for that, it is asked again the next time.
        let this = pidfd_open(std::process::id()).ok()?;
        let pidfd = self.shared_pidfd();
        let namespaces = [pid_namespace(pidfd), pid_namespace(&this)];
        if namespaces.contains(&Err(Errno::EMFILE)) || namespaces.contains(&Err(Errno::ENFILE)) {
            return None;
        }
        let [theirs, ours] = namespaces;
        let same = theirs.is_ok() && theirs == ours;
        let number = info(pidfd).filter(|_| same).map(|info| info.pid);
        *self.inner().number.get_or_init(|| number)
    }
}

/// A pidfd of child `pid` of the process that has the number `parent` here.
pub(super) fn child(pid: i32, parent: u32) -> Option<OwnedFd> {
    let pidfd = pidfd_open(pid as u32).ok()?;
    info(&pidfd).filter(|info| info.ppid == parent).map(|_| pidfd)
}
