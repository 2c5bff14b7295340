//! The operations that move bytes. Memory that the controller names is touched by the kernel alone.
//!
//! The stream stays in step whatever the addresses are: every byte announced is consumed or sent.

use farcall_abi::wire::Word;

use crate::serve::{HangUp, Server};
use crate::stream::{OUTPUT, Way};
use crate::sys::{self, ECANCELED, EFAULT, EINVAL};

const PAGE: u64 = 4096;

impl Server {
    /// `COPY_IN(addr, len)`: its result comes once all the bytes are consumed.
    ///
    /// The kernel consumes nothing from a pipe or socket when it faults on the first byte, so what
    /// is left then is read again, to nowhere.
    pub fn copy_in(&mut self) -> Result<(), HangUp> {
        let skipped = self.resolve();
        let [addr, len, ..] = self.request.args;
        // How much follows must not depend on a result.
        if (len as i64) < 0 || self.request.word & Word::reference(1) != 0 {
            return Err(HangUp);
        }
        let (from, here) = self.payload(len);
        let mut left = len - here;
        let mut result = len as i64;
        if skipped {
            result = ECANCELED;
        } else if here != 0 && sys::copy(addr, from, here) != here as i64 {
            result = EFAULT;
        }
        if left != 0 {
            // Who waits for the results so far may be the one who has not sent the rest yet.
            self.flush()?;
        }
        if result == len as i64 {
            let rest = self.transfer(Way::In, addr.wrapping_add(here), left);
            left = rest.left;
            if left != 0 {
                if rest.stop != EFAULT {
                    return Err(HangUp);
                }
                result = EFAULT;
            }
        }
        self.pad(Way::In, left)?;
        self.finish(result)
    }

    /// `COPY_OUT(addr, len)`: writes the length, the bytes and the number of real ones.
    ///
    /// What fits into version 1's buffer goes there. Else the kernel writes it from where it is. A
    /// write that faults may have had real bytes before the fault: they are sent page by page,
    /// until one page faults by itself.
    pub fn copy_out(&mut self) -> Result<(), HangUp> {
        let [addr, len, ..] = self.request.args;
        if (len as i64) < 0 {
            return self.finish(EINVAL);
        }
        self.finish(len as i64)?;
        let mut left = len;
        if self.stream.version != 0 && len <= OUTPUT as u64 {
            let to = self.room(len as usize)?;
            let real = sys::copy(to.as_ptr() as u64, addr, len).max(0);
            left -= real as u64;
            // SAFETY: `to` has room for `len` bytes, of which `real` are there.
            unsafe { to.add(real as usize).write_bytes(0, left as usize) };
        } else {
            self.flush()?;
            let mut step = u64::MAX;
            while left > 0 {
                let from = addr.wrapping_add(len - left);
                let size = step.min(left);
                let part = self.transfer(Way::Out, from, size);
                left -= size - part.left;
                if part.left != 0 {
                    if part.stop != EFAULT {
                        return Err(HangUp);
                    }
                    if step <= PAGE {
                        break;
                    }
                }
                step = PAGE - addr.wrapping_add(len - left) % PAGE;
            }
            self.pad(Way::Out, left)?;
        }
        self.push((len - left) as i64)
    }


    /// Consumes bytes that have no place, or sends zeros for bytes that are not there.
    fn pad(&mut self, way: Way, mut len: u64) -> Result<(), HangUp> {
        let mut scratch = [0u8; 512];
        while len > 0 {
            let step = len.min(scratch.len() as u64);
            self.transfer_all(way, scratch.as_mut_ptr() as u64, step)?;
            len -= step;
        }
        Ok(())
    }
}

/// `LOAD(addr, width)`: the number there.
pub fn load(addr: u64, width: u64) -> i64 {
    let mut value = 0i64;
    match word(&raw mut value as u64, addr, width) {
        0 => value,
        error => error,
    }
}

/// `STORE(addr, width, value)`: 0.
#[inline(never)]
pub fn store(addr: u64, width: u64, value: u64) -> i64 {
    word(addr, &raw const value as u64, width)
}

/// Copies a number of `width` bytes: 0, or why not.
#[inline(never)]
fn word(to: u64, from: u64, width: u64) -> i64 {
    if !width.is_power_of_two() || width > 8 {
        EINVAL
    } else if sys::copy(to, from, width) == width as i64 {
        0
    } else {
        EFAULT
    }
}
