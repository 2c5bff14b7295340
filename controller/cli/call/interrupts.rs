//! Ctrl-C, and what else asks a command to end, while a process works for it.

use std::fs;

use nix::sys::signal::{SigHandler, Signal, signal};
use tokio::signal::unix::{self, SignalKind};

use crate::command::Failure;

/// The signals by which a person or a manager ends a command.
const SIGNALS: [Signal; 3] = [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP];

/// Hears them, from the time on at which it is made. What is ignored stays so: a command in the background
/// of a script does not hear Ctrl-C.
pub struct Interrupts {
    heard: Vec<unix::Signal>,
    signals: Vec<Signal>,
}

impl Interrupts {
    pub fn new() -> Result<Self, Failure> {
        let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
        let ignored = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
        let ignored = ignored.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok());
        let is_ignored =
            |signal: &Signal| ignored.is_some_and(|mask| mask & 1 << (*signal as i32 - 1) != 0);
        let signals: Vec<Signal> = SIGNALS.into_iter().filter(|one| !is_ignored(one)).collect();
        let hear = |signal: &Signal| unix::signal(SignalKind::from_raw(*signal as i32));
        let heard = signals.iter().map(hear).collect::<Result<_, _>>()?;
        Ok(Self { heard, signals })
    }

    /// Returns when there has been one that was not told yet.
    pub async fn next(&mut self) {
        let told = std::future::poll_fn(|context| {
            let told = self.heard.iter_mut().any(|signal| signal.poll_recv(context).is_ready());
            if told { std::task::Poll::Ready(()) } else { std::task::Poll::Pending }
        });
        told.await;
    }
}

impl Drop for Interrupts {
    /// From here on they end the command at once, also while it waits for a reader of its output.
    fn drop(&mut self) {
        for one in &self.signals {
            // SAFETY: no code runs in the handler's place: the default action has none.
            let _ = unsafe { signal(*one, SigHandler::SigDfl) };
        }
    }
}
