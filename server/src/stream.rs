//! The connection's stream: requests come in through a buffer, and results leave through one.
//!
//! Both versions of the stream go the same way and differ in the buffers. Those of version 0 are
//! the server's own, and so small that nothing behind a request is read and nothing waits behind a
//! result. Those of version 1 are the memory that a controller gives with HELLO: many requests are
//! read at once, and their results are sent together.

use core::mem::MaybeUninit;
use core::ptr::NonNull;

use farcall_abi::log::{LOG_CAPACITY, LogHead, Record};
use farcall_abi::upgrade::Progress;
use farcall_abi::wire::{LOG_OFFSET, MAX_ERRNO, MAX_REF, REQUEST_SIZE, RESULT_SIZE, Request};

use crate::serve::{HangUp, Server, entries};
use crate::sys::{self, Direction, EAGAIN, ECANCELED, EINTR, PollFd, Transferred};

/// Requests for which version 1's input buffer has room: as many as a REF reaches back.
const AHEAD: usize = MAX_REF as usize;
/// Bytes of version 1's input buffer.
const INPUT: usize = AHEAD * REQUEST_SIZE;
/// Bytes of version 1's output buffer: a page of data fits in among results.
pub const OUTPUT: usize = LOG_OFFSET - INPUT;

const _: () = {
    assert!(RESULT_SIZE <= REQUEST_SIZE);
    assert!(OUTPUT >= 4096 + AHEAD * RESULT_SIZE);
    assert!(MAX_REF < LOG_CAPACITY);
};

/// Where the bytes of a stream of version 0 wait: one request, and room for one result.
pub type Buffers = [[MaybeUninit<u8>; REQUEST_SIZE]; 2];

/// The record of call `number`, which is one of the last ones or the next.
///
/// Without memory from a controller it is nowhere.
fn record_of(log: &LogHead, number: u64) -> *mut Record {
    let records = log.memory as usize + LOG_OFFSET;
    (records as *mut Record).wrapping_add((number % LOG_CAPACITY) as usize)
}

/// The result of the call `distance` back; ECANCELED if there was none on this connection.
#[inline(never)]
pub fn earlier(log: &LogHead, distance: u64) -> i64 {
    let LogHead { calls, first, .. } = *log;
    if distance.wrapping_sub(1) >= MAX_REF.min(calls - first) {
        return ECANCELED;
    }
    // SAFETY: only version 1 asks, for which there is memory; the call has its record there, since
    // fewer have come after it than there are records.
    unsafe { (*record_of(log, calls - distance)).result }
}

/// Whether a result says that its call failed or was not executed.
pub fn is_error(result: i64) -> bool {
    (-MAX_ERRNO..0).contains(&result)
}

impl Server {
    /// A stream of this version begins.
    #[inline(never)]
    pub fn begin(&mut self, version: u32) {
        self.state.stream = Progress { version, ..Progress::default() };
        self.state.log.first = self.state.log.calls;
    }

    /// The call that was being executed is over: what it made is entered in the registry, it has
    /// its place in the log, and then it counts as executed.
    #[inline(never)]
    pub fn record(&mut self, result: i64) {
        self.prepared.enter(&self.state.log, result);
        if self.state.log.memory != 0 {
            let record = Record { request: self.state.request, result };
            // SAFETY: there is room for the records, as the controller promises that gave the
            // memory, and nobody has a reference to any.
            unsafe { record_of(&self.state.log, self.state.log.calls).write(record) };
        }
        self.state.log.calls += 1;
    }

    /// The input buffer and its size. Behind it lies the output buffer.
    ///
    /// Both are reached by pointers only: version 1's are memory that the controller could change.
    #[inline(never)]
    pub fn buffers(&mut self) -> (*mut u8, usize) {
        if self.state.stream.version == 0 {
            ((&raw mut self.buffers).cast(), REQUEST_SIZE)
        } else {
            (self.state.log.memory as *mut u8, INPUT)
        }
    }

    /// Reads once. An error, and also 0 for the end of input, is the kernel's.
    pub fn read(&mut self) -> i64 {
        let (input, size) = self.buffers();
        let start = self.state.stream.start;
        let left = self.state.stream.end - start;
        if start != 0 {
            // SAFETY: these bytes are in the buffer. They are less than a request, and a whole one
            // was taken from before `start`: the two ranges do not overlap.
            unsafe { core::ptr::copy_nonoverlapping(input.wrapping_add(start), input, left) };
        }
        let (to, room) = (input.wrapping_add(left) as u64, size - left);
        // SAFETY: the buffer has as much room behind what is left, and nobody has a reference to it.
        let n = unsafe { sys::read(self.state.watched.input.fd, to, room) };
        self.state.stream.start = 0;
        self.state.stream.end = left + n.max(0) as usize;
        n
    }

    /// Takes the next request, if the whole of it is here.
    pub fn next(&mut self) -> bool {
        let (input, _) = self.buffers();
        let start = self.state.stream.start;
        if self.state.stream.end - start < REQUEST_SIZE {
            return false;
        }
        self.state.stream.start += REQUEST_SIZE;
        let from = input.wrapping_add(start).cast::<Request>();
        // SAFETY: that many bytes of `input` are there from `start` on, and any bytes are a request.
        self.state.request = unsafe { from.read_unaligned() };
        true
    }

    /// Takes up to `len` bytes of payload that have been read ahead: where they are, until the next
    /// read, and how many.
    pub fn payload(&mut self, len: u64) -> (u64, u64) {
        let (input, _) = self.buffers();
        let Progress { start, end, .. } = self.state.stream;
        let here = len.min((end - start) as u64);
        self.state.stream.start += here as usize;
        (input as u64 + start as u64, here)
    }

    /// A call has this result: it is remembered, and put behind those that wait to be sent.
    pub fn finish(&mut self, result: i64) -> Result<(), HangUp> {
        self.record(result);
        self.push(result)
    }

    /// The same, and sent at once: what comes next leaves by another way.
    pub fn finish_now(&mut self, result: i64) -> Result<(), HangUp> {
        self.finish(result)?;
        self.flush()
    }

    /// Puts a number behind what waits to be sent.
    #[inline(never)]
    pub fn push(&mut self, number: i64) -> Result<(), HangUp> {
        let to = self.room(RESULT_SIZE)?;
        // SAFETY: there is room for as many bytes.
        unsafe { to.cast::<i64>().write_unaligned(number) };
        Ok(())
    }

    /// Room for `len` more bytes to be sent, of which there are no more than the output buffer has.
    #[inline(never)]
    pub fn room(&mut self, len: usize) -> Result<NonNull<u8>, HangUp> {
        let (input, size) = self.buffers();
        let most = if self.state.stream.version == 0 { REQUEST_SIZE } else { OUTPUT };
        if self.state.stream.filled + len > most {
            self.flush()?;
        }
        let at = size + self.state.stream.filled;
        self.state.stream.filled += len;
        NonNull::new(input.wrapping_add(at)).ok_or(HangUp)
    }

    /// Sends what waits.
    #[inline(never)]
    pub fn flush(&mut self) -> Result<(), HangUp> {
        let (input, size) = self.buffers();
        let len = core::mem::take(&mut self.state.stream.filled);
        let [_, others @ .., _] = entries(&mut self.state.watched);
        let end = &mut self.state.output;
        // SAFETY: a write only reads memory.
        unsafe { transfer(end, Direction::Write, others, input as u64 + size as u64, len as u64) }
    }
}

/// Moves all of the bytes, or the connection is over.
///
/// # Safety
///
/// As for [`sys::transfer`].
#[inline(always)]
pub unsafe fn transfer(
    end: &mut PollFd,
    direction: Direction,
    others: &mut [PollFd],
    address: u64,
    len: u64,
) -> Result<(), HangUp> {
    // SAFETY: the caller's promise.
    match unsafe { sys::transfer(end, direction, others, address, len) } {
        Transferred { left: 0, .. } => Ok(()),
        _ => Err(HangUp),
    }
}

/// Whether a read has to be tried again later.
pub fn is_later(n: i64) -> bool {
    n == EINTR || n == EAGAIN
}
