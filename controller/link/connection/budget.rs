//! The budget of a connection: how much may be under way before those who can wait do.
//!
//! What is counted is a call from being submitted to being completed, so also what waits in the
//! queue of a connection that is down. When too much is under way the budget *closes*, and it opens
//! again when half of it is free. [`Budget::ready`] waits while it is closed; submitting never does.
//!
//! Whoever waits holds nothing: no place that others would have to wait for. A future that is woken
//! and not polled then, as in a `select!` that goes on with another branch, delays nobody. The price
//! is that each of those who were let in may go beyond the limit by one call of its own. They are
//! woken in the order in which they began to wait.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use tokio::sync::Notify;

use crate::proto::stream::MAX_DATA;
use crate::proto::{Call, DataLen};

/// Bytes under way at which the budget closes: enough to fill a path of 1 Gbit/s and 100 ms, which
/// holds 12.5 MB.
const LIMIT: usize = 16 << 20;

/// Bytes at which it opens again: far enough below that waking all who wait is rare, and enough to
/// keep the path busy until they have submitted.
const LOW: usize = LIMIT / 2;

/// What a call counts besides its data: about what it takes with its batch, its reply and its
/// completion. So [`LIMIT`] is at most 16,384 calls.
const CALL: usize = 1024;

/// In the lowest bit of the word; the bytes under way are above it.
const CLOSED: usize = 1;

#[derive(Default)]
pub(super) struct Budget {
    /// How much is under way, and whether that is too much: in one word, so that whoever opens it
    /// has seen what closed it.
    word: AtomicUsize,
    opened: Notify,
}

/// A share of the budget, until it is dropped.
pub(crate) struct Permit {
    budget: Arc<Budget>,
    bytes: usize,
}

impl Budget {
    /// Returns when the budget is open.
    pub(super) async fn ready(&self) {
        while self.is_closed() {
            let opened = self.opened.notified();
            // It may have been opened before that began to listen.
            if self.is_closed() {
                opened.await;
            }
        }
    }

    fn is_closed(&self) -> bool {
        self.word.load(Ordering::Acquire) & CLOSED != 0
    }

    /// A permit for so many bytes, whether or not the budget is open.
    pub(super) fn acquire(self: &Arc<Self>, bytes: usize) -> Permit {
        self.charge(bytes);
        Permit { budget: self.clone(), bytes }
    }

    /// The same for who gives it back by [`Budget::release`].
    pub(super) fn charge(&self, bytes: usize) {
        self.update(|used, closed| (used + bytes, closed || used + bytes >= LIMIT));
    }

    /// Gives bytes back.
    pub(super) fn release(&self, bytes: usize) {
        if bytes == 0 {
            return;
        }
        let opens = self.update(|used, closed| (used - bytes, closed && used - bytes > LOW));
        if opens {
            self.opened.notify_waiters();
        }
    }

    /// Says whether the budget was closed and is not any more.
    fn update(&self, change: impl Fn(usize, bool) -> (usize, bool)) -> bool {
        let changed = |word: usize| {
            let (used, closed) = change(word >> 1, word & CLOSED != 0);
            used << 1 | usize::from(closed)
        };
        let result =
            self.word.fetch_update(Ordering::AcqRel, Ordering::Relaxed, |word| Some(changed(word)));
        // It never refuses.
        let before = result.unwrap_or_else(|word| word);
        before & CLOSED != 0 && changed(before) & CLOSED == 0
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.budget.release(self.bytes);
    }
}

/// How much of the budget calls take: with the data that they bring, and those that they are to fetch.
pub(super) fn size(calls: &[Call]) -> usize {
    let of_one = |call: &Call| {
        let fetched = match call.data_len() {
            // More than that is refused when it is announced.
            Some(DataLen::Exactly(len)) => len.min(MAX_DATA) as usize,
            Some(DataLen::AsAnnounced) | None => 0,
        };
        CALL + call.payload.len() + fetched
    };
    calls.iter().map(of_one).sum()
}

#[cfg(test)]
mod tests {
    use std::pin::pin;
    use std::task::{Context, Poll, Waker};

    use proptest::prelude::*;

    use super::*;

    /// Whether somebody who comes now would not wait.
    fn has_room(budget: &Budget) -> bool {
        pin!(budget.ready()).poll(&mut Context::from_waker(Waker::noop())).is_ready()
    }

    #[test]
    fn it_closes_at_the_limit_and_opens_when_half_of_it_is_free() {
        let budget = Arc::new(Budget::default());
        let (first, second) = (budget.acquire(LOW), budget.acquire(LIMIT - LOW - 1));
        assert!(has_room(&budget));
        let third = budget.acquire(1);
        assert!(!has_room(&budget));
        drop(third);
        assert!(!has_room(&budget));
        drop(second);
        assert!(has_room(&budget));
        drop(first);
        assert_eq!(budget.word.load(Ordering::Relaxed), 0);
    }

    #[test]
    fn those_who_wait_are_woken_together_and_one_who_is_not_polled_delays_nobody() {
        let budget = Arc::new(Budget::default());
        let all = budget.acquire(LIMIT);
        let (mut first, mut second) = (pin!(budget.ready()), pin!(budget.ready()));
        let mut context = Context::from_waker(Waker::noop());
        assert!(first.as_mut().poll(&mut context).is_pending());
        assert!(second.as_mut().poll(&mut context).is_pending());
        drop(all);
        assert!(second.as_mut().poll(&mut context).is_ready());
        assert!(has_room(&budget));
        // Who was woken looks again.
        let all = budget.acquire(LIMIT);
        assert!(first.as_mut().poll(&mut context).is_pending());
        drop(all);
        assert_eq!(first.as_mut().poll(&mut context), Poll::Ready(()));
    }

    proptest! {
        #[test]
        fn whatever_is_taken_and_given_back_nobody_waits_in_an_empty_room(
            steps in prop::collection::vec((0..2 * LIMIT, any::<prop::sample::Index>(), any::<bool>()), 1..100)
        ) {
            let budget = Arc::new(Budget::default());
            let mut taken: Vec<Permit> = Vec::new();
            for (bytes, index, give_back) in steps {
                let before = has_room(&budget);
                if give_back && !taken.is_empty() {
                    taken.swap_remove(index.index(taken.len()));
                } else {
                    taken.push(budget.acquire(bytes));
                }
                let used: usize = taken.iter().map(|permit| permit.bytes).sum();
                let expected = if used >= LIMIT { false } else { used <= LOW || before };
                prop_assert_eq!(has_room(&budget), expected);
            }
            taken.clear();
            prop_assert!(has_room(&budget));
        }
    }
}
