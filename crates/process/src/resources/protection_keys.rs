//! Protection keys that a program has taken (`pkey_alloc(2)`), whether or not they protect anything yet.
//!
//! Nothing lists them. But `pkey_mprotect(2)` looks at the key before it looks for the memory: for a
//! page that cannot exist it answers `EINVAL` where the key is free, and `ENOMEM` where it is taken.
//! So nothing is changed by asking. What the keys allow is in a register (PKRU), which is saved with
//! the others. Memory that a key protects is refused ([`super::memory`]).

use outlive_linux::processor::cpuid;
use outlive_linux::remote::{Arg, Batch, CallId, Results};

/// Keys that the processor has; number 0 is everybody's.
const KEYS: u32 = 16;
/// A page above all that a program can have.
const NOWHERE: u64 = 0x7fff_ffff_f000;
const PAGE: u64 = 4096;

/// Questions about each key but number 0.
#[derive(Clone, Debug)]
pub struct Asked([CallId; KEYS as usize - 1]);

/// Adds the questions, where the kernel has switched keys on.
pub fn ask(batch: &mut Batch) -> Option<Asked> {
    // OSPKE
    if cpuid(7, 0)[2] & 1 << 4 == 0 {
        return None;
    }
    let question = |at: usize| {
        let args = [NOWHERE, PAGE, 0, at as u64 + 1].map(Arg::Value);
        batch.push(libc::SYS_pkey_mprotect, args)
    };
    Some(Asked(std::array::from_fn(question)))
}

/// The keys that are taken, as a bit mask.
pub fn taken(asked: Option<&Asked>, answers: &Results) -> u32 {
    let keys = asked.into_iter().flat_map(|a| (1..KEYS).zip(a.0));
    let taken = keys.filter(|&(_, id)| answers.value(id) == Err(outlive_linux::Errno::NOMEM));
    taken.fold(0, |mask, (key, _)| mask | 1 << key)
}

/// Adds the calls that take these keys in a process that has taken none: they are given out in
/// ascending order, so those in between are given back. Returns what each call is for.
pub fn recreate(keys: u32, batch: &mut Batch) -> Vec<String> {
    let keys = keys & ((1 << KEYS) - 2);
    let highest = (1..KEYS).rev().find(|key| keys & 1 << key != 0);
    let all = 1..=highest.unwrap_or(0);
    let mut what = Vec::new();
    for key in all.clone() {
        batch.push(libc::SYS_pkey_alloc, [0, 0].map(Arg::Value));
        what.push(format!("taking protection key {key}"));
    }
    for key in all.filter(|key| keys & 1 << key == 0) {
        batch.push(libc::SYS_pkey_free, [Arg::Value(key.into())]);
        what.push(format!("giving protection key {key} back"));
    }
    what
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_taken_in_order_and_those_between_given_back() {
        let calls = |keys| recreate(keys, &mut Batch::new());
        assert_eq!(calls(0), [""; 0]);
        // Key 0 is there in any case.
        assert_eq!(calls(1), [""; 0]);
        assert_eq!(calls(1 << 1), ["taking protection key 1"]);
        let two = [
            "taking protection key 1",
            "taking protection key 2",
            "giving protection key 1 back",
        ];
        assert_eq!(calls(1 << 2), two);
        assert_eq!(calls(u32::MAX).len(), 15, "an image is hostile");
    }
}
