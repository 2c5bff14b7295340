//! How long one side of a ring looks for the other's answer before it sleeps.
//!
//! ```text
//!            answer found                    `PATIENT` times nothing found
//!   ┌──── looking ◀──────────── looking ─────────────────────────────────▶ sleeping at once
//!   └────────▲                     ▲                                            │
//!            └── found ────────────┴──────────── every `RETRY`th time ──────────┘
//! ```
//! Looking pays where the answer comes soon, and costs a processor where it does not: where the other
//! side has none to run on, because others are busy, it is in its way. Both show as answers that do
//! not come while one looks, so no other measure is needed.

use std::sync::atomic::{AtomicU32, Ordering};

/// How a controller waits for results in a ring, and its server for calls.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Polling {
    /// Looks for a while, as long as that has been worth it lately.
    #[default]
    Adaptive,
    /// Sleeps at once: no processor is ever used for waiting.
    Never,
    /// Looks for a while before every sleep.
    Always,
}

/// How often to look. One look is a load and a `pause`, 20 to 35 ns where this was measured, and all
/// of them 50 to 70 us: some times as long as a sleep and a wake-up by eventfd(2) take. It must be
/// longer than that: else a side that has slept once finds the other one asleep when it goes on, which
/// finds it asleep when it answers, and so for ever (with 500 looks that was seen).
const LOOKS: u32 = 2000;

/// How many more for each call that comes before: about as long as a quick call takes.
const LOOKS_A_CALL: u32 = 20;

/// After so many looks in vain in a row it is not worth it.
const PATIENT: u32 = 4;

/// Then one in so many waits looks again.
const RETRY: u32 = 32;

/// What has been seen of one ring.
#[derive(Debug)]
pub(crate) struct Looks {
    polling: Polling,
    /// Waits for results in a row in which there was none in time, and those since.
    results: AtomicU32,
    /// The same of the server's waits for calls.
    calls: AtomicU32,
}

impl Looks {
    /// On one processor nobody looks, whatever is asked for: the other side could not run.
    pub(crate) fn new(polling: Polling) -> Self {
        let processors = std::thread::available_parallelism().map_or(1, usize::from);
        let polling = if processors > 1 { polling } else { Polling::Never };
        Self { polling, results: AtomicU32::new(0), calls: AtomicU32::new(0) }
    }

    /// How often to look now, after `vain` times in vain.
    fn looks(&self, vain: u32) -> u32 {
        match self.polling {
            Polling::Never => 0,
            Polling::Always => LOOKS,
            Polling::Adaptive if vain < PATIENT || vain.is_multiple_of(RETRY) => LOOKS,
            Polling::Adaptive => 0,
        }
    }

    /// How often to look for the result of the last of so many calls.
    pub(crate) fn for_result(&self, calls: usize) -> u32 {
        match self.looks(self.results.load(Ordering::Relaxed)) {
            0 => 0,
            looks => looks + calls as u32 * LOOKS_A_CALL,
        }
    }

    /// Whether it was there in time.
    pub(crate) fn result(&self, in_time: bool) {
        count(&self.results, in_time);
    }

    /// How often the server is to look for a call, now that it was found asleep or not.
    pub(crate) fn for_call(&self, asleep: bool) -> u32 {
        count(&self.calls, !asleep);
        self.looks(self.calls.load(Ordering::Relaxed))
    }
}

fn count(vain: &AtomicU32, in_time: bool) {
    let before = vain.load(Ordering::Relaxed);
    let now = if in_time { 0 } else { before.saturating_add(1) };
    if now != before {
        vain.store(now, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn adaptive() -> Looks {
        Looks { polling: Polling::Adaptive, results: AtomicU32::new(0), calls: AtomicU32::new(0) }
    }

    #[test]
    fn looking_in_vain_is_given_up_and_tried_again_now_and_then() {
        let looks = adaptive();
        for _ in 0..PATIENT {
            assert_eq!(looks.for_result(0), LOOKS);
            looks.result(false);
        }
        let mut tries = 0;
        for _ in 0..10 * RETRY {
            tries += u32::from(looks.for_result(1) > 0);
            looks.result(false);
        }
        assert_eq!(tries, 10);
        looks.result(true);
        assert_eq!(looks.for_result(0), LOOKS);
    }

    #[test]
    fn a_server_that_is_always_asleep_looks_no_more_and_one_that_is_awake_does() {
        let looks = adaptive();
        let told: Vec<u32> = (0..PATIENT + 2).map(|_| looks.for_call(true)).collect();
        assert_eq!(told.last(), Some(&0));
        assert_eq!(looks.for_call(false), LOOKS);
    }

    #[test]
    fn never_is_never_and_always_is_always() {
        for (polling, expected) in [(Polling::Never, 0), (Polling::Always, LOOKS)] {
            let looks = Looks { polling, ..adaptive() };
            for in_time in [false; 10].into_iter().chain([true; 2]) {
                assert_eq!(looks.for_result(0), expected);
                assert_eq!(looks.for_call(!in_time), expected);
                looks.result(in_time);
            }
        }
    }
}
