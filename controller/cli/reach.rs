//! How commands come to hold a process, and what they say where they do not.

use std::time::Duration;

use clap::Args;
use farcall::persist::{Attach, Condition, Name, Place};
use farcall::{Error, Process};

use crate::command::Failure;

/// Options of all commands that attach.
#[derive(Args, Clone, Default)]
pub struct Reach {
    /// Take the process over, from another controller that holds it or from a call in which one that is
    /// gone has left it: what it is blocked in is interrupted and returns EINTR
    #[arg(long)]
    pub take_over: bool,
    /// Wait until whoever holds the process is gone, and until the call is over in which it is blocked;
    /// as long as that takes, unless --timeout says how long
    #[arg(long, conflicts_with = "take_over")]
    pub wait: bool,
    /// Give up after so many seconds in which the process is busy, 10 if nothing is said
    #[arg(long, value_name = "SECONDS", value_parser = seconds)]
    pub timeout: Option<Duration>,
}

/// How long to wait without another word.
const TIMEOUT: Duration = Duration::from_secs(10);

/// The longest that can be waited.
const LONGEST: u64 = 1_000_000_000;

/// How often to look whether a process that is held is free. To look wakes it up.
const PAUSE: Duration = Duration::from_millis(100);

/// A number of seconds.
pub fn seconds(text: &str) -> Result<Duration, String> {
    let seconds: f64 = text.parse().map_err(|_| "it is not a number of seconds".to_owned())?;
    if seconds > LONGEST as f64 {
        return Err(format!("it is too large: {LONGEST} seconds at most"));
    }
    Duration::try_from_secs_f64(seconds).map_err(|_| "it is not a number of seconds".to_owned())
}

impl Reach {
    /// How long to wait for an answer of a process that is not waited for longer.
    pub fn timeout(&self) -> Duration {
        self.timeout.unwrap_or(TIMEOUT)
    }

    /// Attaches to a process.
    ///
    /// # Errors
    ///
    /// As of [`Attach::to`].
    pub async fn attach(&self, place: &Place) -> farcall::Result<Process> {
        let longest = Duration::from_secs(LONGEST);
        let timeout =
            self.timeout.unwrap_or(if self.wait { longest } else { TIMEOUT }).min(longest);
        let begin = tokio::time::Instant::now();
        loop {
            let mut attach = Attach::default().timeout(timeout.saturating_sub(begin.elapsed()));
            if self.take_over {
                attach = attach.take_over();
            }
            match attach.to(place.clone()).await {
                Err(Error::Held { .. } | Error::Inherited { .. })
                    if self.wait && begin.elapsed() < timeout =>
                {
                    tokio::time::sleep(PAUSE.min(timeout.saturating_sub(begin.elapsed()))).await;
                }
                attached => return attached,
            }
        }
    }

    /// Why a process can't be reached, with its name and what helps.
    pub fn explain(&self, name: &Name, place: &Place, error: Error) -> Failure {
        let mut help = Vec::new();
        match &error {
            Error::Held { .. } | Error::Inherited { .. } => {
                help.push("--wait waits until it is free".to_owned());
                help.push("--take-over takes it over".into());
                help.push(format!("`farcall stop --kill {name}` ends it"));
            }
            Error::Attach { .. } => match condition(place) {
                Some(Condition::InCall { uninterruptible: true, .. }) => {
                    help.push("--wait waits until that is over".into());
                }
                Some(Condition::InCall { .. } | Condition::Running | Condition::Unknown) => {
                    help.push("--take-over interrupts the call".into());
                    help.push("--wait waits for its end".into());
                    help.push(format!("`farcall stop --kill {name}` ends the process"));
                }
                Some(Condition::Stopped | Condition::Traced { .. }) => {
                    help.push(format!("`farcall stop --kill {name}` ends the process"));
                }
                _ => {}
            },
            _ => {}
        }
        let given = |help: &String| {
            self.take_over && help.starts_with("--take-over")
                || self.wait && help.starts_with("--wait")
        };
        help.retain(|help| !given(help));
        let help = match help.as_slice() {
            [] => String::new(),
            [help] => format!("\n  {help}"),
            [first @ .., last] => format!("\n  {}, and {last}", first.join(", ")),
        };
        Failure::new(format!("{name}: {error}{help}"))
    }
}

/// What keeps a process from answering.
fn condition(place: &Place) -> Option<Condition> {
    let process = place.state()?.process;
    if process.is_alive() { Condition::of(process.pid) } else { None }
}
