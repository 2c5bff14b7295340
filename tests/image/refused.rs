//! Servers with a fault are refused, and the refusal names the offender.

use super::workshop::refusal;

#[track_caller]
fn names(refusal: &str, offender: &str) {
    assert!(refusal.contains(offender), "{offender} is not named in:\n{refusal}");
}

#[test]
fn a_zeroed_static_that_is_written_is_refused() {
    let refusal = refusal(
        "static mut COUNTER: u32 = 0;
         pub fn fault() { unsafe { (&raw mut COUNTER).write_volatile(7) } }",
    );
    names(&refusal, "writable data in .bss");
    names(&refusal, "COUNTER");
}

#[test]
fn a_filled_static_that_is_written_is_refused() {
    let refusal = refusal(
        "static GAUGE: core::sync::atomic::AtomicU32 = core::sync::atomic::AtomicU32::new(7);
         pub fn fault() { GAUGE.fetch_add(1, core::sync::atomic::Ordering::Relaxed); }",
    );
    names(&refusal, "writable data in .data");
    names(&refusal, "GAUGE");
}

#[test]
fn thread_local_data_is_refused() {
    let refusal = refusal(
        r#"core::arch::global_asm!(
             ".pushsection .tbss, \"awT\", @nobits",
             ".type per_thread, @object", ".size per_thread, 4", "per_thread: .zero 4",
             ".popsection");
         pub fn fault() { unsafe { core::arch::asm!("mov eax, fs:per_thread@tpoff", out("eax") _) } }"#,
    );
    names(&refusal, "STT_TLS symbol");
}

#[test]
fn an_undefined_symbol_is_refused() {
    let refusal = refusal(
        r#"unsafe extern "C" { fn somebody_elses(); }
         pub fn fault() { unsafe { somebody_elses() } }"#,
    );
    names(&refusal, "somebody_elses");
}

#[test]
fn a_table_of_functions_needs_relocations_and_is_refused() {
    let refusal = refusal(
        "static HANDLERS: [fn(); 2] = [one, two];
         #[inline(never)] fn one() { core::hint::black_box(1); }
         #[inline(never)] fn two() { core::hint::black_box(2); }
         pub fn fault() { core::hint::black_box(&HANDLERS)[core::hint::black_box(1) & 1]() }",
    );
    names(&refusal, "HANDLERS");
}

#[test]
fn a_table_of_strings_needs_relocations_and_is_refused() {
    let refusal = refusal(
        r#"static WORDS: [&str; 2] = ["first", "second"];
         pub fn fault() { core::hint::black_box(core::hint::black_box(&WORDS)); }"#,
    );
    names(&refusal, "WORDS");
    names(&refusal, "second");
}

#[test]
fn a_panic_needs_relocations_and_is_refused() {
    let refusal =
        refusal("pub fn fault() { core::hint::black_box([1, 2])[core::hint::black_box(1)] += 1; }");
    names(&refusal, "src/main.rs");
}

#[test]
fn an_entry_of_a_table_of_addresses_is_refused() {
    let refusal = refusal(
        r#"pub fn fault() {
             unsafe { core::arch::asm!("push qword ptr [rip + farcall_start@GOTPCREL]", "pop rax", out("rax") _) }
         }"#,
    );
    names(&refusal, ".got");
    names(&refusal, "farcall_start");
}

#[test]
fn an_image_that_is_too_large_is_refused() {
    let refusal = refusal(
        "static LANDSCAPE: [u8; 13_000] = [7; 13_000];
         pub fn fault() { core::hint::black_box(&LANDSCAPE); }",
    );
    names(&refusal, "over 12288");
    names(&refusal, "LANDSCAPE");
}
