//! Looks for bytes that the heap cannot stand, by libFuzzer. See `cargo xtask fuzz heap`.
#![no_main]

mod hostile;

libfuzzer_sys::fuzz_target!(|input: &[u8]| hostile::stand(input));
