//! The image that the library carries.

use std::fs;
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::process::{Command, Stdio};

use farcall::abi::entry::{
    ENTRY_TABLE_OFFSET, ENTRY_TABLE_SIZE, EntryTable, IMAGE_MAX_SIZE, IMAGE_VERSION,
};
use farcall::image::{self, Carrier, IMAGE};

use super::workshop::readelf;

#[test]
fn it_fits_three_pages() {
    assert!(IMAGE.len() <= IMAGE_MAX_SIZE, "{} bytes", IMAGE.len());
}

#[test]
fn it_has_no_relocations_and_nothing_dynamic() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("image");
    fs::write(&file, IMAGE).unwrap();
    let relocations = readelf("--relocs", &file);
    assert!(relocations.contains("no relocations"), "{relocations}");
    let dynamic = readelf("--dynamic", &file);
    assert!(dynamic.contains("no dynamic section"), "{dynamic}");
}

#[test]
fn its_entries_lie_behind_the_table_and_inside_of_it() {
    let table = image::entries();
    assert_eq!(table.version, IMAGE_VERSION);
    assert_eq!(table.size as usize, IMAGE.len());
    let EntryTable { serve, serve_persistent, trampoline, raw_syscall, resume, .. } = table;
    let mut entries = [serve, serve_persistent, trampoline, raw_syscall, resume];
    entries.sort_unstable();
    assert!(entries[0] as usize >= ENTRY_TABLE_OFFSET + ENTRY_TABLE_SIZE, "{table:?}");
    assert!((entries[4] as usize) < IMAGE.len(), "{table:?}");
    assert!(entries.is_sorted_by(|a, b| a < b), "each entry is one of its own: {table:?}");
}

/// The child of a `clone` with a new stack takes its next address from there: nothing may come
/// between `syscall` (0f 05) and `ret` (c3).
#[test]
fn its_raw_syscall_returns_at_once() {
    let code = &IMAGE[image::entries().raw_syscall as usize..];
    let syscall = code.windows(2).position(|bytes| bytes == [0x0f, 0x05]).unwrap();
    assert_eq!(code[syscall + 2], 0xc3, "{:x?}", &code[..syscall + 3]);
    assert!(!code[..syscall].contains(&0xc3), "an earlier return: {:x?}", &code[..syscall + 3]);
}

#[test]
fn it_runs_makes_a_call_and_ends_with_its_input() {
    let file = image::executable(Carrier::Automatic).unwrap();
    let mut server = Command::new(format!("/proc/self/fd/{}", file.as_raw_fd()))
        .env_clear()
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let getpid = nix::libc::SYS_getpid.cast_unsigned();
    let mut request = [0; 56];
    request[..8].copy_from_slice(&getpid.to_le_bytes());
    server.stdin.as_mut().unwrap().write_all(&request).unwrap();
    let mut result = [0; 8];
    server.stdout.as_mut().unwrap().read_exact(&mut result).unwrap();
    assert_eq!(u64::from_le_bytes(result), u64::from(server.id()));
    // Closes its input first.
    assert_eq!(server.wait().unwrap().code(), Some(0));
}
