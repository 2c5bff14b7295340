//! Running a chain: its parts are sent one behind the other, and what they make is owned.

use std::sync::Arc;

use super::{Chain, ChainId, Done};
use crate::abi::wire::MAX_REF;
use crate::calls::Buffer;
use crate::calls::handle::{Fd, FdTable};
use crate::error::{ChainError, Error, Result};
use crate::fault;
use crate::proto::Reply;
use crate::proto::batch::{Makes, PartSteps, Places, Run};

impl Chain<'_> {
    /// Sends the chain and waits for all of its results. Dropping the future loses nothing: what
    /// has been sent is executed, and what it has opened is closed again.
    ///
    /// # Errors
    ///
    /// [`Error::Chain`] if a call has failed: which, with what, and what was not executed for that.
    pub async fn run(self) -> Result<Done> {
        let Self { task, id, batch, one_by_one, keeping, names, slots, error, .. } = self;
        if let Some(error) = error {
            return Err(error);
        }
        if !keeping.is_empty() {
            return Err(Error::misuse(
                "Chain::keep behind the last call",
                "call it directly before the call whose descriptor is to have the name",
            ));
        }
        let slots = if slots == 0 { None } else { Some(task.slots(slots, &names).await?) };
        let at_once =
            if one_by_one || task.connection.version() == 0 { 1 } else { MAX_REF as usize };
        task.connection.ready().await;
        let buffer = match batch.size() {
            0 => None,
            size => Some(task.buffer(size).await?),
        };
        let memory = buffer.as_ref().map_or(0, Buffer::address);
        let slot = slots.as_ref().map_or(0, |slots| slots.first);
        let has_names = slots.is_some();
        let point = |name| {
            if has_names {
                fault::point(name)
            }
        };
        point("chain.prepared");
        let mut run = batch.run(Places { memory, slot }, at_once);
        let owned = Arc::new((buffer, slots));
        let mut fds = Vec::new();
        let mut round_trips = 0;
        while let Some(part) = run.next() {
            round_trips += 1;
            let (table, keep, steps) = (task.table(), owned.clone(), part.steps);
            let receipt = task.connection.submit(part.calls, move |replies| {
                let _keep = keep;
                let replies = steps.in_order(replies)?;
                let made = own(&table, &steps, &replies);
                Ok((steps, replies, made))
            });
            point("chain.sent");
            let in_part = |error: Error| if run.has_begun() { error.in_part() } else { error };
            let (steps, replies, made) = receipt.await.map_err(in_part)?;
            point("chain.done");
            forget_closed(&mut fds, &steps, &replies);
            fds.extend(made);
            run.take(replies);
        }
        done(id, run, fds, round_trips)
    }
}

/// Makes handles of the descriptors that a part has opened and not closed again, by their steps.
fn own(table: &Arc<FdTable>, part: &PartSteps, replies: &[Reply]) -> Vec<(usize, Fd)> {
    let mut fds = Vec::new();
    for ((step, index), reply) in part.steps().iter().zip(part.first()..).zip(replies) {
        let tag = match step.makes {
            Makes::Nothing => continue,
            Makes::Fd => None,
            Makes::NamedFd(tag) => Some(tag),
        };
        let Ok(number) = reply.value() else { continue };
        let number = number as i32;
        if let Some(tag) = tag {
            table.name(number, tag);
        }
        let mut later = part.steps().iter().zip(replies);
        if later.any(|(step, reply)| step.closes == Some(index) && !reply.is_canceled()) {
            table.unreserve([number]);
            continue;
        }
        fds.push((index, table.made(number)));
    }
    fds
}

/// Gives up the handles of descriptors that steps of a part have closed. Whatever close(2) answers, the
/// descriptor is closed, if it was called.
fn forget_closed(fds: &mut Vec<(usize, Fd)>, part: &PartSteps, replies: &[Reply]) {
    for (step, reply) in part.steps().iter().zip(replies) {
        if let Some(opened) = step.closes
            && !reply.is_canceled()
            && let Some(at) = fds.iter().position(|(step, _)| *step == opened)
        {
            let _ = fds.swap_remove(at).1.into_raw();
        }
    }
}

fn done(chain: ChainId, run: Run, fds: Vec<(usize, Fd)>, round_trips: usize) -> Result<Done> {
    let (steps, replies) = run.finish();
    let failed = replies.iter().zip(&*steps).enumerate().find_map(|(index, (reply, step))| {
        reply.value().err().map(|errno| (index, step.name, errno))
    });
    let Some((step, call, errno)) = failed else {
        return Ok(Done { chain, replies, taken: Vec::new(), fds, round_trips });
    };
    let behind = replies.iter().zip(&*steps).enumerate().skip(step + 1);
    let skipped = behind
        .filter(|(_, (reply, _))| reply.is_canceled())
        .map(|(index, (_, step))| (index, step.name))
        .collect();
    Err(Error::Chain(ChainError { step, call, errno, skipped, round_trips }))
}
