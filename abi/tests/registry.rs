//! The bytes of the registry's entries: what is written is what is read, in the documented places.

use farcall_abi::registry::{ENTRY_SIZE, Entry, NAME_SIZE, USER_SIZE};
use proptest::prelude::*;

proptest! {
    #[test]
    fn any_128_bytes_are_an_entry_and_stay_as_they_are(bytes in prop::array::uniform(any::<u8>())) {
        let bytes: [u8; ENTRY_SIZE] = bytes;
        prop_assert_eq!(Entry::from_bytes(&bytes).to_bytes(), bytes);
    }

    #[test]
    fn an_entry_is_read_as_it_was_written_and_has_its_fields_in_their_places(
        (value, state, kind, details) in any::<(u64, u64, u64, [u64; 3])>(),
        name in prop::array::uniform(any::<u8>()),
        user in prop::array::uniform(any::<u8>()),
    ) {
        let entry = Entry { value, state, kind, details, name, user };
        let bytes = entry.to_bytes();
        prop_assert_eq!(Entry::from_bytes(&bytes), entry);
        let at = |offset: usize| u64::from_le_bytes(*bytes[offset..].first_chunk().unwrap());
        prop_assert_eq!([at(0), at(8), at(16)], [value, state, kind]);
        prop_assert_eq!([at(24), at(32), at(40)], details);
        prop_assert_eq!(&bytes[48..96], &name);
        prop_assert_eq!(&bytes[96..128], &user);
    }
}

#[test]
fn sizes_and_states_never_change() {
    assert_eq!((ENTRY_SIZE, NAME_SIZE, USER_SIZE), (128, 48, 32));
    assert_eq!((Entry::FREE, Entry::TAKEN), (0, 1), "fresh memory is free");
}
