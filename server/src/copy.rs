//! The operations that move bytes. Memory that the controller names is touched by the kernel alone.
//!
//! The stream stays in step whatever the addresses are: every byte announced is consumed or sent.

use farcall_abi::wire::Word;

use crate::serve::{HangUp, Server, entries};
use crate::stream::{OUTPUT, transfer};
use crate::sys::{self, Direction, ECANCELED, EFAULT, EINVAL, PAGE, PollFd};

impl Server {
    /// `COPY_IN(addr, len)`: its result comes once all the bytes are consumed.
    ///
    /// The kernel consumes nothing from a pipe or socket when it faults on the first byte, so what
    /// is left then is read again, to nowhere.
    pub fn copy_in(&mut self) -> Result<(), HangUp> {
        let skipped = self.resolve();
        let [addr, len, ..] = self.state.request.args;
        // How much follows must not depend on a result.
        if (len as i64) < 0 || self.state.request.word & Word::reference(1) != 0 {
            return Err(HangUp);
        }
        let (from, here) = self.payload(len);
        let mut left = len - here;
        let mut result = len as i64;
        if skipped {
            result = ECANCELED;
        } else if here != 0 {
            // SAFETY: into memory that the controller names.
            let error = whole(unsafe { sys::copy(addr, from, here) }, here);
            if error != 0 {
                result = error;
            }
        }
        if left != 0 {
            // Who waits for the results so far may be the one who has not sent the rest yet.
            self.flush()?;
        }
        if result == len as i64 {
            let [input, others @ .., _] = entries(&mut self.state.watched);
            let to = addr.wrapping_add(here);
            // SAFETY: into memory that the controller names.
            let rest = unsafe { sys::transfer(input, Direction::Read, others, to, left) };
            left = rest.left;
            if left != 0 {
                if rest.stop != EFAULT {
                    return Err(HangUp);
                }
                result = EFAULT;
            }
        }
        let [input, others @ .., _] = entries(&mut self.state.watched);
        pad(input, Direction::Read, others, left)?;
        self.finish(result)
    }

    /// `COPY_OUT(addr, len)`: writes the length, the bytes and the number of real ones.
    ///
    /// What fits into version 1's buffer goes there, if it can be copied. Else the kernel writes it from
    /// where it is. A write that faults may have had real bytes before the fault: they are sent page by
    /// page, until one page faults by itself.
    pub fn copy_out(&mut self) -> Result<(), HangUp> {
        let [addr, len, ..] = self.state.request.args;
        if (len as i64) < 0 {
            return self.finish(EINVAL);
        }
        self.finish(len as i64)?;
        let mut left = len;
        if self.state.stream.version != 0 && len <= OUTPUT as u64 {
            let to = self.room(len as usize)?;
            // SAFETY: `to` has room for as many bytes, and nobody has a reference to them.
            if unsafe { sys::copy(to.as_ptr() as u64, addr, len) } == len as i64 {
                left = 0;
            } else {
                self.state.stream.filled -= len as usize;
            }
        }
        if left != 0 {
            self.flush()?;
            let [_, others @ .., _] = entries(&mut self.state.watched);
            let mut step = u64::MAX;
            while left > 0 {
                let from = addr.wrapping_add(len - left);
                let size = step.min(left);
                let output = &mut self.state.output;
                // SAFETY: a write only reads memory.
                let part = unsafe { sys::transfer(output, Direction::Write, others, from, size) };
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
            pad(&mut self.state.output, Direction::Write, others, left)?;
        }
        self.push((len - left) as i64)
    }
}

/// Consumes bytes that have no place, or sends zeros for bytes that are not there.
fn pad(
    end: &mut PollFd,
    direction: Direction,
    others: &mut [PollFd],
    mut len: u64,
) -> Result<(), HangUp> {
    let mut scratch = [0u8; 512];
    while len > 0 {
        let step = len.min(scratch.len() as u64);
        // SAFETY: into a buffer of this function's, or out of it.
        unsafe { transfer(end, direction, others, scratch.as_mut_ptr() as u64, step) }?;
        len -= step;
    }
    Ok(())
}

/// `LOAD(addr, width)`: the number there.
pub fn load(addr: u64, width: u64) -> i64 {
    let mut value = 0i64;
    // SAFETY: into a number of this function's.
    match unsafe { word(&raw mut value as u64, addr, width) } {
        0 => value,
        error => error,
    }
}

/// `STORE(addr, width, value)`: 0.
#[inline(never)]
pub fn store(addr: u64, width: u64, value: u64) -> i64 {
    // SAFETY: into memory that the controller names.
    unsafe { word(addr, &raw const value as u64, width) }
}

/// Copies a number of `width` bytes: 0, or why not.
///
/// # Safety
///
/// As for [`sys::copy`]: 8 bytes at most.
#[inline(never)]
unsafe fn word(to: u64, from: u64, width: u64) -> i64 {
    if !width.is_power_of_two() || width > 8 {
        return EINVAL;
    }
    // SAFETY: the caller's promise.
    whole(unsafe { sys::copy(to, from, width) }, width)
}

/// What a copy of `len` bytes has come to: 0 if all of them were copied, or why not.
pub fn whole(copied: i64, len: u64) -> i64 {
    match copied {
        error if error < 0 => error,
        copied if copied == len as i64 => 0,
        _ => EFAULT,
    }
}
