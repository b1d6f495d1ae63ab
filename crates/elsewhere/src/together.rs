//! Several requests to a shelf at once: it may be far away, and each answer takes a way there and
//! back.
//!
//! # Rules
//! - What is handed over is done in any order, on [`AT_ONCE`] threads; what is returned from is done
//!   whole, or has failed.
//! - After the first failure nothing more is begun, and that failure is the one that is told.

use outlive_epoch::StoreError;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, sync_channel};
use std::sync::{Mutex, PoisonError};
use std::thread;

/// Requests that are on their way at the same time.
pub const AT_ONCE: usize = 8;

/// Does `work` with each thing that `feed` hands over, while it hands over the next ones. `feed` must
/// end when a handing over fails.
///
/// # Errors
/// The first failure of `work`; else what `feed` says.
pub fn together<T: Send>(
    work: impl Fn(T) -> Result<(), StoreError> + Sync,
    feed: impl FnOnce(&mut dyn FnMut(T) -> Result<(), StoreError>) -> Result<(), StoreError>,
) -> Result<(), StoreError> {
    let (sender, receiver) = sync_channel(AT_ONCE);
    let receiver = Mutex::new(receiver);
    let failed = AtomicBool::new(false);
    let failure = Mutex::new(None);
    let worker = || {
        // What is left after a failure is taken as well: nobody must wait for room.
        while let Some(thing) = next(&receiver) {
            if failed.load(Ordering::Acquire) {
                continue;
            }
            if let Err(error) = work(thing) {
                let mut failure = failure.lock().unwrap_or_else(PoisonError::into_inner);
                failure.get_or_insert(error);
                failed.store(true, Ordering::Release);
            }
        }
    };
    let fed = thread::scope(|scope| {
        let sender = sender;
        for _ in 0..AT_ONCE {
            let started = thread::Builder::new().spawn_scoped(scope, worker);
            started.map_err(|source| StoreError::Medium {
                place: "a thread for requests".into(),
                source,
            })?;
        }
        feed(&mut |thing| match failed.load(Ordering::Acquire) {
            true => Err(StoreError::Misuse("one of them has failed".into())),
            false => sender
                .send(thing)
                .map_err(|_| StoreError::Misuse("nobody takes what is handed over".into())),
        })
    });
    let failure = failure.into_inner();
    match failure.unwrap_or_else(PoisonError::into_inner) {
        Some(error) => Err(error),
        None => fed,
    }
}

fn next<T>(receiver: &Mutex<Receiver<T>>) -> Option<T> {
    let receiver = receiver.lock().unwrap_or_else(PoisonError::into_inner);
    receiver.recv().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;
    use std::sync::Barrier;
    use std::sync::atomic::AtomicU64;

    #[test]
    fn everything_is_done_once_and_as_many_as_promised_at_the_same_time() {
        let done = Mutex::new(BTreeSet::new());
        // Passed only where all of them are inside at once.
        let meeting = Barrier::new(AT_ONCE);
        let work = |n: usize| {
            meeting.wait();
            assert!(done.lock().unwrap().insert(n));
            Ok(())
        };
        together(work, |hand| (0..AT_ONCE * 5).try_for_each(hand)).unwrap();
        assert_eq!(done.into_inner().unwrap().len(), AT_ONCE * 5);
    }

    #[test]
    fn the_first_failure_is_told_and_ends_what_is_handed_over() {
        let begun = AtomicU64::new(0);
        let work = |n: u64| {
            begun.fetch_add(1, Ordering::Relaxed);
            match n {
                20 => Err(StoreError::Misuse("twenty".into())),
                _ => Ok(()),
            }
        };
        let handed = &mut 0;
        let result = together(work, |hand| {
            for n in 0..1_000_000 {
                hand(n)?;
                *handed = n;
            }
            Ok(())
        });
        assert!(matches!(result, Err(StoreError::Misuse(text)) if text == "twenty"));
        assert!(*handed < 999_999, "it goes on after a failure");
        assert!(begun.into_inner() < 999_999);
        let of_feed = together(|()| Ok(()), |_| Err(StoreError::Misuse("feed".into())));
        assert!(matches!(of_feed, Err(StoreError::Misuse(text)) if text == "feed"));
    }
}
