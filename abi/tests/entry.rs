//! The entry table of an image and the stack of a fresh child: what is written is what is read.

use farcall_abi::entry::{ENTRY_TABLE_SIZE, EntryTable, IMAGE_MAGIC, TrampolineFrame};
use proptest::prelude::*;

/// A table's bytes as the image has them: the fields in order.
fn bytes_of(table: &EntryTable) -> [u8; ENTRY_TABLE_SIZE] {
    let words = [
        table.version,
        table.size,
        table.serve,
        table.serve_persistent,
        table.trampoline,
        table.raw_syscall,
        table.resume,
        table.handover,
    ];
    let mut bytes = table.magic.to_le_bytes().to_vec();
    bytes.extend(words.into_iter().flat_map(u32::to_le_bytes));
    bytes.try_into().unwrap()
}

fn table(magic: u64, words: [u32; 8]) -> EntryTable {
    let [version, size, serve, serve_persistent, trampoline, raw_syscall, resume, handover] = words;
    EntryTable {
        magic,
        version,
        size,
        serve,
        serve_persistent,
        trampoline,
        raw_syscall,
        resume,
        handover,
    }
}

proptest! {
    #[test]
    fn an_entry_table_is_read_as_the_image_has_it(words: [u32; 8]) {
        let table = table(IMAGE_MAGIC, words);
        prop_assert_eq!(EntryTable::from_bytes(&bytes_of(&table)), Some(table));
    }

    #[test]
    fn bytes_without_the_magic_are_no_entry_table(
        words: [u32; 8],
        magic in prop_oneof![any::<u64>(), (0..64_u32).prop_map(|bit| IMAGE_MAGIC ^ 1 << bit)],
    ) {
        prop_assume!(magic != IMAGE_MAGIC);
        prop_assert_eq!(EntryTable::from_bytes(&bytes_of(&table(magic, words))), None);
    }

    #[test]
    fn a_fresh_stack_has_the_trampoline_then_the_arguments_then_the_function(
        trampoline: u64,
        args: [u64; 6],
        function: u64,
    ) {
        let stack = TrampolineFrame { args, function }.to_stack(trampoline);
        let words: Vec<u64> =
            stack.chunks(8).map(|word| u64::from_le_bytes(word.try_into().unwrap())).collect();
        prop_assert_eq!(words[0], trampoline);
        prop_assert_eq!(&words[1..7], &args);
        prop_assert_eq!(&words[7..], &[function]);
    }
}
