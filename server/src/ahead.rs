//! Version 1: requests that were read ahead, results that wait to be sent together, and the results
//! that later calls may refer to.

use farcall_abi::wire::{AHEAD_SIZE, MAX_ERRNO, MAX_REF, REQUEST_SIZE, RESULT_SIZE, Request};

use crate::serve::{HangUp, transfer};
use crate::sys::{self, EAGAIN, EINTR, Way};

/// The results that a REF can reach.
const HISTORY: usize = MAX_REF as usize;
/// Bytes for requests and payloads that have been read and not used.
const INPUT: usize = 3552;
/// Bytes of results and data that wait to be sent.
const OUTPUT: usize = 4096;

/// The memory that a controller gives with HELLO.
#[repr(C)]
pub struct Ahead {
    /// The result of call n is at n modulo its length.
    history: [i64; HISTORY],
    /// How many calls there have been on this connection.
    calls: u64,
    /// The part of `input` that is not used yet.
    start: usize,
    end: usize,
    /// Bytes of `output` that wait.
    filled: usize,
    input: [u8; INPUT],
    output: [u8; OUTPUT],
}

const _: () = {
    assert!(size_of::<Ahead>() == AHEAD_SIZE);
    assert!(HISTORY.is_power_of_two());
};

/// Whether a result says that its call failed or was not executed.
pub fn is_error(result: i64) -> bool {
    (-MAX_ERRNO..0).contains(&result)
}

impl Ahead {
    /// A new connection: nothing has been read, sent or called.
    pub fn clear(&mut self) {
        self.calls = 0;
        self.start = 0;
        self.end = 0;
        self.filled = 0;
    }

    /// Reads once. An error, and also 0 for the end of input, is the kernel's.
    pub fn read(&mut self, fd: i32) -> i64 {
        let left = self.end - self.start;
        let base = self.input.as_mut_ptr();
        // SAFETY: `start..end` is the used part of `input`. What is moved ends up before where it
        // was.
        unsafe { core::ptr::copy(base.wrapping_add(self.start), base, left) };
        self.start = 0;
        self.end = left;
        let n = sys::read(fd, base.wrapping_add(left) as u64, INPUT - left);
        if n > 0 {
            self.end += n as usize;
        }
        n
    }

    /// The next request, if the whole of it is here.
    pub fn next(&mut self) -> Option<Request> {
        if self.end - self.start < REQUEST_SIZE {
            return None;
        }
        // SAFETY: that many bytes of `input` are there from `start` on, and any bytes are a request.
        let request = unsafe {
            self.input.as_ptr().wrapping_add(self.start).cast::<Request>().read_unaligned()
        };
        self.start += REQUEST_SIZE;
        Some(request)
    }

    /// Moves payload that has been read ahead, up to `len` bytes of it, to `address`, or nowhere if
    /// that is 0. Returns how many bytes that were, and how many of them could be stored.
    pub fn payload(&mut self, address: u64, len: u64) -> (u64, u64) {
        let here = len.min((self.end - self.start) as u64);
        let from = self.input.as_ptr().wrapping_add(self.start) as u64;
        let stored = if address == 0 { 0 } else { sys::copy(address, from, here).max(0) as u64 };
        self.start += here as usize;
        (here, stored)
    }

    /// The result of the call `distance` back, unless it failed or there was none.
    pub fn earlier(&self, distance: u64) -> Option<i64> {
        if distance.wrapping_sub(1) >= MAX_REF.min(self.calls) {
            return None;
        }
        let at = (self.calls - distance) as usize % HISTORY;
        self.history.get(at).copied().filter(|result| !is_error(*result))
    }

    /// A call has this result.
    pub fn record(&mut self, result: i64) {
        if let Some(place) = self.history.get_mut(self.calls as usize % HISTORY) {
            *place = result;
        }
        self.calls += 1;
    }

    /// Sends what waits.
    pub fn flush(&mut self, fd: i32) -> Result<(), HangUp> {
        let len = core::mem::take(&mut self.filled);
        transfer(Way::Out, fd, self.output.as_ptr() as u64, len as u64)
    }

    /// Room for `len` more bytes to be sent, or `None` if that is too much for the buffer.
    pub fn room(&mut self, fd: i32, len: u64) -> Result<Option<*mut u8>, HangUp> {
        if len > OUTPUT as u64 {
            self.flush(fd)?;
            return Ok(None);
        }
        if self.filled + len as usize > OUTPUT {
            self.flush(fd)?;
        }
        let at = self.output.as_mut_ptr().wrapping_add(self.filled);
        self.filled += len as usize;
        Ok(Some(at))
    }

    /// Puts a result behind what waits to be sent.
    pub fn push(&mut self, fd: i32, result: i64) -> Result<(), HangUp> {
        if let Some(at) = self.room(fd, RESULT_SIZE as u64)? {
            // SAFETY: there is room for as many bytes.
            unsafe { at.cast::<i64>().write_unaligned(result) };
        }
        Ok(())
    }
}

/// Whether a read has to be tried again later.
pub fn is_later(n: i64) -> bool {
    n == EINTR || n == EAGAIN
}
