//! Maps against those of `std`: the same calls give the same answers, also after the heap was opened again,
//! and nothing leaks.
#![allow(clippy::unwrap_used, reason = "all of this is test code")]

use proptest::prelude::*;
use resilient_heap::memory::{Memory, Volatile};
use resilient_heap::{
    Access, Error, Hashed, Heap, Key, KeyHasher, Options, PBTreeMap, PHashMap, PString, Persist,
};
use std::collections::{BTreeMap, HashMap};
use std::ops::Bound;
use std::ptr::NonNull;
use std::sync::Arc;

#[derive(Persist)]
#[repr(C)]
struct Root<'h> {
    numbers: PHashMap<'h, u64, u8>,
    words: PHashMap<'h, PString<'h>, PString<'h>>,
    alike: PHashMap<'h, Alike, u32>,
    order: PBTreeMap<'h, u16, u64>,
    lines: PBTreeMap<'h, PString<'h>, [u64; 40]>,
}

/// Keys that all have the same hash.
#[derive(Persist, PartialEq, Eq, PartialOrd, Ord)]
#[repr(transparent)]
struct Alike(u32);

impl<'h> Key<'h> for Alike {
    type Query = Self;
    fn query<'a>(&'a self, _: &'a impl Access<'h>) -> Result<&'a Self, Error> {
        Ok(self)
    }
}

impl Hashed for Alike {
    fn feed(&self, hasher: &mut KeyHasher) {
        0u8.feed(hasher);
    }
}

/// Memory that outlives its heap.
#[derive(Clone)]
struct Kept(Arc<Volatile>);

// SAFETY: all is left to `Volatile`.
#[allow(unsafe_code)]
unsafe impl Memory for Kept {
    fn base(&self) -> NonNull<u8> {
        self.0.base()
    }
    fn len(&self) -> usize {
        self.0.len()
    }
    fn grow(&self, len: usize) -> Result<(), Error> {
        self.0.grow(len)
    }
    fn flush(&self, _: usize, _: usize) {}
    fn fence(&self) -> Result<(), Error> {
        Ok(())
    }
}

fn open(memory: &Kept) -> Heap<Root<'static>> {
    let options = Options::default().zone_pages(16).log_pages(20);
    options
        .open(memory.clone(), |_| {
            Ok(Root {
                numbers: PHashMap::new(),
                words: PHashMap::new(),
                alike: PHashMap::new(),
                order: PBTreeMap::new(),
                lines: PBTreeMap::new(),
            })
        })
        .unwrap()
}

fn memory() -> Kept {
    Kept(Arc::new(Volatile::new(64 << 20).unwrap()))
}

/// The same in `std`.
#[derive(Default)]
struct Model {
    numbers: HashMap<u64, u8>,
    words: HashMap<String, String>,
    alike: HashMap<u32, u32>,
    order: BTreeMap<u16, u64>,
    lines: BTreeMap<String, u64>,
}

#[derive(Clone, Debug)]
enum Step {
    Insert(u16, u64),
    Remove(u16),
    Update(u16),
    PopFirst,
    PopLast,
    Fail(u16),
    Open,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let key = prop_oneof![0..40u16, 0..2000u16];
    let step = prop_oneof![
        10 => (key.clone(), any::<u64>()).prop_map(|(k, v)| Step::Insert(k, v)),
        6 => key.clone().prop_map(Step::Remove),
        2 => key.clone().prop_map(Step::Update),
        1 => Just(Step::PopFirst),
        1 => Just(Step::PopLast),
        1 => key.prop_map(Step::Fail),
        1 => Just(Step::Open),
    ];
    prop::collection::vec(step, 0..400)
}

fn word(k: u16) -> String {
    format!("word {}", u64::from(k) * 7919 % 2003)
}

fn take(heap: &mut Heap<Root<'static>>, model: &mut Model, step: &Step) {
    match *step {
        Step::Insert(k, v) => insert(heap, model, k, v),
        Step::Remove(k) => {
            let w = word(k);
            let found = heap
                .write(|root, tx| {
                    let lines = root.lines.remove(tx, &w)?;
                    let words = match root.words.remove(tx, &w)? {
                        Some(text) => Some(text.as_str(tx)?.to_owned()),
                        None => None,
                    };
                    Ok((
                        root.numbers.remove(tx, &u64::from(k))?,
                        words,
                        root.alike.remove(tx, &Alike(k.into()))?,
                        root.order.remove(tx, &k)?,
                        lines.map(|line| line[0]),
                    ))
                })
                .unwrap();
            let expected = (
                model.numbers.remove(&k.into()),
                model.words.remove(&w),
                model.alike.remove(&k.into()),
                model.order.remove(&k),
                model.lines.remove(&w),
            );
            assert_eq!(found, expected);
        }
        Step::Update(k) => {
            heap.write(|root, tx| {
                *root.numbers.get_or_insert_with(tx, k.into(), |_| Ok(7))? ^= 1;
                *root.order.get_or_insert_with(tx, k, |_| Ok(7))? ^= 1;
                if let Some(line) = root.lines.get_mut(tx, &word(k))? {
                    line.iter_mut().for_each(|v| *v ^= 1);
                }
                Ok(())
            })
            .unwrap();
            *model.numbers.entry(k.into()).or_insert(7) ^= 1;
            *model.order.entry(k).or_insert(7) ^= 1;
            model.lines.entry(word(k)).and_modify(|v| *v ^= 1);
        }
        Step::PopFirst => {
            let found = heap.write(|root, tx| root.order.pop_first(tx)).unwrap();
            assert_eq!(found, model.order.pop_first());
        }
        Step::PopLast => {
            let found = heap.write(|root, tx| root.order.pop_last(tx)).unwrap();
            assert_eq!(found, model.order.pop_last());
        }
        Step::Fail(k) => {
            let failed: Result<(), Error> = heap.write(|root, tx| {
                root.numbers.insert(tx, k.into(), 1)?;
                root.order.remove(tx, &k)?;
                root.lines.pop_first(tx)?;
                root.words.clear(tx);
                tx.abort("on purpose")
            });
            assert!(failed.is_err());
        }
        Step::Open => {}
    }
}

fn insert(heap: &mut Heap<Root<'static>>, model: &mut Model, k: u16, v: u64) {
    let (w, text) = (word(k), format!("{v}"));
    let found = heap
        .write(|root, tx| {
            let key = PString::new(tx, &w)?;
            let words = match root.words.insert(tx, key, PString::new(tx, &text)?)? {
                Some(text) => Some(text.as_str(tx)?.to_owned()),
                None => None,
            };
            let key = PString::new(tx, &w)?;
            Ok((
                root.numbers.insert(tx, k.into(), v as u8)?,
                words,
                root.alike.insert(tx, Alike(k.into()), v as u32)?,
                root.order.insert(tx, k, v)?,
                root.lines.insert(tx, key, [v; 40])?.map(|line| line[0]),
            ))
        })
        .unwrap();
    let expected = (
        model.numbers.insert(k.into(), v as u8),
        model.words.insert(w.clone(), text),
        model.alike.insert(k.into(), v as u32),
        model.order.insert(k, v),
        model.lines.insert(w, v),
    );
    assert_eq!(found, expected);
}

/// Looks at everything, in the ways that there are.
fn compare(heap: &Heap<Root<'static>>, model: &Model, k: u16, end: u16) {
    heap.read(|root, s| {
        let numbers: Result<HashMap<u64, u8>, Error> = root
            .numbers
            .iter(s)
            .map(|row| row.map(|(k, v)| (*k, *v)))
            .collect();
        assert_eq!(numbers?, model.numbers);
        assert_eq!(root.numbers.len(), model.numbers.len());
        let mut words = HashMap::new();
        for row in root.words.iter(s) {
            let (word, text) = row?;
            words.insert(word.as_str(s)?.to_owned(), text.as_str(s)?.to_owned());
        }
        assert_eq!(words, model.words);
        assert_eq!(root.alike.len(), model.alike.len());
        assert_eq!(
            root.alike.get(s, &Alike(k.into()))?,
            model.alike.get(&k.into())
        );
        let order: Result<Vec<(u16, u64)>, Error> = root
            .order
            .iter(s)
            .map(|row| row.map(|(k, v)| (*k, *v)))
            .collect();
        assert!(
            order?
                .into_iter()
                .eq(model.order.iter().map(|(k, v)| (*k, *v)))
        );
        assert_eq!(root.order.len(), model.order.len());
        assert_eq!(root.order.first(s)?, model.order.first_key_value());
        assert_eq!(root.order.last(s)?, model.order.last_key_value());
        for range in [
            (Bound::Included(k), Bound::Excluded(end.max(k))),
            (
                Bound::Excluded(k),
                Bound::Included(end.max(k).saturating_add(1)),
            ),
            (Bound::Unbounded, Bound::Included(k)),
            (Bound::Included(end), Bound::Unbounded),
        ] {
            let found: Result<Vec<&u16>, Error> = root
                .order
                .range(s, range)
                .map(|row| row.map(|(k, _)| k))
                .collect();
            let expected: Vec<&u16> = model.order.range(range).map(|(k, _)| k).collect();
            assert_eq!(found?, expected, "{range:?}");
        }
        assert_eq!(root.order.get(s, &k)?, model.order.get(&k));
        let mut lines = model.lines.iter();
        for row in root.lines.iter(s) {
            let (word, line) = row?;
            let expected = lines.next().unwrap();
            assert_eq!(
                (word.as_str(s)?, line),
                (expected.0.as_str(), &[*expected.1; 40])
            );
        }
        assert!(lines.next().is_none());
        let from = word(k);
        let found = root
            .lines
            .range::<_, (Bound<&str>, Bound<&str>)>(s, (Bound::Excluded(&from), Bound::Unbounded))
            .count();
        let expected = (Bound::Excluded(from.clone()), Bound::Unbounded);
        assert_eq!(found, model.lines.range(expected).count());
        Ok(())
    })
    .unwrap();
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]
    #[test]
    fn maps_do_what_those_of_std_do(steps in steps(), k in 0..2000u16, end in 0..2000u16) {
        let memory = memory();
        let mut heap = open(&memory);
        let empty = heap.free_bytes();
        let mut model = Model::default();
        for step in &steps {
            if matches!(step, Step::Open) {
                let free = heap.free_bytes();
                heap.close().unwrap();
                heap = open(&memory);
                // What the walk finds is what the commits had counted.
                prop_assert_eq!(heap.free_bytes(), free);
            }
            take(&mut heap, &mut model, step);
        }
        compare(&heap, &model, k, end);
        heap.close().unwrap();
        let mut heap = open(&memory);
        compare(&heap, &model, k, end);
        heap.write(|root, tx| {
            root.numbers.clear(tx);
            root.words.clear(tx);
            root.alike.clear(tx);
            root.order.clear(tx);
            root.lines.clear(tx);
            Ok(())
        })
        .unwrap();
        // Zones that were added are free, all of them.
        prop_assert_eq!(heap.free_bytes() % (16 * 4096), empty % (16 * 4096));
    }
}

#[test]
fn maps_grow_beyond_zone_and_log_and_shrink_to_nothing() {
    let memory = memory();
    let mut heap = open(&memory);
    let empty = heap.free_bytes();
    let key = |n: u64| (n.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 48) as u16;
    for from in (0..30_000).step_by(50) {
        heap.write(|root, tx| {
            for n in from..from + 50 {
                root.numbers.insert(tx, n, n as u8)?;
                root.order.insert(tx, key(n), n)?;
            }
            Ok(())
        })
        .unwrap();
    }
    heap.close().unwrap();
    let mut heap = open(&memory);
    heap.read(|root, s| {
        assert_eq!(root.numbers.len(), 30_000);
        assert_eq!(root.numbers.iter(s).count(), 30_000);
        for n in 0..30_000 {
            assert_eq!(root.numbers.get(s, &n)?, Some(&(n as u8)));
            assert!(root.order.contains_key(s, &key(n))?);
        }
        assert_eq!(root.numbers.get(s, &30_000)?, None);
        let keys: Vec<u16> = root.order.iter(s).map(|row| *row.unwrap().0).collect();
        assert!(keys.is_sorted());
        assert_eq!(keys.len(), root.order.len());
        Ok(())
    })
    .unwrap();
    for from in (0..30_000).step_by(50) {
        heap.write(|root, tx| {
            for n in from..from + 50 {
                assert_eq!(root.numbers.remove(tx, &n)?, Some(n as u8));
                root.order.remove(tx, &key(n))?;
            }
            Ok(())
        })
        .unwrap();
    }
    heap.read(|root, s| {
        assert!(root.numbers.is_empty() && root.order.is_empty());
        assert_eq!(root.order.iter(s).count() + root.numbers.iter(s).count(), 0);
        Ok(())
    })
    .unwrap();
    assert_eq!(heap.free_bytes() % (16 * 4096), empty % (16 * 4096));
}

#[test]
fn a_change_that_failed_half_way_is_never_committed() {
    let memory = Kept(Arc::new(Volatile::new(1 << 20).unwrap()));
    let mut heap = open(&memory);
    let mut n = 0u64;
    // Until memory is full: the error is ignored, and yet nothing of it stays.
    let ignored = loop {
        let outcome = heap.write(|root, tx| {
            let key = PString::new(tx, &format!("{n:099}"))?;
            Ok(root.lines.insert(tx, key, [n; 40]).is_err())
        });
        match outcome {
            Ok(failed) => assert!(!failed, "committed what had failed"),
            Err(error) => break error,
        }
        n += 1;
    };
    assert!(
        matches!(ignored, Error::Aborted(_) | Error::Full { .. }),
        "{ignored:?}"
    );
    let len = heap.read(|root, s| {
        assert_eq!(
            root.lines.iter(s).filter(|row| row.is_ok()).count(),
            root.lines.len()
        );
        Ok(root.lines.len() as u64)
    });
    assert_eq!(len, Ok(n));
    // A nested transaction confines it.
    heap.transaction(|outer| {
        let (root, tx) = outer.parts()?;
        root.lines.pop_first(tx)?;
        let failed = outer.nested(|inner| {
            let (root, tx) = inner.parts()?;
            let mut failed = false;
            for n in 0..9 {
                let key = PString::new(tx, &format!("new {n:099}"))?;
                failed |= root.lines.insert(tx, key, [n; 40]).is_err();
            }
            Ok(failed)
        });
        assert!(failed.is_err(), "{failed:?}");
        Ok(())
    })
    .unwrap();
    let len = heap.read(|root, _| Ok(root.lines.len() as u64));
    assert_eq!(len, Ok(n - 1));
}
