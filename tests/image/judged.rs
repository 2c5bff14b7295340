//! The judge alone: a good server is accepted, and each thing that is changed in its file is seen.

use std::sync::LazyLock;

use object::read::elf::ElfFile64;
use object::{LittleEndian, Object, ObjectSection, ObjectSymbol, elf};

use super::workshop::{good, readelf};
use crate::judge::{ENTRY_TABLE_OFFSET, IMAGE_MAGIC, IMAGE_MAX_SIZE, judge};

static GOOD: LazyLock<&[u8]> = LazyLock::new(good);

/// Offsets in an ELF header, a program header, a section header and a symbol.
const E_SHOFF: usize = 40;
const PROGRAM_HEADERS: [usize; 2] = [64, 64 + 56];
const P_FLAGS: usize = 4;
const SH_TYPE: usize = 4;
const SH_FLAGS: usize = 8;
const ST_SHNDX: usize = 6;

fn parse(file: &[u8]) -> ElfFile64<'_, LittleEndian> {
    ElfFile64::parse(file).unwrap()
}

/// Where the header of a section lies.
fn section_header(name: &str) -> usize {
    let index = parse(&GOOD).section_by_name(name).expect("the section exists").index().0;
    let table = u64::from_le_bytes(*GOOD[E_SHOFF..].first_chunk().unwrap());
    usize::try_from(table).unwrap() + 64 * index
}

/// Why the good server is refused after this byte of its file was changed.
#[track_caller]
fn refusal_after(at: usize, byte: u8) -> String {
    let mut file = GOOD.to_vec();
    assert_ne!(file[at], byte, "the change is one");
    file[at] = byte;
    judge(&file).expect_err("this file is refused").join("\n")
}

#[test]
fn the_judge_and_the_abi_agree() {
    use farcall::abi::entry;
    assert_eq!(ENTRY_TABLE_OFFSET, entry::ENTRY_TABLE_OFFSET);
    assert_eq!(u64::from_le_bytes(*IMAGE_MAGIC), entry::IMAGE_MAGIC);
    assert_eq!(IMAGE_MAX_SIZE, entry::IMAGE_MAX_SIZE);
}

#[test]
fn a_good_server_is_its_first_bytes_without_section_headers() {
    let image = judge(&GOOD).expect("it is accepted");
    assert!(image.len() < GOOD.len());
    let mut expected = GOOD[..image.len()].to_vec();
    expected[E_SHOFF..E_SHOFF + 8].fill(0);
    expected[60..64].fill(0);
    assert_eq!(image, expected);
}

#[test]
fn a_good_server_has_no_relocations_for_readelf_either() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("server");
    std::fs::write(&file, *GOOD).unwrap();
    let relocations = readelf("--relocs", &file);
    assert!(relocations.contains("no relocations"), "{relocations}");
}

#[test]
fn what_is_no_elf_file_is_refused() {
    for file in [&b""[..], b"#!/bin/sh\n", &GOOD[..63]] {
        let refusal = judge(file).expect_err("this file is refused");
        assert!(refusal[0].starts_with("not an ELF file"), "{refusal:?}");
    }
}

#[test]
fn a_writable_section_is_refused() {
    let flags = (elf::SHF_ALLOC | elf::SHF_WRITE).0;
    let refusal = refusal_after(section_header(".rodata") + SH_FLAGS, flags as u8);
    assert!(refusal.contains("writable data in .rodata"), "{refusal}");
}

#[test]
fn a_thread_local_section_is_refused() {
    let refusal =
        refusal_after(section_header(".rodata") + SH_FLAGS + 1, (elf::SHF_TLS.0 >> 8) as u8);
    assert!(refusal.contains("thread-local data in .rodata"), "{refusal}");
}

#[test]
fn packed_relocations_are_refused() {
    let refusal = refusal_after(section_header(".rodata") + SH_TYPE, elf::SHT_RELR.0 as u8);
    assert!(refusal.contains("packed"), "{refusal}");
}

#[test]
fn a_segment_that_may_be_written_is_refused() {
    let flags = elf::PF_R | elf::PF_W | elf::PF_X;
    let refusal = refusal_after(PROGRAM_HEADERS[0] + P_FLAGS, flags.0 as u8);
    assert!(refusal.contains("the segment is not"), "{refusal}");
}

#[test]
fn a_second_segment_is_refused() {
    for byte in 1..4 {
        assert_eq!(GOOD[PROGRAM_HEADERS[0] + byte], 0);
    }
    let mut file = GOOD.to_vec();
    file[PROGRAM_HEADERS[1]..][..4].copy_from_slice(&elf::PT_LOAD.0.to_le_bytes());
    let refusal = judge(&file).expect_err("this file is refused").join("\n");
    assert!(refusal.contains("not exactly one loaded segment"), "{refusal}");
}

#[test]
fn a_missing_entry_table_is_refused() {
    let refusal = refusal_after(ENTRY_TABLE_OFFSET, b'F');
    assert!(refusal.contains("no entry table at byte 176"), "{refusal}");
}

#[test]
fn a_symbol_without_a_definition_is_refused() {
    let good = parse(&GOOD);
    let symbol = good.symbol_by_name("farcall_start").expect("it has a symbol");
    let (table, _) = good.section_by_name(".symtab").unwrap().file_range().unwrap();
    let at = usize::try_from(table).unwrap() + 24 * symbol.index().0 + ST_SHNDX;
    let refusal = refusal_after(at, 0);
    assert!(refusal.contains("undefined symbol: farcall_start"), "{refusal}");
}
