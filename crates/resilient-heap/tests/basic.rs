//! What a program does with a heap.
#![allow(clippy::unwrap_used, reason = "all of this is test code")]

use resilient_heap::memory::Volatile;
use resilient_heap::{Error, Heap, Options, PBox, PRc, PString, PVec, Persist};

#[derive(Persist)]
#[repr(C)]
struct Root<'h> {
    visits: u64,
    names: PVec<'h, PString<'h>>,
    list: Option<PBox<'h, Node<'h>>>,
    shared: PVec<'h, PRc<'h, PString<'h>>>,
}

#[derive(Persist)]
#[repr(C)]
struct Node<'h> {
    value: u64,
    next: Option<PBox<'h, Node<'h>>>,
}

fn heap() -> Heap<Root<'static>> {
    let memory = Volatile::new(4 << 20).unwrap();
    Options::default()
        .zone_pages(16)
        .log_pages(6)
        .open(memory, |_| {
            Ok(Root {
                visits: 0,
                names: PVec::new(),
                list: None,
                shared: PVec::new(),
            })
        })
        .unwrap()
}

#[test]
fn values_are_what_transactions_made_them() {
    let mut heap = heap();
    assert!(heap.opened().created);
    for i in 0..20u64 {
        heap.write(|root, tx| {
            root.visits += 1;
            root.names
                .push(tx, PString::new(tx, &format!("name {i}"))?)?;
            let next = root.list.take();
            root.list = Some(PBox::new(tx, Node { value: i, next })?);
            Ok(())
        })
        .unwrap();
    }
    heap.read(|root, s| {
        assert_eq!(root.visits, 20);
        assert_eq!(root.names.get(s, 7)?.unwrap().as_str(s)?, "name 7");
        let mut sum = 0;
        let mut node = root.list.as_ref();
        while let Some(at) = node {
            let at = at.get(s)?;
            sum += at.value;
            node = at.next.as_ref();
        }
        assert_eq!(sum, 190);
        Ok(())
    })
    .unwrap();
    assert!(heap.scrub().unwrap().corrected.is_empty());
}

#[test]
fn what_nothing_points_to_is_freed_and_nothing_else_is() {
    let mut heap = heap();
    let free = heap.free_bytes();
    // Made and dropped.
    heap.write(|_, tx| PString::new(tx, "never put anywhere").map(drop))
        .unwrap();
    assert_eq!(heap.free_bytes(), free);
    heap.write(|root, tx| {
        for i in 0..9 {
            let next = root.list.take();
            root.list = Some(PBox::new(tx, Node { value: i, next })?);
        }
        Ok(())
    })
    .unwrap();
    assert!(heap.free_bytes() < free);
    // Cut in the middle: the tail is freed.
    let full = heap.free_bytes();
    heap.write(|root, tx| {
        let first = root.list.as_mut().unwrap().get_mut(tx)?;
        let second = first.next.as_mut().unwrap().get_mut(tx)?;
        second.next = None;
        Ok(())
    })
    .unwrap();
    assert_eq!(heap.free_bytes(), full + 7 * 32);
    // Moved, not freed.
    heap.write(|root, tx| {
        let node = root.list.take().unwrap().into_inner(tx)?;
        root.list = node.next;
        Ok(())
    })
    .unwrap();
    assert_eq!(heap.free_bytes(), full + 8 * 32);
    heap.write(|root, _| {
        root.list = None;
        Ok(())
    })
    .unwrap();
    assert_eq!(heap.free_bytes(), free);
}

#[test]
fn shared_values_live_as_long_as_somebody_points_to_them() {
    let mut heap = heap();
    let free = heap.free_bytes();
    heap.write(|root, tx| {
        let text = PRc::new(tx, PString::new(tx, "shared")?)?;
        for _ in 0..3 {
            root.shared.push(tx, text.share(tx))?;
        }
        Ok(())
    })
    .unwrap();
    for left in (0..3).rev() {
        heap.write(|root, tx| {
            let one = root.shared.pop(tx)?.unwrap();
            assert_eq!(one.count(tx)?, left + 1);
            assert_eq!(one.get(tx)?.as_str(tx)?, "shared");
            Ok(())
        })
        .unwrap();
    }
    heap.write(|root, _| {
        root.shared = PVec::new();
        Ok(())
    })
    .unwrap();
    assert_eq!(heap.free_bytes(), free);
}

#[test]
fn what_fails_or_panics_changes_nothing() {
    let mut heap = heap();
    heap.write(|root, tx| root.names.push(tx, PString::new(tx, "kept")?))
        .unwrap();
    let free = heap.free_bytes();
    let gone: Result<(), Error> = heap.write(|root, tx| {
        root.visits = 9;
        root.names.push(tx, PString::new(tx, "gone")?)?;
        tx.abort("changed my mind")
    });
    assert_eq!(gone, Err(Error::Aborted("changed my mind")));
    let panic = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        heap.write(|root, tx| {
            root.names.pop(tx)?;
            root.visits = 7;
            if root.visits == 7 {
                panic!("on purpose");
            }
            Ok(())
        })
    }));
    assert!(panic.is_err());
    assert_eq!(heap.free_bytes(), free);
    heap.write(|root, tx| {
        assert_eq!(root.visits, 0);
        assert_eq!(root.names.len(tx)?, 1);
        Ok(())
    })
    .unwrap();
}

#[test]
fn a_nested_transaction_fails_alone() {
    let mut heap = heap();
    heap.transaction(|outer| {
        let (root, tx) = outer.parts()?;
        root.visits = 1;
        root.names.push(tx, PString::new(tx, "outer")?)?;
        let failed: Result<(), Error> = outer.nested(|inner| {
            let (root, tx) = inner.parts()?;
            root.visits = 2;
            root.names.push(tx, PString::new(tx, "failed")?)?;
            root.names.as_mut_slice(tx)?.swap(0, 1);
            tx.abort("no")
        });
        assert!(failed.is_err());
        outer.nested(|inner| {
            let (root, tx) = inner.parts()?;
            assert_eq!(root.visits, 1);
            root.names.push(tx, PString::new(tx, "inner")?)
        })
    })
    .unwrap();
    heap.read(|root, s| {
        let names: Result<Vec<&str>, Error> = root
            .names
            .as_slice(s)?
            .iter()
            .map(|name| name.as_str(s))
            .collect();
        assert_eq!(names?, ["outer", "inner"]);
        assert_eq!(root.visits, 1);
        Ok(())
    })
    .unwrap();
}

#[test]
fn it_grows_and_refuses_what_is_too_large_by_name() {
    let mut heap = heap();
    for i in 0..300u64 {
        heap.write(|root, tx| {
            root.names
                .push(tx, PString::new(tx, &"x".repeat(400 + i as usize))?)
        })
        .unwrap();
    }
    heap.read(|root, s| {
        for (i, name) in root.names.as_slice(s)?.iter().enumerate() {
            assert_eq!(name.as_str(s)?.len(), 400 + i);
        }
        Ok(())
    })
    .unwrap();
    let error = heap.write(|root, tx| root.names.push(tx, PString::new(tx, &"x".repeat(70_000))?));
    assert!(matches!(error, Err(Error::TooLarge { .. })), "{error:?}");
    let error = heap.write(|root, tx| {
        for _ in 0..20 {
            root.names.push(tx, PString::new(tx, &"x".repeat(2000))?)?;
        }
        Ok(())
    });
    assert!(
        matches!(error, Err(Error::TransactionTooLarge { .. })),
        "{error:?}"
    );
    let full = loop {
        let one = heap.write(|root, tx| root.names.push(tx, PString::new(tx, &"x".repeat(9000))?));
        if let Err(error) = one {
            break error;
        }
    };
    assert!(matches!(full, Error::Full { .. }), "{full:?}");
    assert_eq!(heap.scrub().unwrap().lost, []);
}
