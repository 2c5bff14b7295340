//! What a pidfd tells of a process that need not be a child: PIDFD_GET_INFO, see ioctl_pidfd(2).

use std::mem::offset_of;

use nix::errno::Errno;
use nix::libc;
use syscalls::Sysno;

use super::{Task, WaitStatus};
use crate::calls::handle::Fd;
use crate::error::{Error, Result};
use crate::proto::Call;

const SIZE: usize = size_of::<libc::pidfd_info>();
const MASK: usize = offset_of!(libc::pidfd_info, mask);
const EXIT_CODE: usize = offset_of!(libc::pidfd_info, exit_code);
const EXIT: u64 = libc::PIDFD_INFO_EXIT as u64;

const _: () = assert!(SIZE == libc::PIDFD_INFO_SIZE_VER0 as usize);

/// Which call failed, where both ask about the same pidfd.
const ALIVE: &str = "pidfd_send_signal";

impl Task {
    /// The exit status of the process behind a pidfd of the target process, whoever its parent is; none
    /// as long as it has not ended, *or its parent has not reaped it*: the kernel tells it only after
    /// that. It is told as often as it is asked for, to whoever has the pidfd.
    ///
    /// This is for children of other processes. Of its own ones, which it has to reap,
    /// [`Process::wait_for_child`](crate::Process::wait_for_child) tells.
    ///
    /// # Errors
    ///
    /// [`Error::ExitStatusUntold`] before Linux 6.15, or if the process is not in the target process's
    /// pid namespace; EBADF for what is no pidfd.
    pub async fn exit_status(&self, pidfd: &Fd) -> Result<Option<WaitStatus>> {
        let number = self.number(pidfd)?;
        let buffer = self.buffer(SIZE).await?;
        let at = buffer.address();
        let mut info = [0; SIZE];
        info[MASK..MASK + size_of_val(&EXIT)].copy_from_slice(&EXIT.to_le_bytes());
        let calls = vec![
            Call::copy_in(at, info.to_vec()),
            // Whether it is no zombie any more, before it is asked for: it may become so in between.
            Call::syscall(Sysno::pidfd_send_signal, [number, 0, 0, 0, 0, 0]),
            Call::syscall(Sysno::ioctl, [number, libc::PIDFD_GET_INFO, at, 0, 0, 0]),
            Call::copy_out(at, SIZE),
        ];
        self.connection
            .submit(calls, move |replies| {
                let _buffer = buffer;
                let [written, alive, asked, info] = replies.as_slice() else {
                    return Err(Error::Protocol("not four replies"));
                };
                written.value().map_err(Error::call("COPY_IN"))?;
                told(alive.value(), asked.value(), &info.data)
            })
            .await
    }
}

/// What the answers mean.
fn told(
    alive: Result<u64, Errno>,
    asked: Result<u64, Errno>,
    info: &[u8],
) -> Result<Option<WaitStatus>> {
    if alive == Err(Errno::EBADF) {
        return Err(Error::Call { call: ALIVE, errno: Errno::EBADF });
    }
    match asked {
        Ok(_) => {}
        // The call, this request or an argument of it is unknown; or (6.13, 6.14) it is answered for
        // processes only that have not been reaped.
        Err(errno @ (Errno::ENOTTY | Errno::EINVAL | Errno::ENOSYS | Errno::ESRCH)) => {
            return Err(Error::ExitStatusUntold { errno: Some(errno) });
        }
        Err(errno) => return Err(Error::Call { call: "ioctl", errno }),
    }
    let mask = info.get(MASK..).and_then(|bytes| bytes.first_chunk());
    let code = info.get(EXIT_CODE..).and_then(|bytes| bytes.first_chunk());
    let (Some(mask), Some(code)) = (mask, code) else {
        return Err(Error::Protocol("less than was asked for"));
    };
    if u64::from_le_bytes(*mask) & EXIT != 0 {
        return Ok(Some(WaitStatus::from_wait(i32::from_le_bytes(*code))));
    }
    if alive == Err(Errno::ESRCH) {
        return Err(Error::ExitStatusUntold { errno: None });
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn info(mask: u64, code: i32) -> Vec<u8> {
        let mut info = vec![0; SIZE];
        info[MASK..MASK + 8].copy_from_slice(&mask.to_le_bytes());
        info[EXIT_CODE..EXIT_CODE + 4].copy_from_slice(&code.to_le_bytes());
        info
    }

    const ALIVE: Result<u64, Errno> = Ok(0);
    const REAPED: Result<u64, Errno> = Err(Errno::ESRCH);

    #[test]
    fn a_status_is_the_one_that_wait_gives() {
        for (code, status) in [
            (0, WaitStatus::Exited(0)),
            (42 << 8, WaitStatus::Exited(42)),
            (255 << 8, WaitStatus::Exited(255)),
            (9, WaitStatus::Signaled { signal: 9, core_dumped: false }),
            (11 | 0x80, WaitStatus::Signaled { signal: 11, core_dumped: true }),
        ] {
            assert_eq!(told(REAPED, Ok(0), &info(EXIT, code)).unwrap(), Some(status));
            // Reaped after it was looked whether it is.
            assert_eq!(told(ALIVE, Ok(0), &info(EXIT | 1, code)).unwrap(), Some(status));
        }
    }

    #[test]
    fn one_that_is_not_reaped_has_none_yet() {
        assert_eq!(told(ALIVE, Ok(0), &info(7, 0)).unwrap(), None);
        // Nobody may send it a signal: it is there.
        assert_eq!(told(Err(Errno::EPERM), Ok(0), &info(7, 0)).unwrap(), None);
    }

    #[test]
    fn a_kernel_that_does_not_tell_is_an_error_that_says_so() {
        let answers = [
            (ALIVE, Err(Errno::ENOTTY)),
            (REAPED, Err(Errno::EINVAL)),
            (REAPED, Err(Errno::ESRCH)),
            (REAPED, Ok(0)),
        ];
        for (alive, asked) in answers {
            let error = told(alive, asked, &info(7, 0)).unwrap_err();
            assert!(matches!(error, Error::ExitStatusUntold { .. }), "{error:?}");
            let text = error.to_string();
            assert!(text.contains("6.15") && text.contains("wait_for_child"), "{text}");
        }
    }

    #[test]
    fn what_is_no_pidfd_is_no_old_kernel() {
        let error = told(Err(Errno::EBADF), Err(Errno::ENOTTY), &info(0, 0)).unwrap_err();
        assert!(matches!(error, Error::Call { errno: Errno::EBADF, .. }), "{error:?}");
    }
}
