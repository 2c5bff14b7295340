#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| farcall_fuzz::handshake(input));
