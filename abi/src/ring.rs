//! The ring: calls in memory that controller and server share.
//!
//! A call is one record, a cache line. Its request, its result and the mark that says which of the
//! two is there travel together: handing a call over, or its result back, moves one cache line
//! between two processors.
//!
//! ```text
//!             submit              take                  complete             result
//! free ───────────────▶ asked ─────────▶ being executed ─────────▶ answered ────────▶ free
//!         (controller)          (server)                  (server)        (controller)
//! ```
//!
//! Call `n` of a ring uses record `n % CAPACITY`. The mark counts how often that record was used:
//! `2k + 1` when its `k`th call (from 0) is asked, `2k + 2` when it is answered, modulo 2¹⁶, and
//! so that the zeros of fresh memory are the mark of a call that nobody waits for. So neither side needs an index of the other's to see that it is its turn.
//!
//! # Memory ordering
//!
//! *Handing over*: the arguments are stored before the mark (Release), and loaded after the mark
//! was seen (Acquire). The same the other way round with the result. Whoever sees a mark sees what
//! it stands for.
//!
//! *Sleeping* is Dekker's problem. A server that wants to sleep stores `asleep` and then looks for
//! a mark once more; a controller that submits stores the mark and then looks at `asleep`. Each
//! stores one place and loads the other one. With Release and Acquire alone both loads may be
//! executed before either store is visible: the server sleeps on a call that is there, and the
//! controller has seen it awake and does not ring the bell. A fence (SeqCst) between store and load
//! on *both* sides forbids that: one of the two fences comes first in their total order, and the
//! side with the other one sees the store before it. `waiting` of the controller is the same with
//! the parts exchanged. Nothing weaker than SeqCst orders a store before a later load.
//!
//! *Interrupting*, see [`Ring::begin`], is the same problem a third time: `running` against
//! `cancel`.
//!
//! *Withdrawing* a call that the server has not begun, see [`Ring::withdraw`], is decided by one
//! word: server and controller both change it from what was submitted, and one of them comes first.
//!
//! The models in `models/` try all of this out, and fail where one of these is weaker.
//!
//! Nothing here is trusted by the server: it takes a copy of a record before it looks at it, and
//! whatever a controller writes into this memory, the server executes some calls and stays inside
//! of the records.

#[cfg(not(loom))]
use core::sync::atomic::{AtomicU32, AtomicU64, Ordering, fence};
#[cfg(loom)]
use loom::sync::atomic::{AtomicU32, AtomicU64, Ordering, fence};

use super::wire::{Request, Word};

/// How many records a ring has.
#[cfg(not(loom))]
pub const CAPACITY: usize = 128;
/// Few: a model walks through all interleavings.
#[cfg(loom)]
pub const CAPACITY: usize = 2;

/// The first word of a ring's memory.
pub const RING_MAGIC: u64 = u64::from_le_bytes(*b"fcring\0\x01");

/// The most looks that a server takes before it sleeps, whatever it is told: some milliseconds.
pub const MAX_PATIENCE: u32 = 1 << 16;

/// So many looks are made without a pause between them: what comes at once is seen at once.
pub const SHARP: u32 = 200;

/// The signal that interrupts a call: SIGIO, from what arrives at the source that RING has named.
pub const SOURCE_SIGNAL: u32 = 29;

/// The same of a controller, or a server, that knows of no source. It is sent with SI_QUEUE and the
/// ring's address in the server as its value.
pub const INTERRUPT_SIGNAL: u32 = 64;

/// Where the arena begins: behind the records.
pub const ARENA_OFFSET: usize = 4096 + CAPACITY * 64;

/// The mark is in the bits of a word that are zero in every version of the stream.
const MARK: u32 = 48;

/// Set by the controller: the call is not to be executed. Also zero in every version of the stream.
const WITHDRAWN: u64 = 1 << 47;

/// Set by the server: it has begun the call, which can't be withdrawn any more.
const CLAIMED: u64 = 1 << 46;

/// How the signals of an interruption are sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sent {
    /// By what is written to the source. The server sees to it that they have been delivered.
    BySource,
    /// To the process. The controller waits until the server has counted them.
    ToBeCounted,
}

/// What lies at the start of the shared memory. Behind it is the arena.
#[repr(C, align(64))]
pub struct Ring {
    /// Written before the server maps it, for whoever looks at the memory.
    fixed: Fixed,
    /// Written by the controller alone.
    controller: Controller,
    /// Written by the server alone, as is the next one.
    server: Server,
    progress: Progress,
    #[cfg(not(loom))]
    _rest_of_the_page: [AtomicU64; 480],
    records: [Record; CAPACITY],
}

/// What the memory is.
#[repr(C, align(64))]
struct Fixed {
    /// [`RING_MAGIC`].
    magic: AtomicU64,
    /// [`CAPACITY`].
    capacity: AtomicU64,
    /// [`ARENA_OFFSET`].
    arena: AtomicU64,
    /// The size of all of it, in bytes.
    size: AtomicU64,
}

#[repr(C, align(64))]
struct Controller {
    /// The controller sleeps until its bell rings.
    waiting: AtomicU32,
    /// How many signals have been sent, or are about to be. Where there is no source: how many will have
    /// been delivered when none is on its way.
    signals: AtomicU32,
    /// How often the server is to look for a call before it sleeps.
    patience: AtomicU32,
    /// One more than the number of the call to be interrupted; 0: none is.
    cancel: AtomicU64,
}

#[repr(C, align(64))]
struct Server {
    /// The server sleeps until its bell rings.
    asleep: AtomicU32,
}

/// Not beside `asleep`, which the controller looks at after every call: this changes with every call.
#[repr(C, align(64))]
struct Progress {
    /// How many signals are known to have been delivered to the server.
    delivered: AtomicU32,
    /// One more than the number of the call that is being executed; 0: none is.
    running: AtomicU64,
}

/// One call.
#[repr(C, align(64))]
struct Record {
    /// The request's word, and the mark.
    word: AtomicU64,
    args: [AtomicU64; 6],
    result: AtomicU64,
}

#[cfg(not(loom))]
const _: () = {
    assert!(size_of::<Record>() == 64);
    assert!(core::mem::offset_of!(Ring, controller) == 64);
    assert!(core::mem::offset_of!(Ring, server) == 128);
    assert!(core::mem::offset_of!(Ring, progress) == 192);
    assert!(core::mem::offset_of!(Ring, records) == 4096);
    assert!(size_of::<Ring>() == ARENA_OFFSET);
    assert!(ARENA_OFFSET.is_multiple_of(4096) && CAPACITY.is_power_of_two());
};

/// The mark of call `index` when it is asked. When it is answered it is one more.
const fn asked(index: u64) -> u64 {
    (index / CAPACITY as u64 * 2 + 1) & 0xffff
}

const fn answered(index: u64) -> u64 {
    (asked(index) + 1) & 0xffff
}

/// Fresh memory, in a model.
#[cfg(loom)]
impl Default for Ring {
    fn default() -> Self {
        use core::array::from_fn;
        let u32 = || AtomicU32::new(0);
        let u64 = || AtomicU64::new(0);
        Self {
            fixed: Fixed { magic: u64(), capacity: u64(), arena: u64(), size: u64() },
            controller: Controller {
                waiting: u32(),
                signals: u32(),
                patience: u32(),
                cancel: u64(),
            },
            server: Server { asleep: u32() },
            progress: Progress { delivered: u32(), running: u64() },
            records: from_fn(|_| Record { word: u64(), args: from_fn(|_| u64()), result: u64() }),
        }
    }
}

#[cfg(loom)]
impl Ring {
    /// What the image compares [`Ring::cancel`] with, immediately before it makes call `index`.
    #[must_use]
    pub fn is_canceled(&self, index: u64) -> bool {
        self.controller.cancel.load(Ordering::Relaxed) == index + 1
    }
}

impl Ring {
    fn record(&self, index: u64) -> &Record {
        let [first, ..] = &self.records;
        self.records.get(index as usize % CAPACITY).unwrap_or(first)
    }

    /// Says what the memory is, of which there are `size` bytes.
    pub fn describe(&self, size: u64) {
        self.fixed.magic.store(RING_MAGIC, Ordering::Relaxed);
        self.fixed.capacity.store(CAPACITY as u64, Ordering::Relaxed);
        self.fixed.arena.store(ARENA_OFFSET as u64, Ordering::Relaxed);
        self.fixed.size.store(size, Ordering::Relaxed);
    }

    // What the controller does.

    /// Hands over call `index`. Its record's earlier call has been answered and the answer taken.
    pub fn submit(&self, index: u64, request: &Request) {
        let record = self.record(index);
        for (to, from) in record.args.iter().zip(request.args) {
            to.store(from, Ordering::Relaxed);
        }
        record.word.store(request.word | asked(index) << MARK, Ordering::Release);
    }

    /// Gets the record of call `index`, which is to be the next one, ready while the controller waits
    /// anyway: the server was the last to write to it, so that the first store has to wait for its
    /// cache line.
    pub fn prepare(&self, index: u64) {
        self.record(index).result.store(0, Ordering::Relaxed);
    }

    /// Whether the server is to be woken, after calls have been handed over.
    pub fn server_sleeps(&self) -> bool {
        fence(Ordering::SeqCst);
        self.server.asleep.load(Ordering::Relaxed) != 0
    }

    /// Withdraws call `index`, which has been submitted. True: the server never executes it, and its
    /// result is EINTR when the server comes to it. False: the server has begun it, or it is not marked
    /// with FLUSH: the server begins such a call without looking again.
    pub fn withdraw(&self, index: u64) -> bool {
        let place = &self.record(index).word;
        let word = place.load(Ordering::Relaxed);
        let waits = word >> MARK == asked(index) && word & Word::FLUSH != 0 && word & CLAIMED == 0;
        let withdrawn = word | WITHDRAWN;
        waits
            && place.compare_exchange(word, withdrawn, Ordering::Relaxed, Ordering::Relaxed).is_ok()
    }

    /// The result of call `index`, once it is there.
    pub fn result(&self, index: u64) -> Option<i64> {
        let record = self.record(index);
        if record.word.load(Ordering::Acquire) >> MARK != answered(index) {
            return None;
        }
        Some(record.result.load(Ordering::Relaxed) as i64)
    }

    /// The controller wants to sleep until call `index` has been answered. False: it has been.
    pub fn wait_for(&self, index: u64) -> bool {
        self.controller.waiting.store(1, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        self.result(index).is_none()
    }

    /// Tells the server how often to look for a call before it sleeps.
    pub fn set_patience(&self, looks: u32) {
        // Stored only when it changes: the server reads it whenever it has nothing to do.
        if self.controller.patience.load(Ordering::Relaxed) != looks {
            self.controller.patience.store(looks, Ordering::Relaxed);
        }
    }

    /// The controller does not sleep any more.
    pub fn awake(&self) {
        // Stored only when it changes, as for the patience.
        if self.controller.waiting.load(Ordering::Relaxed) != 0 {
            self.controller.waiting.store(0, Ordering::Relaxed);
        }
    }

    /// Asks for call `index` to be interrupted. If it says that the call is being executed, a signal
    /// is to be sent, before [`Ring::interrupted`].
    pub fn interrupt(&self, index: u64, how: Sent) -> bool {
        // Whoever sees it sees that signals were sent for an earlier one.
        self.controller.cancel.store(index + 1, Ordering::Release);
        fence(Ordering::SeqCst);
        let runs = self.progress.running.load(Ordering::Relaxed) == index + 1
            && self.result(index).is_none();
        if runs {
            // More than these arrive if the process has blocked some that were given up.
            let before = if how == Sent::ToBeCounted && self.is_heard() {
                &self.progress.delivered
            } else {
                &self.controller.signals
            };
            let signals = before.load(Ordering::Relaxed).wrapping_add(1);
            self.controller.signals.store(signals, Ordering::Relaxed);
        }
        runs
    }

    /// Whether the server has counted all signals that were sent.
    pub fn is_heard(&self) -> bool {
        let delivered = self.progress.delivered.load(Ordering::Relaxed);
        let signals = self.controller.signals.load(Ordering::Relaxed);
        delivered.wrapping_sub(signals).cast_signed() >= 0
    }

    /// The call to be interrupted has been answered, and all signals for it have been sent; those that
    /// have not been counted by now are not waited for. The server may wait for this: it is to be woken
    /// if [`Ring::server_sleeps`].
    pub fn interrupted(&self, how: Sent) {
        if how == Sent::ToBeCounted {
            let delivered = self.progress.delivered.load(Ordering::Relaxed);
            self.controller.signals.store(delivered, Ordering::Relaxed);
        }
        self.controller.cancel.store(0, Ordering::Release);
    }

    // What the server does. The larger ones are called in one place, and make the image smaller and its
    // loop faster when they are inlined there.

    /// How often to look for a call before sleeping.
    pub fn patience(&self) -> u32 {
        self.controller.patience.load(Ordering::Relaxed).min(MAX_PATIENCE)
    }

    /// Copies call `index`, if it has been handed over, to where nobody else changes it.
    #[inline]
    pub fn take(&self, index: u64, request: &mut Request) -> bool {
        let record = self.record(index);
        let word = record.word.load(Ordering::Acquire);
        if word >> MARK != asked(index) {
            return false;
        }
        request.word = word & !(u64::MAX << MARK);
        // The server's loop is compiled to be small: this stays six loads where a loop would be one.
        let [first, second, third, fourth, fifth, sixth] = &record.args;
        request.args[0] = first.load(Ordering::Relaxed);
        request.args[1] = second.load(Ordering::Relaxed);
        request.args[2] = third.load(Ordering::Relaxed);
        request.args[3] = fourth.load(Ordering::Relaxed);
        request.args[4] = fifth.load(Ordering::Relaxed);
        request.args[5] = sixth.load(Ordering::Relaxed);
        true
    }

    /// Call `index` has this result. The word is the request's.
    pub fn complete(&self, index: u64, word: u64, result: i64) {
        let record = self.record(index);
        self.progress.running.store(0, Ordering::Relaxed);
        record.result.store(result as u64, Ordering::Relaxed);
        record.word.store(word | answered(index) << MARK, Ordering::Release);
    }

    /// Whether the controller is to be woken, after calls have been completed.
    pub fn controller_waits(&self) -> bool {
        fence(Ordering::SeqCst);
        self.controller.waiting.load(Ordering::Relaxed) != 0
    }

    /// The server wants to sleep until call `index` is handed over. False: it has been.
    #[inline]
    pub fn sleep(&self, index: u64) -> bool {
        self.server.asleep.store(1, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        let asleep = self.record(index).word.load(Ordering::Relaxed) >> MARK != asked(index);
        if !asleep {
            self.wake();
        }
        asleep
    }

    /// The server does not sleep any more.
    pub fn wake(&self) {
        self.server.asleep.store(0, Ordering::Relaxed);
    }

    /// Call `index` is about to be executed, which is over soon.
    pub fn begin_quick(&self, index: u64) {
        self.progress.running.store(index + 1, Ordering::Relaxed);
    }

    /// The server has to wait before it can begin call `index`. False: not any more.
    #[inline]
    pub fn hold(&self, index: u64) -> bool {
        self.server.asleep.store(1, Ordering::Relaxed);
        // It has a fence.
        let held = !self.begin(index);
        if held {
            // What is executed meanwhile came on the stream, and no signal means it.
            self.progress.running.store(0, Ordering::Relaxed);
        }
        held
    }

    /// Call `index`, which can be interrupted, is about to be executed. False: not yet, because a
    /// signal that is meant for an earlier one may still be sent.
    ///
    /// Whether this one is to be interrupted is looked at later, where no signal can be missed.
    ///
    /// The server has stored `running` before it looks at `cancel`, the controller `cancel` before
    /// it looks at `running`. So either the controller sees that its call is over, and sends
    /// nothing; or the server sees that there is a signal to be waited for, until the controller,
    /// which knows whether it arrives at all, says that it is not.
    pub fn begin(&self, index: u64) -> bool {
        self.begin_quick(index);
        fence(Ordering::SeqCst);
        let cancel = self.controller.cancel.load(Ordering::Acquire);
        cancel == 0 || cancel > index
    }

    /// The server begins call `index`, whose word is the request's, and has said that it runs. False:
    /// the controller has withdrawn it.
    ///
    /// Who finds it claimed, and then has a fence, as [`Ring::interrupt`] does, sees that it runs: there
    /// is a fence in [`Ring::begin`] too.
    #[inline]
    pub fn claim(&self, index: u64, word: u64) -> bool {
        let asked = word | asked(index) << MARK;
        let place = &self.record(index).word;
        word & WITHDRAWN == 0
            && place
                .compare_exchange(asked, asked | CLAIMED, Ordering::Relaxed, Ordering::Relaxed)
                .is_ok()
    }

    /// Where it says which call is to be interrupted.
    #[cfg(not(loom))]
    pub fn cancel(&self) -> *const u64 {
        (&raw const self.controller.cancel).cast()
    }

    /// A signal was delivered to the server that the controller waits for: for its handler.
    pub fn count_signal(&self) {
        let delivered = self.progress.delivered.load(Ordering::Relaxed);
        self.progress.delivered.store(delivered.wrapping_add(1), Ordering::Relaxed);
    }

    /// How many signals have been sent, if it is not known that all of them have been delivered. For a
    /// server that may [`Ring::begin`] a call: before it does, it makes a system call of its own, in
    /// which those are delivered that were sent, and then calls [`Ring::delivered`].
    ///
    /// The signals of an interruption are sent before it is [`Ring::interrupted`], and pending from
    /// then on. But a thread that runs on another processor can see what was written before it is told
    /// of its signal.
    #[inline]
    pub fn undelivered(&self) -> Option<u32> {
        // Behind the load of `cancel`, which acquires.
        let signals = self.controller.signals.load(Ordering::Relaxed);
        (signals != self.progress.delivered.load(Ordering::Relaxed)).then_some(signals)
    }

    /// So many signals have been delivered.
    pub fn delivered(&self, signals: u32) {
        self.progress.delivered.store(signals, Ordering::Relaxed);
    }
}
