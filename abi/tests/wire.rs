//! The stream's bytes and bits: what is written is what is read.

use std::collections::HashSet;

use farcall_abi::wire::{
    HelloResult, MAX_ERRNO, Operation, REQUEST_SIZE, Request, SPARES, STREAM_VERSION, Spares, Word,
};
use proptest::prelude::*;

/// All operations: [`counted`] does not compile when one is missing.
const OPERATIONS: [Operation; 12] = [
    Operation::Hello,
    Operation::CopyIn,
    Operation::CopyOut,
    Operation::Copy,
    Operation::Load,
    Operation::Store,
    Operation::Keep,
    Operation::Registry,
    Operation::Serve,
    Operation::Image,
    Operation::Ring,
    Operation::Upgrade,
];

/// The place of an operation in [`OPERATIONS`]. A new one does not compile before it is here.
fn counted(operation: Operation) -> usize {
    match operation {
        Operation::Hello => 0,
        Operation::CopyIn => 1,
        Operation::CopyOut => 2,
        Operation::Copy => 3,
        Operation::Load => 4,
        Operation::Store => 5,
        Operation::Keep => 6,
        Operation::Registry => 7,
        Operation::Serve => 8,
        Operation::Image => 9,
        Operation::Ring => 10,
        Operation::Upgrade => 11,
    }
}

proptest! {
    #[test]
    fn a_request_is_read_as_it_was_written(word: u64, args: [u64; 6]) {
        let request = Request { word, args };
        prop_assert_eq!(Request::from_bytes(&request.to_bytes()), request);
    }

    #[test]
    fn any_56_bytes_are_a_request_and_stay_as_they_are(bytes in prop::array::uniform(any::<u8>())) {
        let bytes: [u8; REQUEST_SIZE] = bytes;
        prop_assert_eq!(Request::from_bytes(&bytes).to_bytes(), bytes);
    }

    #[test]
    fn a_request_is_seven_little_endian_words(word: u64, args: [u64; 6]) {
        let mut expected = word.to_le_bytes().to_vec();
        for argument in args {
            expected.extend(argument.to_le_bytes());
        }
        prop_assert_eq!(Request { word, args }.to_bytes().to_vec(), expected);
    }

    #[test]
    fn a_system_call_has_the_high_half_of_its_word_clear(number: u32, args: [u64; 6]) {
        let request = Request::syscall(number, args);
        prop_assert_eq!(request.word & Word::NUMBER, u64::from(number));
        prop_assert_eq!(request.word & !Word::NUMBER, 0);
        prop_assert_eq!(request.args, args);
    }

    #[test]
    fn an_operation_has_its_number_and_one_bit_above(which in 0..OPERATIONS.len(), args: [u64; 6]) {
        let request = Request::operation(OPERATIONS[which], args);
        prop_assert_eq!(request.word & !Word::NUMBER, Word::OP);
        let number = (request.word & Word::NUMBER) as u32;
        prop_assert_eq!(Operation::from_number(number), Some(OPERATIONS[which]));
        prop_assert_eq!(request.args, args);
    }

    #[test]
    fn a_number_that_is_no_operation_is_none(number: u32) {
        let number_back = Operation::from_number(number).map(|operation| operation as u32);
        prop_assert!(number_back.is_none_or(|back| back == number));
    }

    #[test]
    fn hello_s_result_tells_version_and_features(version in 0..=0xffff_u32, features: u32) {
        let result = HelloResult::new(version, features);
        prop_assert_eq!(result.version(), version);
        prop_assert_eq!(result.features(), features);
        // It is never read as an errno, nor as anything above bit 47.
        prop_assert!((0..1 << 48).contains(&result.0));
    }

    #[test]
    fn a_version_that_does_not_fit_leaves_the_features_alone(version: u32, features: u32) {
        let result = HelloResult::new(version, features);
        prop_assert_eq!(result.version(), version & 0xffff);
        prop_assert_eq!(result.features(), features);
    }

    #[test]
    fn spares_are_told_last_added_first(
        fds in prop::collection::vec(prop_oneof![0..=Spares::MAX_FD, Just(0), Just(Spares::MAX_FD)], 0..=SPARES)
    ) {
        let spares = fds.iter().fold(Spares::default(), |spares, fd| spares.with(*fd));
        let mut told: Vec<i32> = spares.fds().collect();
        told.reverse();
        prop_assert_eq!(told, fds);
        // The result of a call: no errno, whatever the numbers are.
        prop_assert!(!(-MAX_ERRNO..0).contains(&spares.0));
    }

    #[test]
    fn any_number_is_read_as_spares_in_range(number: i64) {
        let fds: Vec<i32> = Spares(number).fds().collect();
        prop_assert!(fds.len() <= SPARES);
        prop_assert!(fds.iter().all(|fd| (0..=Spares::MAX_FD).contains(fd)));
    }
}

#[test]
fn no_number_is_two_operations_and_each_is_its_own() {
    let mut numbers = HashSet::new();
    for (place, operation) in OPERATIONS.into_iter().enumerate() {
        assert_eq!(counted(operation), place);
        assert!(numbers.insert(operation as u32), "{operation:?}: its number is another's");
        assert_eq!(Operation::from_number(operation as u32), Some(operation));
    }
    // And no other number names one.
    let named = (0..1 << 16).filter_map(Operation::from_number).count();
    assert_eq!(named, OPERATIONS.len());
}

#[test]
fn numbers_of_operations_never_change() {
    let numbers = OPERATIONS.map(|operation| operation as u32);
    assert_eq!(numbers, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]);
}

#[test]
fn the_bits_of_a_word_lie_apart_and_never_move() {
    let mut bits = vec![Word::OP, Word::LINK, Word::FLUSH];
    bits.extend((0..6).map(Word::reference));
    assert_eq!(bits, (32..=40).map(|bit| 1 << bit).collect::<Vec<u64>>());
    assert_eq!(Word::NUMBER, 0xffff_ffff);
    // Version 0 knows the first of them, version 1 all.
    assert_eq!((Word::bits(0), Word::bits(1)), (33, 41));
}

#[test]
fn features_are_bits_of_their_own_and_all_are_offered() {
    let features = [
        HelloResult::COPY,
        HelloResult::SERVE,
        HelloResult::IMAGE,
        HelloResult::RING,
        HelloResult::LOG,
        HelloResult::KEEP,
        HelloResult::UPGRADE,
        HelloResult::BEGIN,
        HelloResult::WITHDRAW,
        HelloResult::SOURCE,
    ];
    let all = features.into_iter().fold(0, |all, feature| {
        assert_eq!(feature.count_ones(), 1);
        assert_eq!(all & feature, 0, "bit {feature:#x} is used twice");
        all | feature
    });
    assert_eq!(HelloResult::OFFERED, all);
    assert_eq!(HelloResult::new(STREAM_VERSION, all).version(), STREAM_VERSION);
}

#[test]
fn three_spares_of_the_highest_number_fit_into_one_result() {
    let full = [Spares::MAX_FD; SPARES].into_iter().fold(Spares::default(), Spares::with);
    assert_eq!(full.0, i64::MAX, "every bit but the sign");
    assert_eq!(full.fds().collect::<Vec<_>>(), [Spares::MAX_FD; SPARES]);
    assert_eq!(Spares::default().fds().count(), 0);
    // Zero is a descriptor, not "none".
    assert_eq!(Spares::default().with(0).fds().collect::<Vec<_>>(), [0]);
}
