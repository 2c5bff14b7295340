//! What is being measured just now, for a person at a terminal.

use std::ops::RangeInclusive;
use std::sync::Arc;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::command::Failure;

/// A line on standard error that is redrawn, if that is a terminal. It is drawn between rounds
/// only, so that drawing is not measured.
#[derive(Clone)]
pub struct Progress(Arc<Bar>);

/// The line, which is gone with its last user.
struct Bar(ProgressBar);

impl Progress {
    pub fn new() -> Result<Self, Failure> {
        // Has a target that draws nothing where there is no terminal.
        let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr());
        bar.set_style(ProgressStyle::with_template("measuring {msg} {bar:30} {pos}/{len}")?);
        Ok(Self(Arc::new(Bar(bar))))
    }

    /// The next figure, in one go.
    pub fn show(&self, name: &'static str) {
        self.begin(name, 1);
    }

    /// The rounds of the next figure: `count`, and one before them.
    pub fn rounds(&self, name: &'static str, count: usize) -> Rounds<'_> {
        self.begin(name, count);
        Rounds { progress: self, left: 0..=count }
    }

    fn begin(&self, name: &'static str, count: usize) {
        let Bar(bar) = &*self.0;
        bar.set_length(count as u64);
        bar.set_position(0);
        bar.set_message(name);
        bar.force_draw();
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        self.0.finish_and_clear();
    }
}

/// Counts rounds, and shows them.
pub struct Rounds<'p> {
    progress: &'p Progress,
    left: RangeInclusive<usize>,
}

impl Iterator for Rounds<'_> {
    type Item = usize;

    fn next(&mut self) -> Option<usize> {
        let round = self.left.next()?;
        self.progress.0.0.set_position(round as u64);
        Some(round)
    }
}
