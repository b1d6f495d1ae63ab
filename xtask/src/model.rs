//! What the demo knows of the database: every write in its order, and what must be there.
//!
//! # The oracle
//! All writes are made by one connection, in order. So whatever the moment of a stop, the
//! database must then be what exactly the first `p` writes make of it, for some `p`: a
//! *prefix*. Every value carries the number of its write, and numbers are never used twice, not
//! even after a restore went back in time. The largest number that is found gives `p`; then every
//! key must hold precisely what the first `p` writes left in it ([`Journal::judge`]). Nothing that is
//! older, newer, mixed, missing or left over from before an earlier restore passes.
//!
//! # Rules
//! Pure: no clock, no connection. Times are nanoseconds since the Unix epoch, given by the caller.

use std::fmt;

/// Bytes in every value.
pub const VALUE_LENGTH: usize = 400;

/// One write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Write {
    /// Its number, from 1 on, never used again.
    number: u64,
    /// The key that it wrote.
    key: u32,
}

/// All writes in the order in which they were issued.
#[derive(Debug)]
pub struct Journal {
    seed: u64,
    writes: Vec<Write>,
    /// When the first writes were acknowledged; shorter than `writes` by those under way.
    acknowledged: Vec<u64>,
    next_number: u64,
    keys: u32,
}

/// The name of a key; the same form as `redis-benchmark -r` uses.
pub fn key_name(key: u32) -> [u8; 16] {
    let mut name = *b"key:000000000000";
    let mut rest = key;
    for digit in name.iter_mut().skip(4).rev() {
        // A remainder of ten fits into a byte.
        *digit = b'0' + (rest % 10) as u8;
        rest /= 10;
    }
    name
}

/// The value that write `number` gives to `key`: both numbers, a checksum, and filling that
/// depends on them.
pub fn value(seed: u64, number: u64, key: u32) -> Vec<u8> {
    let mut bytes = vec![0; VALUE_LENGTH];
    let mut filling = fastrand::Rng::with_seed(seed ^ number.wrapping_mul(0x9E37_79B9_7F4A_7C15));
    filling.fill(&mut bytes[16..]);
    bytes[..8].copy_from_slice(&number.to_le_bytes());
    bytes[8..12].copy_from_slice(&key.to_le_bytes());
    let sum = crc32c::crc32c_append(crc32c::crc32c(&bytes[..12]), &bytes[16..]);
    bytes[12..16].copy_from_slice(&sum.to_le_bytes());
    bytes
}

/// The number of the write that a value says it came from.
fn number_of(bytes: &[u8]) -> Option<u64> {
    Some(u64::from_le_bytes(bytes.get(..8)?.try_into().ok()?))
}

/// What is in the database, key by key.
#[derive(Debug, Default)]
pub struct Found {
    /// For each key the number of the write whose value it holds, 0 where it is not there.
    numbers: Vec<u64>,
    /// Keys whose bytes are not what the write they name had written.
    damaged: Vec<(u32, String)>,
}

/// Why the database is not what a prefix of the writes makes of it.
#[derive(Debug, PartialEq, Eq)]
pub struct Wrong {
    /// How many keys are wrong.
    pub count: usize,
    /// The first of them, in words.
    pub examples: Vec<String>,
}

/// How many wrong keys are shown.
const EXAMPLES: usize = 10;

impl Wrong {
    fn add(&mut self, example: impl FnOnce() -> String) {
        self.count += 1;
        if self.examples.len() < EXAMPLES {
            self.examples.push(example());
        }
    }
}

impl fmt::Display for Wrong {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} keys are not what they must be", self.count)?;
        for example in &self.examples {
            write!(f, "\n  {example}")?;
        }
        if self.count > self.examples.len() {
            write!(f, "\n  … and {} more", self.count - self.examples.len())?;
        }
        Ok(())
    }
}

impl Journal {
    /// No write yet. The seed decides the filling of the values.
    pub fn new(seed: u64) -> Self {
        Self {
            seed,
            writes: Vec::new(),
            acknowledged: Vec::new(),
            next_number: 1,
            keys: 0,
        }
    }

    /// How many keys were ever written: their names are those of 0 to this.
    pub fn keys(&self) -> u32 {
        self.keys
    }

    /// How many writes were issued.
    #[cfg(test)]
    pub fn issued(&self) -> usize {
        self.writes.len()
    }

    /// How many writes were acknowledged.
    pub fn acknowledged(&self) -> usize {
        self.acknowledged.len()
    }

    /// How many writes had been acknowledged before a moment.
    pub fn acknowledged_before(&self, nanos: u64) -> usize {
        self.acknowledged.partition_point(|&at| at < nanos)
    }

    /// When the `count`-th write was acknowledged; `None` for 0 and for what is under way.
    pub fn acknowledged_at(&self, count: usize) -> Option<u64> {
        self.acknowledged.get(count.checked_sub(1)?).copied()
    }

    /// Notes a write that is about to be sent, and returns its value.
    pub fn issue(&mut self, key: u32) -> Vec<u8> {
        let number = self.next_number;
        self.next_number += 1;
        self.keys = self.keys.max(key.saturating_add(1));
        self.writes.push(Write { number, key });
        value(self.seed, number, key)
    }

    /// Notes that the oldest write under way was acknowledged.
    pub fn acknowledge(&mut self, nanos: u64) {
        debug_assert!(self.acknowledged.len() < self.writes.len());
        let latest = self.acknowledged.last().copied().unwrap_or(0);
        self.acknowledged.push(nanos.max(latest));
    }

    /// Begins a look at the database.
    pub fn nothing_found(&self) -> Found {
        Found {
            numbers: Vec::with_capacity(self.keys as usize),
            damaged: Vec::new(),
        }
    }

    /// Notes what the next key (in the order of their numbers) holds.
    pub fn look(&self, found: &mut Found, held: Option<&[u8]>) {
        let key = found.numbers.len() as u32;
        let Some(bytes) = held else {
            found.numbers.push(0);
            return;
        };
        let number = number_of(bytes).unwrap_or(0);
        found.numbers.push(number);
        if bytes != value(self.seed, number, key).as_slice() {
            let head = &bytes[..bytes.len().min(24)];
            let text = format!(
                "holds {} bytes that no write made: {head:02x?}…",
                bytes.len()
            );
            found.damaged.push((key, text));
        }
    }

    /// The number of writes `p` whose result this is, or what is wrong with it.
    pub fn judge(&self, found: &Found) -> Result<usize, Wrong> {
        let mut wrong = Wrong {
            count: 0,
            examples: Vec::new(),
        };
        for (key, what) in &found.damaged {
            wrong.add(|| format!("key {key} {what}"));
        }
        if wrong.count > 0 {
            return Err(wrong);
        }
        let newest = found.numbers.iter().copied().max().unwrap_or(0);
        let prefix = self.writes.partition_point(|write| write.number <= newest);
        let mut expected = vec![0; found.numbers.len().max(self.keys as usize)];
        for write in &self.writes[..prefix] {
            expected[write.key as usize] = write.number;
        }
        for (key, &expected) in expected.iter().enumerate() {
            let held = found.numbers.get(key).copied().unwrap_or(0);
            if held != expected {
                wrong.add(|| {
                    let (expected, held) = (described(expected), described(held));
                    format!("key {key} holds {held}, and must hold {expected}")
                });
            }
        }
        if wrong.count > 0 {
            Err(wrong)
        } else {
            Ok(prefix)
        }
    }

    /// How many keys are there after the first `prefix` writes.
    pub fn keys_after(&self, prefix: usize) -> u64 {
        let mut there = vec![false; self.keys as usize];
        for write in &self.writes[..prefix] {
            there[write.key as usize] = true;
        }
        there.iter().filter(|&&there| there).count() as u64
    }

    /// Goes back to what a restore found: the writes after the first `prefix` never happened. Of
    /// the prefix, those that had not been acknowledged are so from now on, having been seen.
    pub fn go_back(&mut self, prefix: usize, now_nanos: u64) {
        self.writes.truncate(prefix);
        self.acknowledged.truncate(prefix);
        while self.acknowledged.len() < self.writes.len() {
            self.acknowledge(now_nanos);
        }
    }
}

fn described(number: u64) -> String {
    match number {
        0 => "nothing".into(),
        number => format!("write {number}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const SEED: u64 = 7;

    /// A journal of writes to these keys, with the values that they had.
    fn journal(keys: &[u32]) -> (Journal, Vec<Vec<u8>>) {
        let mut journal = Journal::new(SEED);
        let values = keys.iter().map(|&key| journal.issue(key)).collect();
        (journal, values)
    }

    /// The database after the first writes.
    fn after(journal: &Journal, values: &[Vec<u8>], prefix: usize) -> Vec<Option<Vec<u8>>> {
        let mut state = vec![None; journal.keys() as usize];
        for (write, value) in journal.writes[..prefix].iter().zip(values) {
            state[write.key as usize] = Some(value.clone());
        }
        state
    }

    fn judge(journal: &Journal, state: &[Option<Vec<u8>>]) -> Result<usize, Wrong> {
        let mut found = journal.nothing_found();
        for held in state {
            journal.look(&mut found, held.as_deref());
        }
        journal.judge(&found)
    }

    #[test]
    fn key_names_are_those_of_redis_benchmark() {
        assert_eq!(&key_name(0), b"key:000000000000");
        assert_eq!(&key_name(4_294_967_295), b"key:004294967295");
    }

    #[test]
    fn every_single_fault_is_found() {
        let (journal, values) = journal(&[0, 1, 2, 1, 0]);
        let right = after(&journal, &values, 5);
        assert_eq!(judge(&journal, &right), Ok(5));
        for key in 0..3 {
            let mut missing = right.clone();
            missing[key] = None;
            let verdict = judge(&journal, &missing);
            // Without the newest write, what is left may be a shorter prefix, but never all.
            assert!(
                verdict.is_err() || verdict.is_ok_and(|prefix| prefix < 5),
                "key {key}"
            );
            for byte in 0..VALUE_LENGTH {
                let mut flipped = right.clone();
                flipped[key].as_mut().unwrap()[byte] ^= 1;
                assert!(judge(&journal, &flipped).is_err(), "key {key} byte {byte}");
            }
        }
        let mut older = right.clone();
        older[1] = Some(values[1].clone());
        assert!(judge(&journal, &older).is_err(), "an older value passed");
        let mut swapped = right.clone();
        swapped.swap(0, 1);
        assert!(
            judge(&journal, &swapped).is_err(),
            "exchanged values passed"
        );
        let mut short = right;
        short[2].as_mut().unwrap().truncate(5);
        assert!(judge(&journal, &short).is_err(), "a short value passed");
    }

    #[test]
    fn what_a_restore_undid_must_not_come_back() {
        let (mut journal, values) = journal(&[0, 1, 0]);
        journal.go_back(2, 50);
        assert_eq!((journal.issued(), journal.acknowledged()), (2, 2));
        let again = journal.issue(1);
        let undone = vec![Some(values[2].clone()), Some(again.clone())];
        assert!(judge(&journal, &undone).is_err());
        assert_eq!(
            judge(&journal, &[Some(values[0].clone()), Some(again)]),
            Ok(3)
        );
    }

    #[test]
    fn acknowledgements_are_counted_by_time() {
        let (mut journal, _) = journal(&[0, 1, 2]);
        for at in [10, 20, 15] {
            journal.acknowledge(at);
        }
        assert_eq!(journal.acknowledged_before(10), 0);
        assert_eq!(journal.acknowledged_before(11), 1);
        assert_eq!(journal.acknowledged_before(21), 3);
        assert_eq!(journal.acknowledged_at(0), None);
        assert_eq!(journal.acknowledged_at(3), Some(20));
    }

    proptest! {
        #[test]
        fn every_prefix_is_recognised(
            keys in proptest::collection::vec(0_u32..20, 1..60),
            at in any::<proptest::sample::Index>(),
        ) {
            let (journal, values) = journal(&keys);
            let prefix = at.index(keys.len() + 1);
            let state = after(&journal, &values, prefix);
            prop_assert_eq!(judge(&journal, &state), Ok(prefix));
            let there = state.iter().flatten().count() as u64;
            prop_assert_eq!(journal.keys_after(prefix), there);
        }

        #[test]
        fn a_mixture_of_two_moments_is_no_prefix(
            keys in proptest::collection::vec(0_u32..12, 2..60),
            (older, newer) in any::<(proptest::sample::Index, proptest::sample::Index)>(),
            choose in any::<u16>(),
        ) {
            let (journal, values) = journal(&keys);
            let (older, newer) = (older.index(keys.len() + 1), newer.index(keys.len() + 1));
            let (one, two) = (after(&journal, &values, older), after(&journal, &values, newer));
            let mixed: Vec<_> = (0..one.len())
                .map(|key| if choose >> key & 1 == 0 { one[key].clone() } else { two[key].clone() })
                .collect();
            match judge(&journal, &mixed) {
                // Accepted only where it is no mixture at all, but truly one moment.
                Ok(prefix) => prop_assert_eq!(mixed, after(&journal, &values, prefix)),
                Err(_) => prop_assert!((0..=keys.len())
                    .all(|prefix| after(&journal, &values, prefix) != mixed)),
            }
        }
    }
}
