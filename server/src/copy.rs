//! COPY_IN and COPY_OUT: bytes between the stream and the process's memory, moved by the kernel.
//!
//! The stream stays in step whatever the addresses are: every byte announced is consumed or sent.

use crate::serve::{HangUp, Server};
use crate::sys::{self, EAGAIN, EFAULT, EINTR, EINVAL, POLLIN, PollFd};

/// Where bytes go that have no place, and where zeros come from.
const SCRATCH: usize = 512;
const PAGE: u64 = 4096;

impl Server {
    /// `COPY_IN(addr, len)`: the result, once all the bytes are consumed.
    ///
    /// The kernel consumes nothing from a pipe or socket when it faults on the first byte, so what
    /// is left then is read again, to the scratch buffer.
    pub fn copy_in(&mut self, args: [u64; 6]) -> Result<i64, HangUp> {
        let [addr, len, ..] = args;
        if (len as i64) < 0 {
            return Err(HangUp);
        }
        let mut scratch = [0u8; SCRATCH];
        let mut result = len as i64;
        let mut done = 0;
        while done < len {
            let left = len - done;
            let n = if result == EFAULT {
                let to = scratch.as_mut_ptr() as u64;
                sys::read(self.input, to, left.min(SCRATCH as u64) as usize)
            } else {
                sys::read(self.input, addr.wrapping_add(done), left as usize)
            };
            match n {
                EINTR => {}
                EAGAIN => {
                    sys::poll(&mut [PollFd::new(self.input, POLLIN)]);
                }
                EFAULT => result = EFAULT,
                n if n <= 0 => return Err(HangUp),
                n => done += n as u64,
            }
        }
        Ok(result)
    }

    /// `COPY_OUT(addr, len)`: writes the result, the bytes and the number of real ones.
    ///
    /// A write that faults may have had real bytes before the fault: they are sent page by page,
    /// until one page faults by itself.
    pub fn copy_out(&mut self, args: [u64; 6]) -> Result<(), HangUp> {
        let [addr, len, ..] = args;
        let output = self.output;
        if (len as i64) < 0 {
            return Self::send(output, &EINVAL);
        }
        Self::send(output, &(len as i64))?;
        let zeros = [0u8; SCRATCH];
        let mut real = len;
        let mut paged = false;
        let mut done = 0;
        while done < len {
            let from = addr.wrapping_add(done);
            let left = len - done;
            let n = if real < len {
                sys::write(output, zeros.as_ptr() as u64, left.min(SCRATCH as u64) as usize)
            } else if paged {
                sys::write(output, from, left.min(PAGE - from % PAGE) as usize)
            } else {
                sys::write(output, from, left as usize)
            };
            match n {
                EFAULT if paged => real = done,
                EFAULT => paged = true,
                n => done += Self::wrote(output, n)? as u64,
            }
        }
        Self::send(output, &(real as i64))
    }
}
