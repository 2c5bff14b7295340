//! Running a chain: into how many batches it is split, and what is resolved where.
//!
//! A batch has at most [`MAX_REF`] requests, so that within it every reference reaches. What refers
//! to an earlier batch is a value by then, and put in here; and where the call before a batch has
//! failed, what is linked to it is left out. A server of version 0 gets batches of one.

use std::collections::HashMap;
use std::sync::Arc;

use nix::errno::Errno;

use super::{Chain, ChainError, ChainId, Done, Kind, Step};
use crate::abi::wire::{MAX_REF, Request, Word};
use crate::call::{Call, Error, Reply, Result};
use crate::fault;
use crate::handle::{Fd, FdTable, Tag};
use crate::sys::Buffer;

/// What a call that is not executed answers.
const CANCELED: i64 = -(Errno::ECANCELED as i64);

impl Chain<'_> {
    /// Sends the chain and waits for all of its results. Dropping the future loses nothing: what
    /// has been sent is executed, and what it has opened is closed again.
    ///
    /// # Errors
    ///
    /// [`Error::Chain`] if a call has failed: which, with what, and what was not executed for that.
    pub async fn run(self) -> Result<Done> {
        let Self {
            task, id, steps, input, output, one_by_one, keeping, names, slots, error, ..
        } = self;
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
        task.connection.room().await;
        let behind = input.len().next_multiple_of(8);
        let buffer = match behind.saturating_add(output) {
            0 => None,
            size => Some(task.buffer(size).await?),
        };
        let base = buffer.as_ref().map_or(0, Buffer::address);
        let slot = slots.as_ref().map_or(0, |slots| slots.first);
        let place = Place { input: base, output: base + behind as u64, slot };
        let mut run = Run { chain: id, steps, place, replies: Vec::new(), fds: HashMap::new() };
        let buffer = Arc::new((buffer, slots));
        if buffer.1.is_some() {
            fault::point("chain.prepared");
        }
        let mut prefix = (!input.is_empty()).then(|| Call::copy_in(place.input, input));
        let mut round_trips = 0;
        while run.replies.len() < run.steps.len() || prefix.is_some() {
            let with_prefix = prefix.is_some();
            let batch = run.batch(prefix.take(), at_once);
            if batch.calls.is_empty() {
                // All that was left depends on what has failed.
                continue;
            }
            round_trips += 1;
            let table = task.table();
            let keep = buffer.clone();
            let opens = batch.steps.iter().map(|step| &run.steps[*step]);
            let opens: Vec<_> = opens.map(|step| (step.opens, step.named)).collect();
            let closed: Vec<Option<usize>> = batch
                .steps
                .iter()
                .map(|step| {
                    let opened = run.steps[*step].closes?;
                    batch.steps.iter().position(|step| *step == opened)
                })
                .collect();
            let names = buffer.1.is_some();
            let receipt = task.connection.submit(batch.calls, move |mut replies| {
                let _keep = keep;
                if with_prefix {
                    let written = replies.remove(0);
                    written.value().map_err(Error::call("COPY_IN"))?;
                }
                let fds = own(&table, &replies, &opens, &closed);
                Ok((replies, fds))
            });
            if names {
                fault::point("chain.sent");
            }
            let begun = run.replies.iter().any(|reply| reply.result != CANCELED);
            let in_part = |error: Error| if begun { error.in_part() } else { error };
            let (replies, fds) = receipt.await.map_err(in_part)?;
            if names {
                fault::point("chain.done");
            }
            run.take(&batch.steps, replies, fds);
        }
        run.done(round_trips)
    }
}

/// Makes handles of the descriptors that a batch has opened and not closed again.
fn own(
    table: &Arc<FdTable>,
    replies: &[Reply],
    opens: &[(bool, Option<Tag>)],
    closed: &[Option<usize>],
) -> Vec<Option<Fd>> {
    let mut fds: Vec<Option<Fd>> = replies
        .iter()
        .zip(opens)
        .map(|(reply, (opens, named))| {
            let number = reply.value().ok().filter(|_| *opens)? as i32;
            if let Some(tag) = named {
                table.name(number, *tag);
            }
            Some(table.made(number))
        })
        .collect();
    for (reply, opened) in replies.iter().zip(closed) {
        // Whatever close(2) answers, the descriptor is closed, if it was called.
        if let Some(opened) = opened
            && reply.result != CANCELED
            && let Some(fd) = fds[*opened].take()
        {
            let _ = fd.into_raw();
        }
    }
    fds
}

/// Where the chain's memory lies.
#[derive(Clone, Copy)]
struct Place {
    input: u64,
    output: u64,
    /// The first entry of the registry that the chain may take.
    slot: u64,
}

struct Run {
    chain: ChainId,
    steps: Vec<Step>,
    place: Place,
    /// Of the steps so far.
    replies: Vec<Reply>,
    fds: HashMap<usize, Fd>,
}

/// Some steps of a chain as calls.
struct Batch {
    calls: Vec<Call>,
    /// Which step each call is, without the COPY_IN in front.
    steps: Vec<usize>,
}

impl Run {
    /// The next calls. Steps that can't be executed any more get their reply at once.
    fn batch(&mut self, prefix: Option<Call>, at_once: usize) -> Batch {
        let mut batch = Batch { calls: Vec::new(), steps: Vec::new() };
        let has_prefix = prefix.is_some();
        batch.calls.extend(prefix);
        for index in self.replies.len()..self.steps.len() {
            // What is about the next call goes with it.
            let together = usize::from(self.steps[index].keeps);
            let torn = batch.steps.last().is_some_and(|before| self.steps[*before].keeps);
            if !torn && !batch.calls.is_empty() && batch.calls.len() + together >= at_once {
                break;
            }
            match self.call(index, &batch.steps, has_prefix) {
                Some(call) => {
                    batch.calls.push(call);
                    batch.steps.push(index);
                }
                None if batch.steps.is_empty() => {
                    self.replies.push(Reply { result: CANCELED, data: Vec::new() });
                }
                // Its reply must not overtake those of earlier steps that are in this batch.
                None => break,
            }
        }
        batch
    }

    /// A step as a call, or `None` if what it needs has failed in an earlier batch.
    fn call(&self, index: usize, before: &[usize], has_prefix: bool) -> Option<Call> {
        let step = &self.steps[index];
        let mut word = step.word;
        if step.linked {
            if !before.is_empty() || (has_prefix && index == 0) {
                word |= Word::LINK;
            } else if index > 0 {
                self.replies[index - 1].value().ok()?;
            }
        }
        let mut args = [0; 6];
        for (place, (slot, arg)) in (0u32..).zip(args.iter_mut().zip(&step.args)) {
            *slot = match arg.kind {
                Kind::Value(value) => value,
                Kind::Input(at) => self.place.input + at as u64,
                Kind::Output(at) => self.place.output + at as u64,
                Kind::Slot(index) => self.place.slot + index,
                Kind::Result(of) => match before.iter().position(|step| *step == of) {
                    Some(at) => {
                        word |= Word::reference(place);
                        (before.len() - at) as u64
                    }
                    None => self.replies[of].value().ok()?,
                },
            };
        }
        Some(Request { word, args }.into())
    }

    /// The replies of a batch are here.
    fn take(&mut self, steps: &[usize], replies: Vec<Reply>, fds: Vec<Option<Fd>>) {
        for ((step, reply), fd) in steps.iter().zip(replies).zip(fds) {
            debug_assert_eq!(self.replies.len(), *step);
            // A close in a later batch than its open.
            if let Some(opened) = self.steps[*step].closes
                && reply.result != CANCELED
                && let Some(fd) = self.fds.remove(&opened)
            {
                let _ = fd.into_raw();
            }
            self.replies.push(reply);
            self.fds.extend(fd.map(|fd| (*step, fd)));
        }
    }

    fn done(self, round_trips: usize) -> Result<Done> {
        let failed = self.replies.iter().position(|reply| reply.value().is_err());
        let Some(step) = failed else {
            let Self { chain, replies, fds, .. } = self;
            return Ok(Done { chain, replies, taken: Vec::new(), fds, round_trips });
        };
        let errno = self.replies[step].value().err().unwrap_or(Errno::UnknownErrno);
        let later = self.replies.iter().zip(&self.steps).enumerate().skip(step + 1);
        let skipped = later
            .filter(|(_, (reply, _))| reply.result == CANCELED)
            .map(|(index, (_, step))| (index, step.name))
            .collect();
        let call = self.steps[step].name;
        Err(Error::Chain(ChainError { step, call, errno, skipped, round_trips }))
    }
}
