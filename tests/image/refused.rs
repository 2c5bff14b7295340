//! Servers with a fault are refused, and the refusal names the offender.

use super::workshop::Server;

pub const FAULTS: [&Server; 9] = [
    &ZEROED_STATIC,
    &FILLED_STATIC,
    &THREAD_LOCAL,
    &UNDEFINED,
    &FUNCTIONS,
    &STRINGS,
    &PANIC,
    &ADDRESSES,
    &TOO_LARGE,
];

#[track_caller]
fn names(refusal: &str, offender: &str) {
    assert!(refusal.contains(offender), "{offender} is not named in:\n{refusal}");
}

const ZEROED_STATIC: Server = Server::that_adds(
    "zeroed-static",
    "static mut COUNTER: u32 = 0;
     pub fn fault() { unsafe { (&raw mut COUNTER).write_volatile(7) } }",
);

#[test]
fn a_zeroed_static_that_is_written_is_refused() {
    let refusal = ZEROED_STATIC.refusal();
    names(&refusal, "writable data in .bss");
    names(&refusal, "COUNTER");
}

const FILLED_STATIC: Server = Server::that_adds(
    "filled-static",
    "static GAUGE: core::sync::atomic::AtomicU32 = core::sync::atomic::AtomicU32::new(7);
     pub fn fault() { GAUGE.fetch_add(1, core::sync::atomic::Ordering::Relaxed); }",
);

#[test]
fn a_filled_static_that_is_written_is_refused() {
    let refusal = FILLED_STATIC.refusal();
    names(&refusal, "writable data in .data");
    names(&refusal, "GAUGE");
}

const THREAD_LOCAL: Server = Server::that_adds(
    "thread-local",
    r#"core::arch::global_asm!(
         ".pushsection .tbss, \"awT\", @nobits",
         ".type per_thread, @object", ".size per_thread, 4", "per_thread: .zero 4",
         ".popsection");
     pub fn fault() { unsafe { core::arch::asm!("mov eax, fs:per_thread@tpoff", out("eax") _) } }"#,
);

#[test]
fn thread_local_data_is_refused() {
    let refusal = THREAD_LOCAL.link_error();
    names(refusal, "STT_TLS symbol");
}

const UNDEFINED: Server = Server::that_adds(
    "undefined",
    r#"unsafe extern "C" { fn somebody_elses(); }
     pub fn fault() { unsafe { somebody_elses() } }"#,
);

#[test]
fn an_undefined_symbol_is_refused() {
    let refusal = UNDEFINED.link_error();
    names(refusal, "somebody_elses");
}

const FUNCTIONS: Server = Server::that_adds(
    "functions",
    "static HANDLERS: [fn(); 2] = [one, two];
     #[inline(never)] fn one() { core::hint::black_box(1); }
     #[inline(never)] fn two() { core::hint::black_box(2); }
     pub fn fault() { core::hint::black_box(&HANDLERS)[core::hint::black_box(1) & 1]() }",
);

#[test]
fn a_table_of_functions_needs_relocations_and_is_refused() {
    let refusal = FUNCTIONS.refusal();
    names(&refusal, "HANDLERS");
}

const STRINGS: Server = Server::that_adds(
    "strings",
    r#"static WORDS: [&str; 2] = ["first", "second"];
     pub fn fault() { core::hint::black_box(core::hint::black_box(&WORDS)); }"#,
);

#[test]
fn a_table_of_strings_needs_relocations_and_is_refused() {
    let refusal = STRINGS.refusal();
    names(&refusal, "WORDS");
    names(&refusal, "second");
}

const PANIC: Server = Server::that_adds(
    "panicking",
    "pub fn fault() { core::hint::black_box([1, 2])[core::hint::black_box(1)] += 1; }",
);

#[test]
fn a_panic_needs_relocations_and_is_refused() {
    let refusal = PANIC.refusal();
    names(&refusal, "a panic at panicking/main.rs:");
}

const ADDRESSES: Server = Server::that_adds(
    "addresses",
    r#"pub fn fault() {
         unsafe { core::arch::asm!("push qword ptr [rip + farcall_start@GOTPCREL]", "pop rax", out("rax") _) }
     }"#,
);

#[test]
fn an_entry_of_a_table_of_addresses_is_refused() {
    let refusal = ADDRESSES.refusal();
    names(&refusal, ".got");
    names(&refusal, "farcall_start");
}

const TOO_LARGE: Server = Server::that_adds(
    "too-large",
    "static LANDSCAPE: [u8; 13_000] = [7; 13_000];
     pub fn fault() { core::hint::black_box(&LANDSCAPE); }",
);

#[test]
fn an_image_that_is_too_large_is_refused() {
    let refusal = TOO_LARGE.refusal();
    names(&refusal, "over 12288");
    names(&refusal, "LANDSCAPE");
}
