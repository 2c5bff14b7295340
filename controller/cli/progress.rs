//! How far a transfer has come, for a person at a terminal.

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::command::Failure;

/// Bytes that are transferred at once. They are what a command needs memory for.
pub const PIECE: usize = 1 << 20;

/// Up to so many bytes nobody has to wait for long.
const MUCH: usize = 64 << 20;

/// A line on standard error, if that is a terminal and the transfer is a large one.
pub struct Transfer(ProgressBar);

impl Transfer {
    /// Of `total` bytes, which were sent or received.
    pub fn new(verb: &'static str, total: usize) -> Result<Self, Failure> {
        let target = match total {
            // Draws nothing where there is no terminal.
            total if total > MUCH => ProgressDrawTarget::stderr(),
            _ => ProgressDrawTarget::hidden(),
        };
        let bar = ProgressBar::with_draw_target(Some(total as u64), target);
        let template =
            "{binary_bytes} of {binary_total_bytes} {msg} {bar:30} {binary_bytes_per_sec}";
        bar.set_style(ProgressStyle::with_template(template)?);
        bar.set_message(verb);
        Ok(Self(bar))
    }

    /// So many bytes more.
    pub fn add(&self, bytes: usize) {
        self.0.inc(bytes as u64);
    }
}

impl Drop for Transfer {
    fn drop(&mut self) {
        self.0.finish_and_clear();
    }
}
