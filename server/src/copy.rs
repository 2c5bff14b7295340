//! COPY_IN and COPY_OUT: bytes between the stream and the process's memory, moved by the kernel.
//!
//! The stream stays in step whatever the addresses are: every byte announced is consumed or sent.

use crate::serve::{HangUp, Server, send, transfer};
use crate::sys::{self, ECANCELED, EFAULT, EINVAL, Transferred, Way};

const PAGE: u64 = 4096;

impl Server {
    /// `COPY_IN(addr, len)`: the result, once all the bytes are consumed.
    ///
    /// The kernel consumes nothing from a pipe or socket when it faults on the first byte, so what
    /// is left then is read again, to nowhere.
    #[inline(never)]
    pub fn copy_in(&mut self, addr: u64, len: u64, skipped: bool) -> Result<i64, HangUp> {
        let input = self.watched.input.fd;
        if (len as i64) < 0 {
            return Err(HangUp);
        }
        let mut result = if skipped { ECANCELED } else { len as i64 };
        let to = if skipped { 0 } else { addr };
        let mut here = 0;
        if let Some(ahead) = self.ahead() {
            let (used, stored) = ahead.payload(to, len);
            here = used;
            if stored != used && !skipped {
                result = EFAULT;
            }
        }
        if result == len as i64 {
            let Transferred(done, stop) =
                sys::transfer(Way::In, input, addr.wrapping_add(here), len - here);
            here += done;
            if here < len {
                if stop != EFAULT {
                    return Err(HangUp);
                }
                result = EFAULT;
            }
        }
        pad(Way::In, input, len - here)?;
        Ok(result)
    }

    /// `COPY_OUT(addr, len)`: writes the length, the bytes and the number of real ones.
    ///
    /// A write that faults may have had real bytes before the fault: they are sent page by page,
    /// until one page faults by itself.
    #[inline(never)]
    pub fn copy_out(&mut self, addr: u64, len: u64) -> Result<(), HangUp> {
        let output = self.output;
        if (len as i64) < 0 {
            return self.finish(EINVAL);
        }
        self.finish(len as i64)?;
        if let Some(ahead) = self.ahead()
            && let Some(to) = ahead.room(output, len)?
        {
            let real = sys::copy(to as u64, addr, len).max(0);
            let zeros = len as usize - real as usize;
            // SAFETY: `to` has room for `len` bytes, of which `real` are there.
            unsafe { to.add(real as usize).write_bytes(0, zeros) };
            return ahead.push(output, real);
        }
        let mut real = 0;
        let mut step = u64::MAX;
        while real < len {
            let from = addr.wrapping_add(real);
            let Transferred(done, stop) =
                sys::transfer(Way::Out, output, from, step.min(len - real));
            real += done;
            if stop != 0 && stop != EFAULT {
                return Err(HangUp);
            }
            if done == 0 && step <= PAGE {
                break;
            }
            step = PAGE - addr.wrapping_add(real) % PAGE;
        }
        pad(Way::Out, output, len - real)?;
        match self.ahead() {
            Some(ahead) => ahead.push(output, real as i64),
            None => send(output, real as i64),
        }
    }
}

/// Consumes bytes that have no place, or sends zeros for bytes that are not there.
fn pad(way: Way, fd: i32, mut len: u64) -> Result<(), HangUp> {
    let mut scratch = [0u8; 512];
    while len > 0 {
        let step = len.min(scratch.len() as u64);
        transfer(way, fd, scratch.as_mut_ptr() as u64, step)?;
        len -= step;
    }
    Ok(())
}
