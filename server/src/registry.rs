//! The registry: what is entered with the next call, and entering it. See `farcall_abi::registry`.
//!
//! Its memory is touched by the kernel alone, as all that a controller names: a controller that
//! takes it away loses its names, not its server.

use farcall_abi::log::LogHead;
use farcall_abi::registry::{ENTRY_SIZE, Entry};
use farcall_abi::wire::Request;

use crate::copy::{load, whole};
use crate::stream::is_error;
use crate::sys::{self, EINVAL};

/// What the last KEEP said. All zeros: nothing is entered, and nothing leaves.
#[repr(C)]
pub struct Prepared {
    /// The number of the call that it is about.
    call: u64,
    /// KEEP's arguments, all within the registry.
    args: [u64; 6],
}

/// Where entry `slot` is.
fn entry(log: &LogHead, slot: u64) -> u64 {
    log.registry.wrapping_add(slot.wrapping_mul(ENTRY_SIZE as u64))
}

/// Changes the value and the state of an entry.
#[inline(never)]
fn set(log: &LogHead, slot: u64, value: i64, state: u64) {
    let head = [value as u64, state];
    // SAFETY: the registry is where the controller has said.
    unsafe { sys::copy(entry(log, slot), head.as_ptr() as u64, size_of_val(&head) as u64) };
}

impl Prepared {
    /// The operation REGISTRY: where it was, or 0.
    pub fn enter_registry(&mut self, log: &mut LogHead, request: &Request) -> i64 {
        // It was checked against the room in the one before.
        self.forget();
        let [address, entries, ..] = request.args;
        log.capacity = entries;
        core::mem::replace(&mut log.registry, address) as i64
    }

    /// The operation KEEP.
    #[inline(never)]
    pub fn keep(&mut self, log: &mut LogHead, request: &Request) -> i64 {
        let [slot, src, len, _, count, clear] = request.args;
        let size = len.div_ceil(ENTRY_SIZE as u64);
        let end = slot.saturating_add(size);
        if end > log.capacity || count > size || clear > log.capacity {
            return EINVAL;
        }
        // SAFETY: the registry is where the controller has said.
        let error = whole(unsafe { sys::copy(entry(log, slot), src, len) }, len);
        if error != 0 {
            return error;
        }
        log.used = log.used.max(end);
        *self = Self { call: log.calls + 1, args: request.args };
        0
    }

    /// It is not about the next call any more.
    pub fn forget(&mut self) {
        self.call = 0;
    }

    /// The call that is being executed has this result: if it is the one that KEEP was about, its
    /// resource is entered, or leaves.
    #[inline(always)]
    pub fn enter(&self, log: &LogHead, result: i64) {
        // Few are.
        if self.call == log.calls {
            self.enter_result(log, result);
        }
    }

    #[inline(never)]
    fn enter_result(&self, log: &LogHead, result: i64) {
        if is_error(result) {
            return;
        }
        let [slot, _, _, from, count, clear] = self.args;
        for i in 0..count {
            let value = if from == 0 { result } else { load(from.wrapping_add(4 * i), 4) };
            set(log, slot + i, value, Entry::TAKEN);
        }
        if clear != 0 {
            set(log, clear - 1, 0, Entry::FREE);
        }
    }
}
