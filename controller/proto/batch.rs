//! A batch: calls that are sent together, as one value.
//!
//! A batch has bytes that lie in the process's memory before its first step (the input), room behind
//! them for what calls leave (the output), and steps. An argument of a step is a number, the result of
//! an earlier step, or a place in the batch's memory; a pointer inside of the input is a place too. So a
//! batch is built without knowing where its memory will lie.
//!
//! ```text
//!   memory ├─ input ─────────┤├─ output ────────┤
//!               ▲                 ▲       │
//!   steps   openat(…, Input, …)   │       │
//!           read(Result, Output, 4096)    │
//!           COPY_OUT(Output, Result) ◀────┘
//!           close(Result)
//! ```
//! A [`Run`] turns it into calls, once it is known where the memory lies. It splits a long batch into
//! parts, because a REF reaches back [`MAX_REF`] calls and no further: what refers to an earlier part is
//! a value by then, and what is linked to a failure there is not sent.
//!
//! In a part the input comes first, as a COPY_IN. A COPY_OUT of the batch's own memory that no later
//! step names moves to the end. A ring needs neither: it shares that memory, and what is left between
//! are calls alone.

use std::ops::Range;
use std::sync::Arc;

use nix::errno::Errno;
use smallvec::SmallVec;
use syscalls::Sysno;

use crate::abi::wire::{MAX_REF, Operation, Request, Word};
use crate::error::{Error, Result};
use crate::proto::stream::MAX_DATA;
use crate::proto::tag::Tag;
use crate::proto::{Call, Reply};

/// The reply of a step that is not executed.
const CANCELED: Reply = Reply { result: -(Errno::ECANCELED as i64), data: Vec::new() };

/// An argument of a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Arg {
    /// A number.
    Value(u64),
    /// The result of the step with that index.
    Result(usize),
    /// The address of that byte of the input.
    Input(usize),
    /// The address of that byte of the output.
    Output(usize),
    /// The index of an entry of the registry: so many behind the first one that is set aside for the
    /// batch.
    Slot(u64),
}

impl From<u64> for Arg {
    fn from(value: u64) -> Self {
        Self::Value(value)
    }
}

/// As C passes an int: with its sign.
impl From<i32> for Arg {
    fn from(value: i32) -> Self {
        Self::Value(i64::from(value).cast_unsigned())
    }
}

/// Arguments, filled up with zeros.
fn filled<const N: usize>(some: [Arg; N]) -> [Arg; 6] {
    let mut all = [Arg::Value(0); 6];
    all[..N].copy_from_slice(&some);
    all
}

impl Arg {
    /// The place `bytes` further on in the batch's memory. Other arguments are returned as they are.
    pub(crate) fn offset(self, bytes: usize) -> Self {
        match self {
            Self::Input(at) => Self::Input(at.saturating_add(bytes)),
            Self::Output(at) => Self::Output(at.saturating_add(bytes)),
            other => other,
        }
    }
}

/// What a step makes, if it succeeds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Makes {
    /// Nothing that has to be given back.
    #[default]
    Nothing,
    /// A descriptor, which is its result.
    Fd,
    /// The same, with a name in the registry, in an entry with that tag.
    NamedFd(Tag),
}

/// One system call, or one operation of the server.
#[derive(Clone, Debug)]
pub(crate) struct Step {
    /// The call's name in its man page, or the operation's in the protocol.
    pub(crate) name: &'static str,
    /// The number of the system call or operation, with [`Word::OP`] for the latter.
    pub(crate) word: u64,
    pub(crate) args: [Arg; 6],
    /// It is executed only if the step before it succeeded.
    pub(crate) linked: bool,
    /// It never waits, as who makes it knows, though others of its kind may.
    pub(crate) quick: bool,
    pub(crate) makes: Makes,
    /// It closes the descriptor that this step makes.
    pub(crate) closes: Option<usize>,
    /// It is a KEEP, which is about the step behind it and is sent with that.
    pub(crate) keeps: bool,
}

impl Step {
    pub(crate) fn new(name: &'static str, word: u64, args: [Arg; 6]) -> Self {
        let (makes, closes) = (Makes::Nothing, None);
        Self { name, word, args, linked: true, quick: false, makes, closes, keeps: false }
    }

    fn is(&self, operation: Operation) -> bool {
        self.word == Word::OP | operation as u64
    }

    /// Whether the server is gone when it succeeds.
    fn ends(&self) -> bool {
        let ends = [Sysno::execve, Sysno::execveat, Sysno::exit, Sysno::exit_group];
        ends.iter().any(|number| self.word == number.id() as u64)
    }
}

/// Calls that are sent together.
#[derive(Debug, Default)]
pub(crate) struct Batch {
    input: Vec<u8>,
    output: usize,
    /// Where each piece of the input and of the output begins, in order.
    inputs: Pieces,
    outputs: Pieces,
    /// Pointers inside of the input: where they are, and what they point to.
    pointers: Vec<(usize, Arg)>,
    steps: Vec<Step>,
}

/// Where pieces of memory begin, or the places of calls. Most batches have few.
type Pieces = SmallVec<[usize; 4]>;

/// Where the memory of a batch lies in the process.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Places {
    /// The address of [`Batch::size`] bytes, a multiple of 8.
    pub(crate) memory: u64,
    /// The first entry of the registry that is set aside for the batch.
    pub(crate) slot: u64,
}

impl Batch {
    /// Bytes that lie in the process's memory, at a multiple of 8, before the first step.
    pub(crate) fn input(&mut self, bytes: &[u8]) -> Arg {
        let at = self.input.len().next_multiple_of(8);
        self.input.resize(at, 0);
        self.input.extend_from_slice(bytes);
        self.inputs.push(at);
        Arg::Input(at)
    }

    /// `len` bytes of the process's memory, at a multiple of 8, for what steps leave.
    pub(crate) fn output(&mut self, len: usize) -> Arg {
        let at = self.output.next_multiple_of(8);
        // What is too much is refused when memory is asked for.
        self.output = at.saturating_add(len);
        self.outputs.push(at);
        Arg::Output(at)
    }

    /// The 8 bytes at `place`, of the input, are the address of `to`, a place of this batch.
    pub(crate) fn point(&mut self, place: Arg, to: Arg) {
        if let Arg::Input(at) = place {
            self.pointers.push((at, to));
        }
    }

    /// Adds a system call that is executed only if the step before it succeeded, and returns its index.
    pub(crate) fn syscall<const N: usize>(&mut self, number: Sysno, args: [Arg; N]) -> usize {
        // Numbers are small and positive.
        self.push(Step::new(number.name(), number.id() as u64, filled(args)))
    }

    /// Adds an operation of the server, in the same way.
    pub(crate) fn operation<const N: usize>(
        &mut self,
        operation: Operation,
        args: [Arg; N],
    ) -> usize {
        self.push(Step::new(operation.name(), Word::OP | operation as u64, filled(args)))
    }

    /// The step with that index is executed whatever has become of the one before it.
    pub(crate) fn unlink(&mut self, index: usize) {
        self.step_mut(index).linked = false;
    }

    /// Adds a step, and returns its index.
    pub(crate) fn push(&mut self, step: Step) -> usize {
        self.steps.push(step);
        self.steps.len() - 1
    }

    /// The step with that index.
    pub(crate) fn step_mut(&mut self, index: usize) -> &mut Step {
        &mut self.steps[index]
    }

    /// Bytes of memory that the batch needs in the process.
    pub(crate) fn size(&self) -> usize {
        self.input.len().next_multiple_of(8).saturating_add(self.output)
    }

    /// The batch as one part. It has no more than [`MAX_REF`] steps, with its input. For a server of version
    /// 0, which knows neither links nor references, its steps have none.
    pub(crate) fn whole(self, places: Places) -> Part {
        self.run(places, MAX_REF as usize).whole()
    }

    /// The batch as calls, in parts of at most `at_once` (at least 1, at most [`MAX_REF`]).
    pub(crate) fn run(self, places: Places, at_once: usize) -> Run {
        let Self { mut input, inputs, outputs, pointers, steps, .. } = self;
        let behind = places.memory + input.len().next_multiple_of(8) as u64;
        let memory = Memory { places, behind, inputs, outputs, pointers };
        for (at, to) in &memory.pointers {
            let address = memory.value(*to).unwrap_or_default().to_le_bytes();
            input[*at..*at + address.len()].copy_from_slice(&address);
        }
        let input = (!input.is_empty()).then(|| Call::copy_in(places.memory, input));
        let at_once = at_once.clamp(1, MAX_REF as usize);
        let replies = Vec::with_capacity(steps.len());
        Run { steps: Arc::new(steps), memory, input, at_once, replies }
    }
}

/// Where the places of a batch are.
#[derive(Debug)]
struct Memory {
    places: Places,
    /// Where the output begins.
    behind: u64,
    inputs: Pieces,
    outputs: Pieces,
    pointers: Vec<(usize, Arg)>,
}

/// A piece of a batch's memory: what one call of [`Batch::input`] or [`Batch::output`] has asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Piece {
    Input(usize),
    Output(usize),
}

impl Memory {
    /// What is known of an argument before any step is executed.
    fn value(&self, arg: Arg) -> Option<u64> {
        Some(match arg {
            Arg::Value(value) => value,
            Arg::Input(at) => self.places.memory + at as u64,
            Arg::Output(at) => self.behind + at as u64,
            Arg::Slot(index) => self.places.slot + index,
            Arg::Result(_) => return None,
        })
    }

    /// The piece that a place is in.
    fn piece(&self, arg: Arg) -> Option<Piece> {
        let (starts, at, piece): (_, _, fn(usize) -> Piece) = match arg {
            Arg::Input(at) => (&self.inputs, at, Piece::Input),
            Arg::Output(at) => (&self.outputs, at, Piece::Output),
            Arg::Value(_) | Arg::Result(_) | Arg::Slot(_) => return None,
        };
        // One that is empty begins where the next one does: whoever means either means both.
        starts.partition_point(|start| *start <= at).checked_sub(1).map(piece)
    }

    /// Whether a step may reach `piece`: it names it, or what points to it.
    fn reaches(&self, step: &Step, piece: Piece) -> bool {
        step.args.iter().filter_map(|arg| self.piece(*arg)).any(|named| self.leads(named, piece, 8))
    }

    /// Whether `from` is `to`, or has a pointer that leads there, over at most `most` others.
    fn leads(&self, from: Piece, to: Piece, most: u32) -> bool {
        let points = |at: usize| self.piece(Arg::Input(at)) == Some(from);
        let mut next = self.pointers.iter().filter(|(at, _)| points(*at));
        let follow = |(_, target): &(usize, Arg)| {
            // Of a longer way nothing is known.
            most == 0 || self.piece(*target).is_some_and(|target| self.leads(target, to, most - 1))
        };
        from == to || next.any(follow)
    }
}

/// A batch that is being executed.
#[derive(Debug)]
pub(crate) struct Run {
    steps: Arc<Vec<Step>>,
    memory: Memory,
    /// COPY_IN of the input, until it has been sent.
    input: Option<Call>,
    at_once: usize,
    /// The replies of the steps so far.
    replies: Vec<Reply>,
}

/// Steps in a row, as calls.
#[derive(Debug)]
pub(crate) struct Part {
    pub(crate) calls: Vec<Call>,
    pub(crate) steps: PartSteps,
}

/// Which steps the calls of a [`Part`] are.
#[derive(Debug)]
pub(crate) struct PartSteps {
    all: Arc<Vec<Step>>,
    /// The index of its first step.
    first: usize,
    /// The first call is the COPY_IN of the input.
    has_input: bool,
    /// For each step the place of its call.
    places: Pieces,
}

impl Run {
    /// The next part, or `None` if nothing is left to be sent: then there are all replies.
    pub(crate) fn next(&mut self) -> Option<Part> {
        while self.replies.len() < self.steps.len() || self.input.is_some() {
            let part = self.part();
            if !part.calls.is_empty() {
                return Some(part);
            }
            // What comes next depends on what has failed.
            self.replies.push(CANCELED);
        }
        None
    }

    /// All of it, as the only part.
    pub(crate) fn whole(mut self) -> Part {
        let part = self.part();
        debug_assert_eq!(part.steps.places.len(), self.steps.len(), "a batch of several parts");
        part
    }

    /// The same, whose input is not sent if `write` can put it where it belongs.
    pub(crate) fn whole_with_input(mut self, write: impl FnOnce(&[u8]) -> bool) -> Part {
        self.input.take_if(|call| write(&call.payload));
        self.whole()
    }

    fn part(&mut self) -> Part {
        let first = self.replies.len();
        let mut calls = Vec::from_iter(self.input.take());
        let has_input = !calls.is_empty();
        let steps = first..self.end_of_part(first, has_input);
        calls.reserve(steps.len());
        let mut places = Pieces::from_elem(0, steps.len());
        let mut moved = Pieces::new();
        for step in steps.clone() {
            if self.can_move(step, &steps) {
                moved.push(step);
                continue;
            }
            places[step - first] = calls.len();
            calls.push(self.call(step, first, &places, false));
        }
        for step in moved {
            places[step - first] = calls.len();
            calls.push(self.call(step, first, &places, true));
        }
        Part { calls, steps: PartSteps { all: self.steps.clone(), first, has_input, places } }
    }

    /// Where the part ends that begins with step `first`: before a step that can't be executed any more
    /// because of a failure in an earlier part, and else when it is full.
    fn end_of_part(&self, first: usize, has_input: bool) -> usize {
        let mut end = first;
        while let Some(step) = self.steps.get(end) {
            let calls = end - first + usize::from(has_input);
            // A KEEP goes with the step that it is about.
            let torn = end > first && self.steps[end - 1].keeps;
            let is_full = calls > 0 && calls + usize::from(step.keeps) >= self.at_once;
            if self.is_canceled(end, first) || (is_full && !torn) {
                break;
            }
            end += 1;
        }
        end
    }

    /// Whether what a step of the part needs has failed in an earlier part.
    fn is_canceled(&self, step: usize, first: usize) -> bool {
        let failed =
            |index: usize| self.replies.get(index).is_some_and(|reply| reply.value().is_err());
        let Step { linked, args, .. } = &self.steps[step];
        let needs = |arg: &Arg| matches!(arg, Arg::Result(of) if failed(*of));
        args.iter().any(needs) || (*linked && step == first && step > 0 && failed(step - 1))
    }

    /// Whether a step is a COPY_OUT that can as well be executed behind all others of the part: none of
    /// those behind it reaches the memory that it copies, refers to it, or is executed in other cases than
    /// it would be without it.
    fn can_move(&self, step: usize, part: &Range<usize>) -> bool {
        let copy = &self.steps[step];
        if !copy.is(Operation::CopyOut) || matches!(copy.args[1], Arg::Value(len) if len > MAX_DATA)
        {
            return false;
        }
        let piece = self.memory.piece(copy.args[0]).filter(|_| step > part.start);
        let Some(piece) = piece else { return false };
        let behind = &self.steps[step + 1..part.end];
        let is_free = |other: &Step| {
            let refers = other.args.contains(&Arg::Result(step));
            let reads = other.is(Operation::CopyOut) || other.is(Operation::Load);
            !refers && !other.ends() && (reads || !self.memory.reaches(other, piece))
        };
        let follows = behind.first().is_some_and(|next| next.linked);
        behind.iter().all(is_free) && (!follows || self.is_implied(step, part))
    }

    /// Whether a COPY_OUT is executed whenever the call before it has succeeded: all that it refers to
    /// has succeeded then.
    fn is_implied(&self, step: usize, part: &Range<usize>) -> bool {
        let refers = self.steps[step].args.iter().filter_map(|arg| match arg {
            Arg::Result(of) if part.contains(of) => Some(*of),
            _ => None,
        });
        let oldest = refers.min().unwrap_or(step - 1);
        self.steps[oldest + 1..=step].iter().all(|step| step.linked)
    }

    /// A step as a call, behind those whose places in the part are known.
    fn call(&self, index: usize, first: usize, places: &[usize], is_moved: bool) -> Call {
        let step = &self.steps[index];
        let place = places[index - first];
        let mut word = step.word;
        let mut args = step.args;
        if step.linked {
            let before = if index > first { Some(places[index - 1 - first]) } else { None };
            match before {
                // COPY_OUT takes two arguments: a reference in the place of a third one ties it to the
                // step that it was linked to.
                Some(before) if is_moved && before + 1 != place => {
                    args[2] = Arg::Result(index - 1);
                }
                // Nothing is before it, and what an earlier part has left has succeeded.
                None if place == 0 => {}
                _ => word |= Word::LINK,
            }
        }
        let mut values = [0; 6];
        for (at, (value, arg)) in (0u32..).zip(values.iter_mut().zip(args)) {
            *value = match arg {
                Arg::Result(of) if of >= first => {
                    word |= Word::reference(at);
                    (place - places[of - first]) as u64
                }
                // It has succeeded: else the step would not be in this part.
                Arg::Result(of) => self.replies[of].value().unwrap_or_default(),
                known => self.memory.value(known).unwrap_or_default(),
            };
        }
        Call { quick: step.quick, ..Request { word, args: values }.into() }
    }

    /// The replies of a part, as [`PartSteps::in_order`] has returned them.
    pub(crate) fn take(&mut self, replies: Vec<Reply>) {
        self.replies.extend(replies);
    }

    /// Whether a step that has a reply was executed.
    pub(crate) fn has_begun(&self) -> bool {
        self.replies.iter().any(|reply| !reply.is_canceled())
    }

    /// All steps, and their replies.
    pub(crate) fn finish(self) -> (Arc<Vec<Step>>, Vec<Reply>) {
        (self.steps, self.replies)
    }
}

impl PartSteps {
    /// The replies in the order of the steps, from those of the calls.
    pub(crate) fn in_order(&self, mut replies: Vec<Reply>) -> Result<Vec<Reply>> {
        if self.has_input {
            let written = replies.first().ok_or(Error::Protocol("too few replies"))?;
            written.value().map_err(Error::call("COPY_IN"))?;
        }
        let in_order = || self.places.iter().enumerate().all(|(step, place)| step == *place);
        if replies.len() == self.places.len() && in_order() {
            return Ok(replies);
        }
        let mut take = |place: &usize| replies.get_mut(*place).map(std::mem::take);
        let ordered: Option<Vec<Reply>> = self.places.iter().map(&mut take).collect();
        ordered.ok_or(Error::Protocol("too few replies"))
    }

    /// The first of the steps of the part from one index to another that has failed, as an error. Those that
    /// are linked to it were not executed.
    pub(crate) fn failed(&self, replies: &[Reply], steps: Range<usize>) -> Option<Error> {
        let mut called = self.steps().iter().zip(replies).take(steps.end).skip(steps.start);
        called.find_map(|(step, reply)| reply.value().err().map(Error::call(step.name)))
    }

    /// The result of a step of the part, from the replies in their order.
    pub(crate) fn value(&self, replies: &[Reply], step: usize) -> Result<u64> {
        let reply = replies.get(step).ok_or(Error::Protocol("too few replies"))?;
        reply.value().map_err(Error::call(self.steps()[step].name))
    }

    /// The steps of the part, in order.
    pub(crate) fn steps(&self) -> &[Step] {
        &self.all[self.first..self.first + self.places.len()]
    }

    /// The index of the first of them in the batch.
    pub(crate) fn first(&self) -> usize {
        self.first
    }
}

impl Reply {
    /// Whether it is that of a call that was not executed, because one that it needs has failed.
    pub(crate) fn is_canceled(&self) -> bool {
        self.result == CANCELED.result
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use proptest::prelude::*;
    use proptest::sample::Index;

    use super::*;

    /// Where the memory of the batches lies.
    const BASE: u64 = 0x1_0000;

    /// Puts `args[1]` bytes to `args[0]`, and returns how many.
    const FILL: u64 = 1;
    /// Returns a number that all arguments and the byte at `args[0]` have made.
    const MIX: u64 = 2;
    /// Fails.
    const FAIL: u64 = 3;

    /// Memory of a process, and what the calls of these tests do there.
    #[derive(Default)]
    struct Process(HashMap<u64, u8>);

    impl Process {
        fn byte(&self, address: u64) -> u8 {
            self.0.get(&address).copied().unwrap_or_default()
        }

        fn execute(&mut self, word: u64, args: [u64; 6], payload: &[u8]) -> Reply {
            let [first, second, ..] = args;
            let result = |result| Reply { result, data: Vec::new() };
            if word & Word::OP == 0 {
                return result(match word & Word::NUMBER {
                    FILL => {
                        for at in 0..second.min(32) {
                            let byte = self.byte(first + at).wrapping_mul(3).wrapping_add(7);
                            self.0.insert(first + at, byte);
                        }
                        second.min(32) as i64
                    }
                    // No more than a piece has.
                    MIX => (args.iter().sum::<u64>() % 31 + u64::from(self.byte(first)) % 9) as i64,
                    _ => -2,
                });
            }
            let copy_in = Operation::CopyIn as u64;
            if word & Word::NUMBER == copy_in {
                self.0.extend((first..).zip(payload.iter().copied()));
                return result(payload.len() as i64);
            }
            let data = (first..first + second).map(|at| self.byte(at)).collect();
            Reply { result: second as i64, data }
        }
    }

    /// Executes calls as a server does.
    fn serve(process: &mut Process, calls: &[Call]) -> Vec<Reply> {
        let mut replies: Vec<Reply> = Vec::new();
        for call in calls {
            let Request { word, mut args } = call.request;
            let before = |back: u64| {
                let at = replies.len().checked_sub(back as usize)?;
                replies.get(at)?.value().ok()
            };
            let mut is_executed = word & Word::LINK == 0 || before(1).is_some();
            for (index, arg) in (0..).zip(&mut args) {
                if word & Word::reference(index) != 0 {
                    assert!((1..=MAX_REF).contains(arg));
                    is_executed &= before(*arg).is_some();
                    *arg = before(*arg).unwrap_or_default();
                }
            }
            let reply = match is_executed {
                true => process.execute(word, args, &call.payload),
                false => CANCELED,
            };
            replies.push(reply);
        }
        replies
    }

    /// Executes the steps of a batch one by one, which is what a batch means.
    fn expected(
        process: &mut Process,
        input: &[u8],
        steps: &[Step],
        memory: &Memory,
    ) -> Vec<Reply> {
        process.0.extend((BASE..).zip(input.iter().copied()));
        let mut replies: Vec<Reply> = Vec::new();
        for step in steps {
            let mut is_executed =
                !step.linked || replies.last().is_none_or(|before| before.value().is_ok());
            let args = step.args.map(|arg| match arg {
                Arg::Result(of) => {
                    is_executed &= replies[of].value().is_ok();
                    replies[of].value().unwrap_or_default()
                }
                known => memory.value(known).unwrap(),
            });
            let reply = match is_executed {
                true => process.execute(step.word, args, &[]),
                false => CANCELED,
            };
            replies.push(reply);
        }
        replies
    }

    #[derive(Clone, Debug)]
    enum What {
        Fill { piece: usize, len: u8 },
        Mix { piece: usize },
        Fail,
        Out { piece: usize, len: Option<u8> },
    }

    fn steps() -> impl Strategy<Value = Vec<(What, bool, Option<Index>)>> {
        let what = prop_oneof![
            3 => (0..4_usize, 0..40_u8).prop_map(|(piece, len)| What::Fill { piece, len }),
            2 => (0..4_usize).prop_map(|piece| What::Mix { piece }),
            1 => Just(What::Fail),
            4 => (0..4_usize, prop::option::of(0..40_u8))
                .prop_map(|(piece, len)| What::Out { piece, len }),
        ];
        let step = (what, prop::bool::weighted(0.8), prop::option::of(any::<Index>()));
        prop_oneof![
            4 => prop::collection::vec(step.clone(), 1..12),
            1 => prop::collection::vec(step, 60..150),
        ]
    }

    /// A batch with four pieces of memory, of which the first has a pointer to the third.
    fn batch(steps: &[(What, bool, Option<Index>)]) -> Batch {
        let mut batch = Batch::default();
        let input = [batch.input(&[0; 40]), batch.input(&[9; 40])];
        let pieces = [input[0], input[1], batch.output(40), batch.output(40)];
        batch.point(pieces[0], pieces[2]);
        for (what, linked, refers) in steps {
            let index = batch.steps.len();
            let earlier = |of: &Index| Arg::Result(of.index(index));
            let earlier = refers.as_ref().filter(|_| index > 0).map(earlier);
            let number = |number: u64| Arg::Value(number);
            let place = |piece: &usize| pieces[*piece];
            let (word, args) = match what {
                What::Fill { piece, len } => {
                    (FILL, [place(piece), earlier.unwrap_or(number((*len).into()))])
                }
                What::Mix { piece } => (MIX, [place(piece), earlier.unwrap_or(number(5))]),
                What::Fail => (FAIL, [number(0), number(0)]),
                What::Out { piece, len } => {
                    let len = len.map(|len| number(len.into())).or(earlier).unwrap_or(number(8));
                    (Word::OP | Operation::CopyOut as u64, [place(piece), len])
                }
            };
            let zero = number(0);
            let mut step = Step::new("", word, [args[0], args[1], zero, zero, zero, zero]);
            step.linked = *linked;
            batch.push(step);
        }
        batch
    }

    proptest! {
        #[test]
        fn a_batch_in_parts_of_any_size_leaves_what_its_steps_leave_one_by_one(
            steps in steps(), at_once in 1..=64_usize
        ) {
            let places = Places { memory: BASE, slot: 0 };
            let mut run = batch(&steps).run(places, at_once);
            let input = run.input.as_ref().map(|call| call.payload.clone()).unwrap_or_default();
            let expected = expected(&mut Process::default(), &input, &run.steps, &run.memory);
            let mut process = Process::default();
            while let Some(part) = run.next() {
                prop_assert!(part.calls.len() <= at_once);
                let replies = serve(&mut process, &part.calls);
                run.take(part.steps.in_order(replies).unwrap());
            }
            prop_assert_eq!(run.finish().1, expected);
        }
    }

    /// The operations of a batch's only part, in order.
    fn operations(batch: Batch) -> Vec<u64> {
        let part = batch.run(Places { memory: BASE, slot: 0 }, 64).next().unwrap();
        part.calls.iter().map(|call| call.request.word & (Word::OP | Word::NUMBER)).collect()
    }

    const OUT: u64 = Word::OP | Operation::CopyOut as u64;

    #[test]
    fn bytes_are_copied_out_behind_all_calls_unless_a_later_one_reaches_them() {
        let out = |piece| (What::Out { piece, len: None }, true, None);
        let fill = |piece| (What::Fill { piece, len: 9 }, true, None);
        let copy_in = Word::OP | Operation::CopyIn as u64;
        assert_eq!(operations(batch(&[fill(3), out(3), fill(1)])), [copy_in, FILL, FILL, OUT]);
        assert_eq!(operations(batch(&[fill(3), out(3), fill(3)])), [copy_in, FILL, OUT, FILL]);
        // The first piece has a pointer to the third one.
        assert_eq!(operations(batch(&[fill(2), out(2), fill(0)])), [copy_in, FILL, OUT, FILL]);
    }
}
