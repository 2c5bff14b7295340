//! Figures that take turns with their baselines: what is told of them is the round whose ratio is the
//! median.

use std::time::{Duration, Instant};

use farcall::Process;
use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::Pid;

use super::Row;
use crate::command::Failure;

/// How often all figures are measured one after the other. Between two passes lie seconds: what the
/// machine does in one of these, or where a virtual machine's processors are just then, is in few rounds
/// of a figure.
pub const PASSES: usize = 5;

/// How often a figure and its baseline take turns in one pass. What else the machine does is in few of
/// them, if they are short. But they are long enough that it does not count that each is cold when its
/// turn begins.
pub const ROUNDS: usize = 9;

/// Durations of the rounds of one thing, in microseconds a repetition.
#[derive(Clone, Default)]
pub struct Samples(Vec<f64>);

impl Samples {
    pub fn add(&mut self, elapsed: Duration, repetitions: usize) {
        self.0.push(elapsed.as_secs_f64() * 1e6 / repetitions as f64);
    }

    fn quantile(&self, part: f64) -> f64 {
        let mut sorted = self.0.clone();
        sorted.sort_by(f64::total_cmp);
        sorted[((sorted.len() - 1) as f64 * part).round() as usize]
    }

    pub fn median(&self) -> f64 {
        self.quantile(0.5)
    }

    /// Half the distance between the quartiles, in percent of the median.
    pub fn spread(&self) -> f64 {
        50.0 * (self.quantile(0.75) - self.quantile(0.25)) / self.median()
    }
}

/// What a turn says about how long it took.
pub trait Turn {
    /// How long it took, if so much passed from its beginning to its end.
    fn took(self, passed: Duration) -> Duration;
}

impl Turn for () {
    fn took(self, passed: Duration) -> Duration {
        passed
    }
}

/// It has measured itself.
impl Turn for Duration {
    fn took(self, _: Duration) -> Duration {
        self
    }
}

/// Lets things take turns, each repeated `repetitions` times at once: a [`Samples`] for each, as an
/// array. The progress shows the name.
///
/// It is a macro because they are blocks that await.
macro_rules! take_turns {
    ($progress:expr, $name:expr, $repetitions:expr, $($turn:expr),+ $(,)?) => {{
        let repetitions: usize = $repetitions;
        let mut samples =
            [$({ let _ = stringify!($turn); $crate::rig::bench::measure::Samples::default() }),+];
        for round in $progress.rounds($name, $crate::rig::bench::measure::ROUNDS) {
            let mut next = samples.iter_mut();
            $({
                let begun = std::time::Instant::now();
                let turn = $turn;
                let elapsed = $crate::rig::bench::measure::Turn::took(turn, begun.elapsed());
                // The first round warms up.
                if let (Some(samples), 1..) = (next.next(), round) {
                    samples.add(elapsed, repetitions);
                }
            })+
        }
        samples
    }};
}
pub(super) use take_turns;

/// What was measured of a row.
pub struct Figure {
    name: &'static str,
    samples: Samples,
    against: &'static str,
    baseline: Samples,
    /// What it is of, per repetition, if it is a bandwidth.
    bytes: Option<usize>,
}

impl Figure {
    /// A figure of times.
    pub fn times(
        name: &'static str,
        samples: Samples,
        against: &'static str,
        baseline: Samples,
    ) -> Self {
        Self { name, samples, against, baseline, bytes: None }
    }

    /// A figure of bandwidths, for `bytes` a repetition.
    pub fn bandwidth(
        name: &'static str,
        samples: Samples,
        against: &'static str,
        baseline: Samples,
        bytes: usize,
    ) -> Self {
        Self { bytes: Some(bytes), ..Self::times(name, samples, against, baseline) }
    }

    /// Adds another pass to those that were measured before.
    pub fn add_to(self, figures: &mut Vec<Self>) {
        match figures.iter_mut().find(|figure| figure.name == self.name) {
            Some(figure) => {
                figure.samples.0.extend(self.samples.0);
                figure.baseline.0.extend(self.baseline.0);
            }
            None => figures.push(self),
        }
    }

    pub fn row(&self) -> Row {
        let (value, baseline) = self.typical();
        let (value, unit) = self.in_units(value);
        let (baseline, _) = self.in_units(baseline);
        Row {
            spread: Some(self.samples.spread()),
            baseline: Some(self.against),
            baseline_value: Some(baseline),
            baseline_spread: Some(self.baseline.spread()),
            ratio: Some(value / baseline),
            ..Row::alone(self.name, value, unit)
        }
    }

    /// What the two took in the round in which their ratio was the median. They are measured right after
    /// one another there: a machine that is slower for a while is so for both.
    fn typical(&self) -> (f64, f64) {
        let rounds = self.samples.0.iter().copied().zip(self.baseline.0.iter().copied());
        let mut rounds: Vec<(f64, f64)> = rounds.collect();
        rounds.sort_by(|one, other| (one.0 / one.1).total_cmp(&(other.0 / other.1)));
        rounds[rounds.len() / 2]
    }

    fn in_units(&self, microseconds: f64) -> (f64, &'static str) {
        match self.bytes {
            None => (microseconds, "us"),
            Some(bytes) => (bytes as f64 / microseconds / 1e3, "GB/s"),
        }
    }
}

/// This thread and a process, and what they start, on one processor: what takes turns needs no
/// second one, and waking one up costs more than a call. It is the last one, since the first has more
/// interrupts to see to.
pub struct Pinned(CpuSet);

impl Pinned {
    pub fn with(process: &Process) -> Result<Self, Failure> {
        let before = sched_getaffinity(Pid::from_raw(0))?;
        let last = processors(&before)?.1;
        sched_setaffinity(Pid::from_raw(0), &last)?;
        if let Some(pid) = process.pid() {
            sched_setaffinity(Pid::from_raw(pid), &last)?;
        }
        Ok(Self(before))
    }

    /// This thread on one processor and the processes on another, if there is one.
    pub fn apart(pids: &[i32]) -> Result<Self, Failure> {
        let before = sched_getaffinity(Pid::from_raw(0))?;
        let (first, last) = processors(&before)?;
        sched_setaffinity(Pid::from_raw(0), &first)?;
        for pid in pids {
            sched_setaffinity(Pid::from_raw(*pid), &last)?;
        }
        Ok(Self(before))
    }
}

/// Has this thread do something where that process is, while that sleeps: two processors of a virtual
/// machine can be of different speeds from moment to moment. Returns how long it took.
pub fn beside(pid: i32, work: impl FnOnce()) -> Result<Duration, Failure> {
    const ASLEEP: Duration = Duration::from_millis(1);
    let _back = Pinned(sched_getaffinity(Pid::from_raw(0))?);
    sched_setaffinity(Pid::from_raw(0), &sched_getaffinity(Pid::from_raw(pid))?)?;
    std::thread::sleep(ASLEEP);
    let begun = Instant::now();
    work();
    Ok(begun.elapsed())
}

/// The first and the last processor of a set, each by itself.
fn processors(set: &CpuSet) -> Result<(CpuSet, CpuSet), Failure> {
    let mut allowed = (0..CpuSet::count()).filter(|cpu| set.is_set(*cpu).unwrap_or(false));
    let first = allowed.next().unwrap_or(0);
    let last = allowed.next_back().unwrap_or(first);
    let one = |cpu| {
        let mut one = CpuSet::new();
        one.set(cpu).map(|()| one)
    };
    Ok((one(first)?, one(last)?))
}

impl Drop for Pinned {
    fn drop(&mut self) {
        // It was allowed before.
        let _ = sched_setaffinity(Pid::from_raw(0), &self.0);
    }
}
