use super::*;
use proptest::prelude::*;

fn ask(owner: &str, pages: u64) -> Request {
    Request {
        owner: owner.to_owned(),
        pages,
        thin: false,
        below: None,
        quota: None,
        file: None,
    }
}

/// Does what a pool does: zeroes, then takes over.
fn carry_out(ledger: &mut Ledger, bytes: &mut [u8], plan: Plan) {
    for run in &plan.scrub {
        bytes[run.start as usize..run.end() as usize].fill(0);
    }
    assert!(ledger.apply(plan.changes));
}

fn rows(ledger: &Ledger) -> Rows {
    Rows {
        owners: ledger.owners.clone().into_iter().collect(),
        extents: ledger.extents.values().cloned().collect(),
        dirty: ledger.dirty.runs().collect(),
        next: ledger.next,
    }
}

/// All that must hold, whatever was done.
fn check(ledger: &Ledger, bytes: &[u8]) {
    let mut owned = vec![false; bytes.len()];
    for piece in ledger.extents().flat_map(|extent| &extent.pieces) {
        for page in piece.run.start..piece.run.end() {
            assert!(
                !std::mem::replace(&mut owned[page as usize], true),
                "two owners"
            );
        }
    }
    for page in ledger.space.start..ledger.space.end() {
        let free = ledger.buddy.has(Run::new(page, 1));
        assert_ne!(
            free, owned[page as usize],
            "page {page} leaked, or is free and owned"
        );
        let dirty = !ledger.dirty.within(Run::new(page, 1)).is_empty();
        assert!(!dirty || free);
        assert!(
            dirty || !free || bytes[page as usize] == 0,
            "page {page} is thought clean"
        );
    }
    let again = Ledger::load(ledger.space, rows(ledger)).unwrap();
    assert_eq!((&again.buddy, &again.dirty), (&ledger.buddy, &ledger.dirty));
}

#[test]
fn quotas_hold_for_what_is_promised() {
    let mut ledger = Ledger::new(Run::new(2, 100));
    let first = Request {
        quota: Some(50),
        thin: true,
        ..ask("a", 40)
    };
    let (id, plan) = ledger.allocate(&first).unwrap();
    assert!(plan.scrub.is_empty());
    assert!(ledger.apply(plan.changes));
    let refused = ledger.allocate(&ask("a", 11)).unwrap_err();
    assert!(
        matches!(
            refused,
            Refused::Quota {
                promised: 163_840,
                ..
            }
        ),
        "{refused}"
    );
    assert!(ledger.allocate(&ask("a", 10)).is_ok());
    assert!(ledger.allocate(&ask("b", 101)).is_err());
    // What is promised may be more than there is; what is given may not.
    let (_, plan) = ledger
        .allocate(&Request {
            thin: true,
            ..ask("b", 500)
        })
        .unwrap();
    assert!(ledger.apply(plan.changes));
    let (_, plan) = ledger.allocate(&ask("c", 95)).unwrap();
    assert!(ledger.apply(plan.changes));
    let refused = ledger.populate(id, Run::new(0, 6)).unwrap_err();
    assert!(
        matches!(refused, Refused::NoRoom { free: 20_480, .. }),
        "{refused}"
    );
    for name in ["", "a/b", "x\n", &"n".repeat(65)] {
        assert!(matches!(
            ledger.allocate(&ask(name, 1)),
            Err(Refused::Name(_))
        ));
    }
}

#[test]
fn rows_that_break_a_promise_are_named() {
    let mut ledger = Ledger::new(Run::new(0, 64));
    for owner in ["a", "b"] {
        let (_, plan) = ledger.allocate(&ask(owner, 8)).unwrap();
        assert!(ledger.apply(plan.changes));
    }
    let load = |break_it: &dyn Fn(&mut Rows)| {
        let mut rows = rows(&ledger);
        break_it(&mut rows);
        Ledger::load(ledger.space, rows).map(|_| ()).unwrap_err()
    };
    let same = load(&|rows| rows.extents[1].pieces = rows.extents[0].pieces.clone());
    assert!(same.contains("twice given"), "{same}");
    let beyond = load(&|rows| rows.extents[0].pieces[0].run = Run::new(60, 8));
    assert!(beyond.contains("beyond"), "{beyond}");
    let endless = load(&|rows| rows.extents[0].pieces[0].run = Run::new(u64::MAX, 8));
    assert!(endless.contains("beyond"), "{endless}");
    let nobody = load(&|rows| rows.owners.truncate(1));
    assert!(nobody.contains("owner"), "{nobody}");
    let owned = load(&|rows| rows.dirty = vec![rows.extents[0].pieces[0].run]);
    assert!(owned.contains("not free"), "{owned}");
    let quota = load(&|rows| rows.owners[0].1.quota = Some(7));
    assert!(quota.contains("quota"), "{quota}");
    let limit = load(&|rows| rows.extents[0].below = 3);
    assert!(limit.contains("limit"), "{limit}");
    let away = load(&|rows| rows.owners[0].1.state = State::PagedOut);
    assert!(away.contains("in a file"), "{away}");
    let number = load(&|rows| rows.next = 2);
    assert!(number.contains("number"), "{number}");
    let file = load(&|rows| rows.owners[0].1.generation = u64::MAX);
    assert!(file.contains("number"), "{file}");
    let endless = load(&|rows| rows.owners[0].1.quota = Some(u64::MAX / PAGE + 1));
    assert!(endless.contains("quota"), "{endless}");
}

/// A file of an owner is nobody else's, nor is the name under which it is written.
#[test]
fn two_owners_have_no_file_in_common() {
    let mut ledger = Ledger::new(Run::new(0, 64));
    let with = |owner: &str, file: &str| Request {
        file: Some(file.to_owned()),
        ..ask(owner, 1)
    };
    let (_, plan) = ledger.allocate(&with("a", "/d/vm")).unwrap();
    assert!(ledger.apply(plan.changes));
    for file in ["/d/vm", "/d/vm.new", "/d/vm.0123.new"] {
        let refused = ledger.allocate(&with("b", file)).unwrap_err();
        assert!(matches!(refused, Refused::FileTaken { owner, .. } if owner == "a"));
    }
    let (_, plan) = ledger.allocate(&with("b", "/d/vm2")).unwrap();
    assert!(ledger.apply(plan.changes));
    // The other way round, and the owner itself again.
    let (_, plan) = ledger.allocate(&with("b", "/d/x.7.new")).unwrap();
    assert!(ledger.apply(plan.changes));
    assert!(ledger.allocate(&with("a", "/d/x")).is_err());
    assert!(ledger.allocate(&with("a", "/d/vm")).is_ok());
    // One without a file keeps nobody from theirs.
    let (_, plan) = ledger.allocate(&ask("c", 1)).unwrap();
    assert!(ledger.apply(plan.changes));
    assert!(ledger.allocate(&with("d", ".new")).is_ok());
}

#[test]
fn what_an_owner_has_can_be_moved_at_once() {
    let mut ledger = Ledger::new(Run::new(0, 4000));
    ledger.most = 40;
    // Two extents with a piece each are 2 + 2 * EXTENT_ROWS; each hole in the first makes one more.
    for pages in [1000, 8] {
        let (_, plan) = ledger.allocate(&ask("a", pages)).unwrap();
        assert!(ledger.apply(plan.changes));
    }
    let left = 40 - 2 - 2 * EXTENT_ROWS as u64;
    for hole in 0..left {
        let plan = ledger.discard(1, Run::new(2 * hole + 1, 1)).unwrap();
        assert!(ledger.apply(plan.changes));
    }
    let refused = |refused: Refused| assert!(matches!(refused, Refused::Pieces { .. }));
    refused(ledger.discard(1, Run::new(500, 1)).unwrap_err());
    refused(ledger.allocate(&ask("a", 1)).unwrap_err());
    // What makes it no worse is granted, also where there is too much already.
    ledger.most = 30;
    refused(ledger.number_file("a", false).unwrap_err());
    let plan = ledger.discard(1, Run::new(0, 20)).unwrap();
    assert!(ledger.apply(plan.changes));
    let (number, plan) = ledger.number_file("a", false).unwrap();
    assert_eq!((number, ledger.owner("a").unwrap().generation), (1, 0));
    assert!(ledger.apply(plan.changes));
    assert_eq!(ledger.owner("a").unwrap().generation, 1);
}

#[derive(Clone, Debug)]
enum Step {
    Allocate(u8, u64, bool, Option<u64>),
    Populate(usize, u64, u64),
    Discard(usize, u64, u64),
    Release(usize),
    ReleaseOwner(u8),
    PageOut(u8),
    PageIn(u8),
}

fn step() -> impl Strategy<Value = Step> {
    let limit = proptest::option::weighted(0.3, 10u64..300);
    prop_oneof![
        4 => (0u8..4, 1u64..90, any::<bool>(), limit)
            .prop_map(|(owner, pages, thin, below)| Step::Allocate(owner, pages, thin, below)),
        4 => (0usize..9, 0u64..90, 1u64..40).prop_map(|(which, at, len)| Step::Populate(which, at, len)),
        2 => (0usize..9, 0u64..90, 1u64..40).prop_map(|(which, at, len)| Step::Discard(which, at, len)),
        2 => (0usize..9).prop_map(Step::Release),
        1 => (0u8..4).prop_map(Step::ReleaseOwner),
        1 => (0u8..4).prop_map(Step::PageOut),
        1 => (0u8..4).prop_map(Step::PageIn),
    ]
}

/// What a pool and its owners do with one step; every page somebody gets is zeros, and is written then.
fn go(
    ledger: &mut Ledger,
    bytes: &mut [u8],
    files: &mut BTreeMap<String, Vec<(u64, Run)>>,
    step: Step,
) {
    let nth = |ledger: &Ledger, n: usize| ledger.extents.keys().nth(n).copied().unwrap_or(0);
    let write = |bytes: &mut [u8], before: &Extent, after: &Extent| {
        for piece in &after.pieces {
            for i in 0..piece.run.len {
                let page = (piece.run.start + i) as usize;
                match before.next(Run::new(piece.at + i, 1)).1 {
                    Some(same) => assert_eq!(same.start as usize, page, "a page moved"),
                    None => assert_eq!(std::mem::replace(&mut bytes[page], 7), 0, "not scrubbed"),
                }
            }
        }
    };
    match step {
        Step::Allocate(owner, pages, thin, below) => {
            let request = Request {
                thin,
                below,
                quota: Some(200),
                ..ask(&format!("o{owner}"), pages)
            };
            if let Ok((id, plan)) = ledger.allocate(&request) {
                carry_out(ledger, bytes, plan);
                let extent = ledger.extents[&id].clone();
                let empty = Extent {
                    pieces: Vec::new(),
                    ..extent.clone()
                };
                assert_eq!(extent.populated(), if thin { 0 } else { pages });
                write(bytes, &empty, &extent);
            }
        }
        Step::Populate(which, at, len) => {
            let id = nth(ledger, which);
            while let Ok(Some(plan)) = ledger.populate(id, Run::new(at, len)) {
                let before = ledger.extents[&id].clone();
                carry_out(ledger, bytes, plan);
                write(bytes, &before, &ledger.extents[&id]);
            }
        }
        Step::Discard(which, at, len) => {
            let id = nth(ledger, which);
            if let Ok(plan) = ledger.discard(id, Run::new(at, len)) {
                carry_out(ledger, bytes, plan);
                assert_eq!(ledger.extents[&id].next(Run::new(at, len)), (len, None));
            }
        }
        Step::Release(which) => {
            if let Ok(plan) = ledger.release(nth(ledger, which)) {
                carry_out(ledger, bytes, plan);
            }
        }
        Step::ReleaseOwner(owner) => {
            while let Ok((plan, left)) = ledger.release_owner(&format!("o{owner}")) {
                carry_out(ledger, bytes, plan);
                if left.is_none() {
                    break;
                }
            }
        }
        Step::PageOut(owner) => {
            let name = format!("o{owner}");
            let pieces = |extent: &Extent| -> Vec<(u64, Run)> {
                let ranges = extent.pieces.iter();
                ranges
                    .map(|p| (extent.id, Run::new(p.at, p.run.len)))
                    .collect()
            };
            let ranges = ledger.extents_of(&name).flat_map(pieces).collect();
            if let Ok(plan) = ledger.page_out(&name, false) {
                carry_out(ledger, bytes, plan);
                files.insert(name, ranges);
            }
        }
        Step::PageIn(owner) => {
            let name = format!("o{owner}");
            let ranges = files.get(&name).cloned().unwrap_or_default();
            if let Ok((before, after)) = ledger.page_in(&name, &ranges) {
                let pages: u64 = ranges.iter().map(|(_, run)| run.len).sum();
                carry_out(ledger, bytes, before);
                check(ledger, bytes);
                carry_out(ledger, bytes, after);
                for piece in ledger.extents_of(&name).flat_map(|extent| &extent.pieces) {
                    bytes[piece.run.start as usize..piece.run.end() as usize].fill(7);
                }
                let back: u64 = ledger.extents_of(&name).map(Extent::populated).sum();
                assert_eq!(back, pages);
            }
        }
    }
}

proptest! {
    #[test]
    fn nothing_leaks_overlaps_or_is_given_unscrubbed(steps in proptest::collection::vec(step(), 1..60)) {
        let mut ledger = Ledger::new(Run::new(3, 250));
        let mut bytes = vec![9u8; 253];
        let mut files = BTreeMap::new();
        for step in steps {
            go(&mut ledger, &mut bytes, &mut files, step);
            check(&ledger, &bytes);
        }
        for owner in 0..4 {
            go(&mut ledger, &mut bytes, &mut files, Step::ReleaseOwner(owner));
        }
        check(&ledger, &bytes);
        prop_assert!(ledger.owners.is_empty() && ledger.extents.is_empty());
        prop_assert_eq!(&ledger.buddy, &Ledger::new(ledger.space).buddy);
    }
}
