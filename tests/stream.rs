//! The stream's protocol, with two ends in memory: [`Stream`] and a small model of a server.
//!
//! Bytes are split anywhere in both directions, batches are pushed at any time, and the stream ends
//! at any point. Every batch has a tag, and what became of each is compared with the model.

mod model;

use std::collections::BTreeSet;

use farcall::proto::stream::Stream;
use farcall::proto::{Call, Reply};
use model::{Pair, batch, reply_to};
use proptest::prelude::*;

/// One thing that happens.
#[derive(Clone, Debug)]
enum Step {
    Push(Vec<Call>),
    /// So many bytes of what there is to write go out; with `held`, nothing new is begun.
    Write {
        at_most: usize,
        held: bool,
    },
    /// So many bytes reach the server, which executes what is whole.
    Serve(usize),
    /// So many bytes of the server's answers come back.
    Receive(usize),
    /// The stream ends; what is under way in either direction is lost.
    Disconnect,
    /// The server speaks another version from here on.
    Version(u32),
}

/// How many bytes move at once: often few, sometimes everything.
fn amount() -> impl Strategy<Value = usize> {
    prop_oneof![3 => 0..20_usize, 3 => 50..400_usize, 2 => Just(usize::MAX)]
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        6 => batch().prop_map(Step::Push),
        10 => (amount(), prop::bool::weighted(0.2))
            .prop_map(|(at_most, held)| Step::Write { at_most, held }),
        10 => amount().prop_map(Step::Serve),
        10 => amount().prop_map(Step::Receive),
        1 => Just(Step::Disconnect),
        1 => (0..2_u32).prop_map(Step::Version),
    ]
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    prop::collection::vec(step(), 1..80)
}

fn run(pair: &mut Pair, steps: Vec<Step>) {
    for step in steps {
        match step {
            Step::Push(calls) => pair.push(calls),
            Step::Write { at_most, held } => pair.write(at_most, held),
            Step::Serve(n) => pair.serve(n),
            Step::Receive(n) => pair.receive(n),
            Step::Disconnect => pair.disconnect(),
            Step::Version(version) => pair.set_version(version),
        }
        pair.check();
    }
}

proptest! {
    #[test]
    fn every_batch_is_answered_or_lost_exactly_once_however_bytes_are_split(steps in steps()) {
        let mut pair = Pair::default();
        run(&mut pair, steps);
        pair.finish();
        let mut fates = pair.answered.clone();
        fates.extend(&pair.lost);
        fates.sort_unstable();
        let all: Vec<usize> = (0..pair.pushed()).collect();
        prop_assert_eq!(fates, all);
        // What was lost may have been executed; all else was, once and as a whole.
        let lost: BTreeSet<usize> = pair.lost.iter().copied().collect();
        for tag in pair.answered.clone() {
            prop_assert!(!lost.contains(&tag));
            prop_assert_eq!(pair.executed_of(tag), pair.calls_of(tag));
        }
    }

    #[test]
    fn without_a_disconnect_nothing_is_lost_and_everything_is_answered_in_order(
        steps in steps().prop_map(|mut steps| {
            steps.retain(|step| !matches!(step, Step::Disconnect));
            steps
        })
    ) {
        let mut pair = Pair::default();
        run(&mut pair, steps);
        pair.finish();
        prop_assert!(pair.lost.is_empty());
        prop_assert_eq!(pair.answered.clone(), (0..pair.pushed()).collect::<Vec<_>>());
    }

    #[test]
    fn abandoning_returns_what_was_never_written(steps in steps()) {
        let mut pair = Pair::default();
        run(&mut pair, steps);
        pair.disconnect();
        let queued = pair.queued();
        prop_assert_eq!(pair.abandon(), queued.clone());
        for tag in queued {
            prop_assert_eq!(pair.executed_of(tag), 0);
        }
        pair.check();
    }

    #[test]
    fn held_is_quiet_once_the_batch_that_was_begun_is_written(
        batches in prop::collection::vec(batch(), 1..6),
        begun in 0..600_usize,
    ) {
        let mut pair = Pair::default();
        batches.into_iter().for_each(|calls| pair.push(calls));
        pair.write(begun, false);
        let torn = pair.is_torn();
        let waiting = pair.queued().len();
        pair.write_all_held();
        prop_assert!(!pair.is_torn());
        prop_assert_eq!(pair.queued().len(), waiting - usize::from(torn));
        pair.finish();
        prop_assert!(pair.lost.is_empty());
    }

    #[test]
    fn any_bytes_are_an_error_or_a_valid_completion(
        steps in steps(),
        garbage in prop::collection::vec(garbage(), 1..40),
        next in prop::collection::vec(batch(), 0..4),
    ) {
        let mut pair = Pair::default();
        run(&mut pair, steps);
        for garbage in garbage {
            match garbage {
                Garbage::Bytes(bytes) => {
                    if !pair.receive_garbage(&bytes) {
                        break;
                    }
                }
                Garbage::Real { at, with } => {
                    pair.serve(usize::MAX);
                    if !pair.receive_garbled(at, with) {
                        break;
                    }
                }
                Garbage::Write(n) => pair.write(n, false),
            }
        }
        // Nothing of it reaches the next stream.
        pair.disconnect();
        pair.check();
        let before = pair.answered.len();
        let expected: Vec<usize> =
            pair.queued().into_iter().chain((0..next.len()).map(|n| pair.pushed() + n)).collect();
        next.into_iter().for_each(|calls| pair.push(calls));
        pair.finish();
        prop_assert_eq!(&pair.answered[before..], expected);
    }
}

/// What a broken server does.
#[derive(Clone, Debug)]
enum Garbage {
    /// Bytes that nobody asked for.
    Bytes(Vec<u8>),
    /// What a server would answer, with one byte changed.
    Real { at: usize, with: u8 },
    /// Meanwhile, more is written.
    Write(usize),
}

fn garbage() -> impl Strategy<Value = Garbage> {
    let lengths = prop_oneof![0..200_i64, -4100..=-1_i64, any::<i64>()];
    prop_oneof![
        4 => prop::collection::vec(any::<u8>(), 1..40).prop_map(Garbage::Bytes),
        4 => lengths.prop_map(|length| Garbage::Bytes(length.to_le_bytes().to_vec())),
        2 => (any::<usize>(), any::<u8>()).prop_map(|(at, with)| Garbage::Real { at, with }),
        2 => amount().prop_map(Garbage::Write),
    ]
}

/// A stream with one batch, of which so many bytes are written.
fn written(calls: Vec<Call>, bytes: usize) -> Stream<()> {
    let mut stream = Stream::default();
    stream.push(calls, ());
    stream.wrote(bytes);
    stream
}

/// The replies of the batches that are complete with these bytes, or what is wrong with them.
fn receive(stream: &mut Stream<()>, bytes: &[u8]) -> Result<Vec<Vec<Reply>>, &'static str> {
    let mut complete = Vec::new();
    stream.receive(bytes, &mut complete)?;
    Ok(complete.into_iter().map(|((), replies)| replies.into_vec()).collect())
}

#[test]
fn a_result_that_no_call_asked_for_is_an_error() {
    let mut stream = Stream::default();
    assert_eq!(receive(&mut stream, &[0; 7]), Ok(vec![]));
    assert!(receive(&mut stream, &[0]).is_err());
}

#[test]
fn a_result_of_a_call_that_is_not_written_yet_is_an_error() {
    for bytes in [1, 55, 56 + 1, 2 * 56 - 1] {
        let mut stream = written(vec![model::returns(7), model::returns(8)], bytes);
        for _ in 0..bytes / 56 {
            assert_eq!(receive(&mut stream, &7_i64.to_le_bytes()), Ok(vec![]));
        }
        let early = receive(&mut stream, &8_i64.to_le_bytes());
        assert!(early.is_err(), "{bytes} bytes were written");
    }
}

#[test]
fn a_copy_out_that_announces_another_length_is_an_error() {
    for (announced, fine) in [(5, true), (4, false), (6, false), (i64::MIN, false), (-1, true)] {
        let mut stream = written(vec![model::copy_out(5, 5)], 56);
        let received = receive(&mut stream, &i64::to_le_bytes(announced));
        assert_eq!(received.is_ok(), fine, "{announced}");
    }
}

#[test]
fn a_copy_out_that_counts_more_bytes_than_it_sent_is_an_error() {
    for (real, fine) in [(0, true), (5, true), (6, false), (-1, false), (i64::MAX, false)] {
        let mut stream = written(vec![model::copy_out(5, 5)], 56);
        let mut bytes = 5_i64.to_le_bytes().to_vec();
        bytes.extend(b"hello");
        bytes.extend(i64::to_le_bytes(real));
        match receive(&mut stream, &bytes) {
            Ok(complete) => {
                assert!(fine, "{real}");
                assert_eq!(complete[0][0].data, b"hello"[..real as usize]);
            }
            Err(_) => assert!(!fine, "{real}"),
        }
    }
}

#[test]
fn a_batch_that_was_complete_before_an_error_is_not_lost_with_it() {
    let mut stream = written(vec![model::returns(7)], 56);
    let mut complete = Vec::new();
    let bytes = [7_i64.to_le_bytes(), 8_i64.to_le_bytes()].concat();
    assert!(stream.receive(&bytes, &mut complete).is_err());
    let reply = Reply { result: 7, data: Vec::new() };
    assert_eq!(complete, [((), [reply].into())]);
}

#[test]
fn the_model_answers_what_the_calls_say() {
    // The oracle of this file, once by hand.
    let (errno, bytes) = (reply_to(&model::returns(-14)), reply_to(&model::copy_out(3, 2)));
    assert_eq!((errno.result, errno.data.len()), (-14, 0));
    assert_eq!((bytes.result, bytes.data.len()), (3, 2));
    let mut pair = Pair::default();
    pair.push(vec![model::returns(-14), model::copy_out(3, 2)]);
    pair.finish();
    assert_eq!(pair.answered, [0]);
}

#[test]
fn much_data_is_read_right_to_its_place_and_nothing_beyond_it() {
    use bytes::BufMut;
    let len = 100_000;
    let data: Vec<u8> = (0..len).map(|i| i as u8).collect();
    let mut answer = (len as i64).to_le_bytes().to_vec();
    answer.extend(&data);
    answer.extend((len as i64 - 1).to_le_bytes());
    answer.extend(7i64.to_le_bytes());
    for step in [1, 1000, 4096, len, 3 * len] {
        let mut stream = Stream::default();
        stream.push(vec![Call::copy_out(0, len), model::returns(7)], ());
        let all: usize = stream.output(false).iter().map(|piece| piece.len()).sum();
        stream.wrote(all);
        let (mut input, mut complete, mut in_place) = (answer.as_slice(), Vec::new(), 0);
        while !input.is_empty() {
            let n = if let Some(mut place) = stream.data() {
                let n = step.min(input.len()).min(place.remaining_mut());
                place.put_slice(&input[..n]);
                stream.took(n);
                in_place += n;
                n
            } else {
                let n = step.min(input.len()).min(50);
                stream.receive(&input[..n], &mut complete).unwrap();
                n
            };
            input = &input[n..];
        }
        let [((), replies)] = complete.as_slice() else { panic!("{step}: {}", complete.len()) };
        assert_eq!(replies[0].data, data[..len - 1], "{step}");
        assert_eq!(replies[1].result, 7, "{step}");
        assert!(in_place > len / 2, "{step}: {in_place}");
    }
}
