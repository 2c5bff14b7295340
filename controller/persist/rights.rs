//! What root does on another user's word it does with that user's rights: in a child that has no others.

use std::os::fd::{AsRawFd, BorrowedFd};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::libc;
use nix::sys::signal::{SigSet, SigmaskHow, pthread_sigmask};
use nix::unistd::Uid;

/// How long the child may take: a path that it is given may lead to a file system of that user's own.
pub(super) const LIMIT: Duration = Duration::from_secs(2);

/// How long a child that was killed may take to end. One that waits for a program that serves a file
/// system (FUSE) ends with that program.
const END_LIMIT: Duration = Duration::from_millis(200);

/// Runs `act` in a child with the rights of `uid`, in no group, without capabilities, and returns what it
/// returns; EPERM if this process may not act as that user, ETIMEDOUT if it took too long. The child has
/// no descriptor but that one.
///
/// # Safety
///
/// `act` makes system calls and nothing else: the child is a copy of this thread alone, in which locks
/// that other threads held are held for ever.
pub(super) unsafe fn as_user(
    uid: Uid,
    fd: Option<BorrowedFd<'_>>,
    act: impl FnOnce() -> Result<(), Errno>,
) -> Result<(), Errno> {
    // SAFETY: the caller's promise, and `be` makes system calls alone.
    unsafe {
        in_time(fd, || {
            be(uid, NO_GROUP, &[])?;
            check(libc::syscall(libc::SYS_prctl, libc::PR_SET_PDEATHSIG, libc::SIGKILL, 0, 0, 0))?;
            act()
        })
    }
}

/// The same with the rights that this thread has.
///
/// # Safety
///
/// As of [`as_user`].
pub(super) unsafe fn in_time(
    fd: Option<BorrowedFd<'_>>,
    act: impl FnOnce() -> Result<(), Errno>,
) -> Result<(), Errno> {
    // SAFETY: the caller's promise.
    let child = unsafe { fork(fd, || act().err().map_or(0, |errno| errno as i32)) }?;
    wait(child)
}

/// Begins a child that runs `act`, with no descriptor but that one, and ends with what it returns. Its pid.
///
/// # Safety
///
/// As of [`as_user`].
pub(super) unsafe fn fork(
    fd: Option<BorrowedFd<'_>>,
    act: impl FnOnce() -> i32,
) -> Result<i32, Errno> {
    // No handler of this process's is to run in the child.
    let mut before = SigSet::empty();
    pthread_sigmask(SigmaskHow::SIG_SETMASK, Some(&SigSet::all()), Some(&mut before))?;
    // No flags, and no signal when it ends: nobody who waits for children of theirs is told of it.
    // SAFETY: like fork(2); what the child does in its copy of the stack is up to exit_group(2).
    let child = unsafe { libc::syscall(libc::SYS_clone, 0, 0, 0, 0, 0) };
    if child == 0 {
        close_all_but(fd);
        let status = act();
        // SAFETY: ends the child.
        unsafe { libc::syscall(libc::SYS_exit_group, status) };
    }
    let failed = Errno::last();
    let _ = pthread_sigmask(SigmaskHow::SIG_SETMASK, Some(&before), None);
    if child < 0 { Err(failed) } else { Ok(child as i32) }
}

/// A child that can't be ended would keep connections and locks of this process.
fn close_all_but(fd: Option<BorrowedFd<'_>>) {
    let kept = fd.map_or(u32::MAX, |fd| fd.as_raw_fd().cast_unsigned());
    let ranges = [(0, kept.wrapping_sub(1)), (kept.saturating_add(1), u32::MAX)];
    for (first, last) in ranges {
        // SAFETY: the call has no pointers. Where there is no such call, or nothing in a range, nothing
        // is closed.
        unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) };
    }
}

/// A group that no file of anybody's is to have.
pub(super) const NO_GROUP: libc::gid_t = 65_534;

/// Takes the rights of a user, and only those, for good, by system calls alone. Groups that have no id
/// in this user namespace are left out. Nobody may look into this process then, which is a copy of one
/// that has more rights.
pub(super) fn be(uid: Uid, gid: libc::gid_t, groups: &[libc::gid_t]) -> Result<(), Errno> {
    #[repr(C)]
    struct Header {
        version: u32,
        pid: i32,
    }
    const VERSION_3: u32 = 0x2008_0522;
    let (uid, header) = (uid.as_raw(), Header { version: VERSION_3, pid: 0 });
    let none = [0u32; 6];
    // The system calls and not libc's functions, which want other threads to do the same.
    // SAFETY: the pointers are null where nothing is read, and else lead to what is read there.
    unsafe {
        let grouped = check(libc::syscall(libc::SYS_setgroups, groups.len(), groups.as_ptr()));
        if grouped == Err(Errno::EINVAL) {
            check(libc::syscall(libc::SYS_setgroups, 0, 0))?;
        } else {
            grouped?;
        }
        if check(libc::syscall(libc::SYS_setresgid, gid, gid, gid)).is_err() {
            check(libc::syscall(libc::SYS_setresgid, NO_GROUP, NO_GROUP, NO_GROUP))?;
        }
        check(libc::syscall(libc::SYS_setresuid, uid, uid, uid))?;
        // Under some securebits they stay.
        check(libc::syscall(libc::SYS_capset, &raw const header, none.as_ptr()))?;
        check(libc::syscall(libc::SYS_prctl, libc::PR_SET_DUMPABLE, 0, 0, 0, 0))
    }
}

fn check(result: libc::c_long) -> Result<(), Errno> {
    if result < 0 { Err(Errno::last()) } else { Ok(()) }
}

/// Waits for the child, and kills it when it takes too long. One that does not end then is left.
fn wait(child: i32) -> Result<(), Errno> {
    let mut end = Instant::now() + LIMIT;
    let mut late = false;
    loop {
        let mut status = 0;
        let flags = libc::__WALL | libc::WNOHANG;
        // SAFETY: the status is there to be written.
        let waited = unsafe { libc::waitpid(child, &raw mut status, flags) };
        match waited {
            0 if late && Instant::now() > end => {
                // Reaped whenever it ends, if this process lives then.
                let reap = move || {
                    // SAFETY: the status may be null. No other child has the pid before.
                    unsafe { libc::waitpid(child, std::ptr::null_mut(), libc::__WALL) }
                };
                let _ = std::thread::Builder::new().spawn(reap);
                return Err(Errno::ETIMEDOUT);
            }
            0 if Instant::now() > end => {
                late = true;
                end = Instant::now() + END_LIMIT;
                // SAFETY: the call has no pointers; the child is not reaped, so the pid is its own.
                unsafe { libc::kill(child, libc::SIGKILL) };
            }
            0 => std::thread::sleep(Duration::from_micros(100)),
            -1 if Errno::last() == Errno::EINTR => {}
            -1 => return Err(Errno::last()),
            _ if late => return Err(Errno::ETIMEDOUT),
            _ if libc::WIFEXITED(status) => {
                return match libc::WEXITSTATUS(status) {
                    0 => Ok(()),
                    errno => Err(Errno::from_raw(errno)),
                };
            }
            _ => return Err(Errno::EIO),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_done_as_a_user_is_done_with_that_users_rights() {
        assert!(nix::unistd::geteuid().is_root(), "this test acts as two users: run it as root");
        let user = Uid::from_raw(65_530);
        // SAFETY: only system calls are made.
        unsafe {
            assert_eq!(as_user(user, None, || Ok(())), Ok(()));
            assert_eq!(as_user(user, None, || Err(Errno::ENOANO)), Err(Errno::ENOANO));
            let ids = || {
                let same = libc::getuid() == 65_530 && libc::geteuid() == 65_530;
                let groups = libc::syscall(libc::SYS_getgroups, 0, 0);
                if same && groups == 0 { Ok(()) } else { Err(Errno::EPERM) }
            };
            assert_eq!(as_user(user, None, ids), Ok(()));
            // This process itself is root's.
            let own = std::process::id();
            let signal = move || check(libc::syscall(libc::SYS_kill, own, 0));
            assert_eq!(as_user(user, None, signal), Err(Errno::EPERM));
            let for_ever = || check(libc::syscall(libc::SYS_pause));
            assert_eq!(as_user(user, None, for_ever), Err(Errno::ETIMEDOUT));
        }
        assert!(nix::unistd::geteuid().is_root());
    }
}
