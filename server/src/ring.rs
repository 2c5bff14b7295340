//! The server's side of the ring: calls that a controller hands over in shared memory.
//!
//! ```text
//!            a call                          nothing for so many looks
//!   ┌──── executing ◀──── looking ──────────────────────────────────▶ asleep, in ppoll
//!   │         every LOOK calls                                            │
//!   └──▶ a glance at the connection and the listener ◀────────────────────┘ bell, connection, …
//! ```
//! While it looks it uses its processor; asleep it uses nothing. How long it may look is the
//! controller's to say, which knows whether there is another processor, and what that is worth.

use core::hint::spin_loop;

use farcall_abi::ring::{ARENA_OFFSET, RING_MAGIC, Ring, SHARP, SOURCE_SIGNAL};
use farcall_abi::upgrade::Queue;
use farcall_abi::wire::{STREAM_VERSION, Word};

use crate::arch;
use crate::copy::whole;
use crate::serve::Server;
use crate::start::{NO_HANDLERS, handle_interrupt};
use crate::sys::{self, EFAULT, EINTR, EINVAL, Patience, SI_QUEUE, SigInfo};

/// After so many calls in a row the server looks at its descriptors, even if there are more: what
/// that costs is then less than a hundredth of what the calls do.
const LOOK: u32 = 128;

/// The signals that interrupt: make the call that is meant return EINTR, unless it has returned by
/// itself.
///
/// A call that blocks comes here by the signal, and the kernel would go on with it afterwards, or has
/// already made it return EINTR. A call that is about to be made would go on too, and block: wherever
/// the thread is between the last look at `cancel` and the call, it is turned back
/// instead.
pub extern "C" fn interrupt(_: i32, info: *const SigInfo, context: *mut u8) {
    // SAFETY: the kernel passes both with SA_SIGINFO.
    let info = unsafe { &*info };
    if info.code == SI_QUEUE {
        count_signal(info.value);
    }
    // SAFETY: as above.
    unsafe { arch::turn_back(context) };
}

/// Counts a signal in the ring at that address, for a controller that waits for that.
fn count_signal(address: usize) {
    // A controller that was stopped may name a ring that is gone: the one after it unmaps it.
    let mut magic = 0u64;
    let size = size_of_val(&magic);
    // SAFETY: into a number of this function's.
    let copied = unsafe { sys::copy(&raw mut magic as u64, address as u64, size as u64) };
    if copied == size as i64 && magic == RING_MAGIC && address.is_multiple_of(64) {
        // SAFETY: who may send this signal may end the process, and promises with SI_QUEUE that its value
        // is where a ring is or was; what is there begins as a ring does.
        unsafe { &*(address as *const Ring) }.count_signal();
    }
}

impl Server {
    /// Executes calls of the ring as long as more come. Says how long the descriptors may be waited
    /// for then.
    pub fn serve_ring(&mut self) -> Patience {
        if !self.has_ring() {
            return Patience::Endless;
        }
        // SAFETY: `enter_ring` has found it there, made of atomics, for which any bytes are valid.
        // It stays there, unless the controller takes it away from its own server.
        let ring = unsafe { &*(self.state.ring.address as *const Ring) };
        ring.wake();
        let patience = ring.patience();
        let mut looks = 0;
        let mut calls = 0;
        while looks <= patience {
            let next = self.state.ring.next;
            if ring.take(next, &mut self.state.request) {
                let word = self.state.request.word;
                let mut withdrawn = false;
                if word & Word::FLUSH == 0 {
                    ring.begin_quick(next);
                } else {
                    // It may take long.
                    self.wake_controller(ring);
                    if !ring.begin(next) && ring.hold(next) {
                        return Patience::Endless;
                    }
                    ring.wake();
                    if self.state.source != 0
                        && let Some(signals) = ring.undelivered()
                    {
                        sys::drain(self.source());
                        ring.delivered(signals);
                    }
                    withdrawn = !ring.claim(next, word);
                }
                self.cancel = ring.cancel();
                let result = if withdrawn { EINTR } else { self.evaluate(STREAM_VERSION) };
                self.cancel = core::ptr::null();
                ring.complete(next, word, result);
                // Nobody sees the log before this thread tells of it.
                self.record(result);
                self.state.ring.next = next + 1;
                looks = 0;
                calls += 1;
                if calls == LOOK {
                    self.wake_controller(ring);
                    return Patience::None;
                }
            } else {
                if looks == 0 {
                    self.wake_controller(ring);
                }
                looks += 1;
                if looks > SHARP {
                    spin_loop();
                }
            }
        }
        if ring.sleep(self.state.ring.next) { Patience::Endless } else { Patience::None }
    }

    /// Wakes a controller that waits for what has been completed.
    fn wake_controller(&self, ring: &Ring) {
        if ring.controller_waits() {
            sys::ring(self.state.ring.bell);
        }
    }

    pub fn has_ring(&self) -> bool {
        self.state.watched.bell.fd >= 0
    }

    /// The operation RING: the address of the ring before, or 0.
    pub fn enter_ring(&mut self) -> i64 {
        let [address, bells, source, has_source, ..] = self.state.request.args;
        let size = ARENA_OFFSET as u64;
        if self.state.log.memory == 0 {
            // Nowhere to remember results that others refer to.
            return EINVAL;
        }
        if !address.is_multiple_of(64) {
            return EFAULT;
        }
        // It can be read and written.
        // SAFETY: memory that the controller names is written as it is.
        let error = whole(unsafe { sys::copy(address, address, size) }, size);
        if error != 0 {
            return error;
        }
        let source = if has_source == 0 { -1 } else { source as i32 };
        if has_source != 0 {
            let error = sys::arm(source);
            if error != 0 {
                return error;
            }
            // An image that was entered by a program, or by one that knew of no source, has none.
            handle_interrupt(0, NO_HANDLERS, SOURCE_SIGNAL);
        }
        self.leave_ring();
        self.state.source = (source + 1) as u32;
        let before = self.state.ring.address;
        let bell = (bells >> 32) as i32;
        self.state.ring = Queue { address, bell, ..Queue::default() };
        self.state.watched.bell.fd = bells as i32;
        before as i64
    }

    /// Leaves the ring: what has not been executed in it never will be.
    pub fn leave_ring(&mut self) {
        if self.has_ring() {
            sys::close(self.state.watched.bell.fd);
            sys::close(self.state.ring.bell);
            self.state.watched.bell.fd = -1;
            self.disarm();
            sys::close(self.source());
            self.state.source = 0;
        }
    }

    /// No signal comes from the ring's controller from here on, whoever has duplicates of the source.
    pub fn disarm(&self) {
        if self.state.source != 0 {
            sys::disarm(self.source());
        }
    }

    /// What interrupts calls of the ring; negative if nothing does.
    fn source(&self) -> i32 {
        self.state.source as i32 - 1
    }
}
