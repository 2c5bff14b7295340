//! What calls are made in, one tenure after the other.
//!
//! When another controller has held the process between two links of this one's, whatever this one knew
//! of it may be wrong: what is open and mapped where, what has names, which memory is free for buffers.
//! So a process goes on with another [`Task`] then, that has all of this anew, and whose connection makes
//! calls of its own tenure only. Who was in the middle of several calls has borrowed the earlier one,
//! and its next call is refused: nothing that was found out or made before is used after.
//!
//! ```text
//!   task ──────▶ task ──────▶ task, the present one
//!     ▲            another controller has held the process before it
//!     └─ calls that began then, which are refused
//! ```

use std::sync::OnceLock;

use crate::calls::Task;

/// The tasks of a process, of which the last one is the present.
pub(super) struct Tenures {
    task: Task,
    next: OnceLock<Box<Self>>,
}

impl Tenures {
    pub(super) fn new(task: Task) -> Self {
        Self { task, next: OnceLock::new() }
    }

    /// What calls are made in that begin now, and its number.
    pub(super) fn present(&self) -> (&Task, usize) {
        let (last, number) = self.up_to(usize::MAX);
        (&last.task, number)
    }

    /// The task with that number.
    pub(super) fn at(&self, number: usize) -> &Task {
        &self.up_to(number).0.task
    }

    /// Another tenure begins. Only one that holds [`Inner::reconnecting`](super::Inner) does this.
    pub(super) fn begin(&self, task: Task) {
        let _ = self.up_to(usize::MAX).0.next.set(Box::new(Self::new(task)));
    }

    fn up_to(&self, most: usize) -> (&Self, usize) {
        let (mut last, mut number) = (self, 0);
        while number < most
            && let Some(next) = last.next.get()
        {
            (last, number) = (next, number + 1);
        }
        (last, number)
    }
}

impl Drop for Tenures {
    fn drop(&mut self) {
        // One by one: there may be more of them than a stack has room for.
        let mut next = self.next.take();
        while let Some(mut tenure) = next {
            next = tenure.next.take();
        }
    }
}
