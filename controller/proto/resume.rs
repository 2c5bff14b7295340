//! What becomes of a batch whose link was lost, once the server's log says how far it came.
//!
//! ```text
//!          replies here    executed: replies from the log    not executed: sent again
//!   calls ├──────────────┼────────────────────────────────┼──────────────────────────┤
//! ```
//! What is sent again keeps its order and its distances: a REF or LINK that reaches a call that was
//! executed is replaced by what it stands for. In front come the COPY_OUTs that were executed and
//! whose bytes were lost: their buffers belong to the batch until it is complete. A KEEP that the end
//! of the connection has undone is sent again with the call that it is about, also if it has been
//! answered.

use crate::abi::log::Record;
use crate::abi::wire::{MAX_REF, Operation, Word};
use crate::proto::{Call, Reply};

/// The calls of a batch that have no reply yet, and the replies to all of its calls.
#[derive(Debug)]
pub struct Unanswered {
    /// In order.
    pub calls: Vec<Call>,
    /// In front of them is a KEEP that has been answered, and whose next call has not.
    pub kept: bool,
    /// The server has had so many of the others, or may have.
    pub sent: usize,
    /// Of the calls that have replies, some did more than to prepare the others.
    pub begun: bool,
    /// A reply for each call of the batch, or none for those in `calls`.
    pub replies: Vec<Option<Reply>>,
}

/// What has become of it.
#[derive(Debug)]
pub enum Resumed {
    /// All was executed.
    Complete(Vec<Reply>),
    /// It goes on.
    Again {
        /// What is to be sent.
        calls: Vec<Call>,
        /// The replies to all of the batch, with a free place for each of these calls.
        replies: Vec<Option<Reply>>,
    },
    /// Some or all were executed, and nobody knows any more with what result.
    ResultLost,
}

impl Unanswered {
    /// How many of the calls have been executed, if `executed` of those without an answer and behind
    /// have been.
    ///
    /// A KEEP at the end does not count: it is about the call behind it, and the end of the
    /// connection has undone it.
    #[must_use]
    pub fn executed(&self, executed: u64) -> usize {
        let executed = usize::try_from(executed).unwrap_or(usize::MAX).min(self.sent);
        let executed = executed + usize::from(self.kept);
        match self.calls.get(..executed) {
            Some([.., last]) if executed < self.calls.len() && is_keep(last) => executed - 1,
            _ => executed,
        }
    }

    /// Whether the batch has begun for those who see only what it is for, if so many of the calls
    /// have been executed: bytes in memory of the batch's own do not count.
    #[must_use]
    pub fn has_begun(&self, executed: usize) -> bool {
        let only_prepares = || self.calls.iter().all(prepares);
        let some = || executed > 0 || self.replies.iter().any(Option::is_some);
        self.begun || !self.calls[..executed].iter().all(prepares) || (only_prepares() && some())
    }

    /// Goes on where the server stopped: `executed` calls are done, and `record` tells what call
    /// `i` of those without an answer was and returned.
    #[must_use]
    pub fn resume<'a>(
        self,
        executed: usize,
        record: impl Fn(usize) -> Option<&'a Record>,
    ) -> Resumed {
        let Self { calls, kept, mut replies, .. } = self;
        let free: Vec<usize> = (0..replies.len()).filter(|i| replies[*i].is_none()).collect();
        let mut again = Vec::new();
        let mut results = Vec::with_capacity(executed);
        for (i, call) in calls[..executed].iter().enumerate() {
            if kept && i == 0 {
                replies[free[i]] = Some(Reply::default());
                results.push(0);
                continue;
            }
            let same = |record: &&Record| what(record.request.word) == what(call.request.word);
            let record = record(i - usize::from(kept)).filter(same);
            let Some(record) = record else { return Resumed::ResultLost };
            let reply = Reply { result: record.result, data: Vec::new() };
            results.push(record.result);
            match (call.data_len(), reply.value()) {
                (Some(_), Ok(len)) => {
                    let args = [record.request.args[0], len, 0, 0, 0, 0];
                    again.push(Call::operation(Operation::CopyOut, args));
                }
                _ => replies[free[i]] = Some(reply),
            }
        }
        // What lies before the first of `calls` has replies already.
        let before = free.first().copied().unwrap_or(0);
        let earlier = |i: usize, distance: u64| {
            // What reaches no call is left as it is: the server knows that as well.
            let distance = Some(distance).filter(|distance| (1..=MAX_REF).contains(distance))?;
            let distance = distance as usize;
            match i.checked_sub(distance) {
                Some(target) if target >= executed => None,
                Some(target) => Some(results[target]),
                None => Some(
                    (before + i)
                        .checked_sub(distance)
                        .and_then(|place| replies.get(place)?.as_ref())
                        .map_or(CANCELED, |reply| reply.result),
                ),
            }
        };
        let rest = calls.iter().enumerate().skip(executed);
        again.extend(rest.map(|(i, call)| resolved(call.clone(), |distance| earlier(i, distance))));
        if again.is_empty() {
            return Resumed::Complete(replies.into_iter().flatten().collect());
        }
        Resumed::Again { calls: again, replies }
    }
}

const CANCELED: i64 = -(nix::libc::ECANCELED as i64);

/// What a word asks for, whatever else it says.
fn what(word: u64) -> u64 {
    word & (Word::OP | Word::NUMBER)
}

fn is(call: &Call, operation: Operation) -> bool {
    what(call.request.word) == Word::OP | operation as u64
}

/// Whether a call is a KEEP.
pub(super) fn is_keep(call: &Call) -> bool {
    is(call, Operation::Keep)
}

/// Whether a call only prepares one behind it.
pub(super) fn prepares(call: &Call) -> bool {
    is_keep(call) || is(call, Operation::CopyIn)
}

/// The call, with what `earlier` knows in the place of references to it.
fn resolved(mut call: Call, earlier: impl Fn(u64) -> Option<i64>) -> Call {
    let result = |distance| {
        let result = earlier(distance)?;
        Some(Reply { result, data: Vec::new() }.value().ok())
    };
    let word = call.request.word;
    let mut canceled = false;
    if word & Word::LINK != 0
        && let Some(before) = result(1)
    {
        call.request.word &= !Word::LINK;
        canceled |= before.is_none();
    }
    for (index, argument) in (0..).zip(&mut call.request.args) {
        if word & Word::reference(index) != 0
            && let Some(value) = result(*argument)
        {
            canceled |= value.is_none();
            if let Some(value) = value {
                call.request.word &= !Word::reference(index);
                *argument = value;
            } else {
                // It refers to no call: the server does not execute it either.
                *argument = 0;
            }
        }
    }
    if canceled {
        // The same, also where the payload behind it has to be told by its length.
        call.request.word |= Word::reference(0);
        call.request.args[0] = 0;
    }
    call
}
