//! The bytes of the call log: what is read is what lies in the documented places.

use farcall_abi::log::{LOG_CAPACITY, LOG_HEAD_SIZE, LOG_SIZE, LogHead, PAST, Record, Tenure};
use farcall_abi::wire::{AHEAD_SIZE, LOG_OFFSET, MAX_REF, REQUEST_SIZE, Request};
use proptest::prelude::*;

const RECORD_SIZE: usize = size_of::<Record>();

/// The number at an offset.
fn at(bytes: &[u8], offset: usize) -> u64 {
    u64::from_le_bytes(*bytes[offset..].first_chunk().unwrap())
}

proptest! {
    #[test]
    fn a_head_has_its_fields_in_their_places(bytes in prop::array::uniform(any::<u8>())) {
        let bytes: [u8; LOG_HEAD_SIZE] = bytes;
        let head = LogHead::from_bytes(&bytes);
        let LogHead { calls, first, memory, registry, capacity, used, controllers, past } = head;
        let fields = [calls, first, memory, registry, capacity, used, controllers];
        for (place, field) in fields.into_iter().enumerate() {
            prop_assert_eq!(field, at(&bytes, 8 * place));
        }
        for (place, Tenure { token, end }) in past.into_iter().enumerate() {
            let offset = 56 + 24 * place;
            prop_assert_eq!(token.0, [at(&bytes, offset), at(&bytes, offset + 8)]);
            prop_assert_eq!(end, at(&bytes, offset + 16));
        }
    }

    #[test]
    fn a_record_is_a_request_and_its_result(word: u64, args: [u64; 6], result: i64) {
        let request = Request { word, args };
        let mut bytes = [0; RECORD_SIZE];
        bytes[..REQUEST_SIZE].copy_from_slice(&request.to_bytes());
        bytes[REQUEST_SIZE..].copy_from_slice(&result.to_le_bytes());
        prop_assert_eq!(Record::from_bytes(&bytes), Record { request, result });
    }
}

#[test]
fn sizes_and_places_never_change() {
    assert_eq!((LOG_CAPACITY, RECORD_SIZE, LOG_SIZE), (128, 64, 8192));
    assert_eq!((LOG_HEAD_SIZE, PAST), (152, 4));
    assert_eq!((LOG_OFFSET, AHEAD_SIZE), (8192, 16_384));
    // What a call may refer to has its record, also while the call itself gets one.
    const { assert!(MAX_REF < LOG_CAPACITY) };
}
