//! Readers in other threads see one moment, while one thread writes.
#![allow(clippy::unwrap_used, reason = "all of this is test code")]

mod common;

use common::{open, options};
use resilient_heap::memory::Volatile;
use resilient_heap::{Durability, Error, PBox};
use std::sync::atomic::{AtomicBool, Ordering};

#[test]
fn readers_never_see_half_a_transaction() {
    let mut heap = open(options(), Volatile::new(4 << 20).unwrap()).unwrap();
    heap.write(|root, tx| {
        root.list = Some(PBox::new(
            tx,
            common::Node {
                value: 0,
                next: None,
            },
        )?);
        Ok(())
    })
    .unwrap();
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for _ in 0..2 {
            let reader = heap.reader();
            let done = &done;
            scope.spawn(move || {
                let mut last = 0;
                while !done.load(Ordering::Relaxed) {
                    last = reader
                        .read(|root, s| {
                            let node = root.list.as_ref().ok_or(Error::NotAHeap)?.get(s)?;
                            let before = (root.steps, node.value);
                            std::thread::yield_now();
                            assert_eq!(before, (root.steps, node.value));
                            assert_eq!(root.steps, node.value);
                            assert!(root.steps >= last);
                            Ok(root.steps)
                        })
                        .unwrap();
                }
            });
        }
        for n in 1..=300 {
            heap.write(|root, tx| {
                root.steps = n;
                std::thread::yield_now();
                root.list
                    .as_mut()
                    .ok_or(Error::NotAHeap)?
                    .get_mut(tx)?
                    .value = n;
                Ok(())
            })
            .unwrap();
        }
        done.store(true, Ordering::Relaxed);
    });
}

#[test]
fn what_waits_to_be_durable_is_not_shown_to_readers() {
    for (durability, shown) in [(Durability::Barrier, 0), (Durability::Group(2), 2)] {
        let options = options().durability(durability);
        let mut heap = open(options, Volatile::new(4 << 20).unwrap()).unwrap();
        for n in 1..=3 {
            heap.write(|root, _| {
                root.steps = n;
                Ok(())
            })
            .unwrap();
        }
        // An abort takes back its own change only.
        let failed: Result<(), Error> = heap.write(|root, tx| {
            assert_eq!(root.steps, 3);
            root.steps = 9;
            tx.abort("on purpose")
        });
        assert!(failed.is_err());
        assert_eq!(heap.read(|root, _| Ok(root.steps)), Ok(shown));
        heap.sync().unwrap();
        assert_eq!(heap.read(|root, _| Ok(root.steps)), Ok(3));
    }
}

#[test]
fn a_thread_that_reads_is_refused_to_write_and_another_one_is_not() {
    let mut heap = open(options(), Volatile::new(4 << 20).unwrap()).unwrap();
    let other = open(options(), Volatile::new(4 << 20).unwrap()).unwrap();
    let (reader, of_other) = (heap.reader(), other.reader());
    let step = |root: &mut common::Root<'_>| {
        root.steps += 1;
        Ok(())
    };
    reader
        .read(|_, _| {
            assert_eq!(heap.write(|root, _| step(root)), Err(Error::WithinReading));
            assert_eq!(heap.sync(), Err(Error::WithinReading));
            assert!(matches!(heap.scrub(), Err(Error::WithinReading)));
            assert_eq!(reader.read(|root, _| Ok(root.steps)), Ok(0));
            // Not even when an inner reading ended.
            assert_eq!(heap.write(|root, _| step(root)), Err(Error::WithinReading));
            Ok(())
        })
        .unwrap();
    // A panic ends a reading, too; and another heap is another heap.
    let panic = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        reader.read(|_, _| -> Result<(), Error> { panic!("on purpose") })
    }));
    assert!(panic.is_err());
    of_other
        .read(|_, _| heap.write(|root, _| step(root)))
        .unwrap();
    std::thread::scope(|scope| {
        let writer = reader
            .read(|_, _| Ok(scope.spawn(|| heap.write(|root, _| step(root)))))
            .unwrap();
        writer.join().unwrap().unwrap();
    });
    assert_eq!(heap.read(|root, _| Ok(root.steps)), Ok(2));
}
