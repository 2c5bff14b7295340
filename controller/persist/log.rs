//! The flight recorder: what a persistent process has executed last, without attaching to it.

use std::time::Duration;

use super::attach::refused;
use super::meet::{Heard, ask, deadline};
use super::place::Place;
use crate::error::Result;
use crate::process::{Process, random_token};
use crate::proto::handshake::Hold;
use crate::proto::log::Log;
use crate::runtime;

/// What a persistent process has executed last, and who holds it.
#[derive(Clone, Debug)]
pub struct Flight {
    /// Its last calls, with their results.
    pub log: Log,
    /// Who is attached: its pid where it told it, and since when in seconds since 1970.
    pub holder: Option<(Option<i32>, i64)>,
}

/// Asks the persistent process at `place` for its last calls. Nothing changes by that: who is
/// attached stays so.
///
/// # Errors
///
/// [`Error::Attach`](crate::Error::Attach) if nobody listens there, it is another user's, or it does
/// not answer within `timeout`: a process that is blocked in a call answers when that has returned.
pub async fn flight(place: &Place, timeout: Duration) -> Result<Flight> {
    runtime::check()?;
    let Heard { hold, log, .. } = ask(place, random_token()?, deadline(timeout)).await?;
    let holder = match hold {
        Hold::Nobody { .. } => None,
        Hold::Theirs { pid, since } => Some((pid, since)),
        Hold::Refused(reason) => return Err(refused(place, reason)),
        Hold::Closed => {
            return Err(refused(
                place,
                "the server closed the connection: you may not ask, or it is none of farcall's",
            ));
        }
        Hold::Ours { .. } => return Err(refused(place, "the server attached what only asked")),
    };
    Ok(Flight { log, holder })
}

impl Process {
    /// What the process had executed when this controller [attached](super::Attach::to) to it: the last
    /// calls of the controllers before, each with its result. Their own ends with the last one that was
    /// executed for it, whether or not it has heard the result; what it had sent beyond that was not
    /// executed and never will be, and there is no trace of it.
    ///
    /// Of a server that had no memory for its log the records are missing. `None`: it is the process of
    /// the controller that has made it.
    #[must_use]
    pub fn log_before(&self) -> Option<&Log> {
        self.inner().before.get()
    }
}
