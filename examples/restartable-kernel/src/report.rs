//! What the kernel says about its heap.

use crate::serial::say;
use resilient_heap::Scrubbed;

/// Prints what a scrub found.
pub fn scrubbed(found: &Scrubbed) {
    for place in &found.corrected {
        say!("corrected {place}");
    }
    for place in &found.lost {
        say!("lost {place}");
    }
    say!("scrubbed {}", found.lines);
}

/// A number for the kernel's code (FNV-1a).
pub fn fingerprint(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |sum, byte| {
        (sum ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3)
    })
}
