//! What a stream brings is what was sent, and anything else is refused.

use crate::frame::{Kind, Sender};
use crate::{Passed, Which, export, import};
use outlive_epoch::{
    Content, EpochFacts, EpochId, EpochReader, EpochWriter, PAGE_SIZE, PageSink, Run, SpaceId,
    StoreError,
};
use outlive_epoch_store::{Access, Store};
use proptest::prelude::*;
use std::collections::BTreeMap;
use std::path::Path;

/// Pages by space and index, `None` for zeros.
pub(crate) type Pages = BTreeMap<(u32, u64), Option<Vec<u8>>>;
/// One epoch as a whole: its groups, its pages, and what its writer said of it.
pub(crate) type Whole = (BTreeMap<String, Vec<u8>>, Pages, EpochFacts);

pub(crate) fn whole(store: &Store, id: EpochId) -> Whole {
    let reader = store.epoch(Some(id)).unwrap();
    let tree = |group: String| (group.clone(), reader.tree(&group).unwrap().unwrap());
    let mut pages = BTreeMap::new();
    reader
        .pages(&mut |run, content| {
            for i in 0..run.count() {
                let from = i as usize * PAGE_SIZE;
                let bytes = match content {
                    Content::Bytes(bytes) => Some(bytes[from..from + PAGE_SIZE].to_vec()),
                    Content::Zero => None,
                };
                pages.insert((run.space().0, run.first() + i), bytes);
            }
            Ok(())
        })
        .unwrap();
    let facts = store.epochs().iter().find(|e| e.id == id).unwrap().facts;
    (
        reader.groups().into_iter().map(tree).collect(),
        pages,
        facts,
    )
}

pub(crate) fn wholes(store: &Store) -> BTreeMap<u64, Whole> {
    let ids = store.epochs().into_iter().map(|epoch| epoch.id);
    ids.map(|id| (id.0, whole(store, id))).collect()
}

/// What an epoch does to a run of pages.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Does {
    Put(u8),
    Zero,
    Absent,
}

type Step = (u32, u64, u64, Does);

pub(crate) fn write(
    store: &mut Store,
    base: bool,
    steps: &[Step],
    trees: &[(&str, &[u8])],
    at: u64,
) {
    let mut writer = if base {
        store.begin_base().unwrap()
    } else {
        store.begin().unwrap()
    };
    for (space, first, count, does) in steps {
        let run = Run::new(SpaceId(*space), *first, *count).unwrap();
        match does {
            Does::Put(byte) => {
                let bytes = vec![*byte; *count as usize * PAGE_SIZE];
                writer.put(run, &bytes).unwrap();
            }
            Does::Zero => writer.zero(run).unwrap(),
            Does::Absent => writer.absent(run).unwrap(),
        }
    }
    for (group, tree) in trees {
        writer.tree(group, tree).unwrap();
    }
    let facts = EpochFacts {
        taken_at_ns: at,
        stop_us: at + 1,
    };
    writer.commit(facts).unwrap();
}

/// A store with three epochs, the first of them number 2.
pub(crate) fn sample(dir: &Path) -> Store {
    let mut store = Store::create(dir.join("from")).unwrap();
    let big = vec![7; (5 << 20) + 3];
    write(&mut store, false, &[], &[], 1);
    let steps = [
        (0, 10, 600, Does::Put(1)),
        (0, 700, 9, Does::Zero),
        (3, 1 << 40, 2, Does::Put(2)),
    ];
    write(&mut store, true, &steps, &[("a", b"one"), ("big", &big)], 2);
    let steps = [
        (0, 11, 2, Does::Put(9)),
        (0, 11, 1, Does::Absent),
        (0, 500, 3, Does::Zero),
    ];
    write(
        &mut store,
        false,
        &steps,
        &[("a", b"two"), ("big", &big)],
        3,
    );
    write(&mut store, false, &[], &[("a", b"")], 4);
    store
}

fn sent(store: &Store, which: Which) -> Vec<u8> {
    let mut bytes = Vec::new();
    let passed = export(store, which, b"about", &mut bytes, "out", &mut |_| {}).unwrap();
    assert_eq!(passed.bytes, bytes.len() as u64);
    bytes
}

fn received(mut bytes: &[u8], to: &Path) -> Result<Passed, StoreError> {
    let open = |about: &[u8]| {
        assert_eq!(about, b"about");
        Store::create(to)
    };
    import(&mut bytes, "in", open, &mut |_| {})
}

#[test]
fn epochs_of_several_generations_arrive_as_they_were() {
    let dir = tempfile::tempdir().unwrap();
    let mut store = sample(dir.path());
    store.keep_older(true);
    for number in 5..9 {
        let steps = [
            (0, number, 1, Does::Put(number as u8)),
            (3, 1 << 40, 1, Does::Absent),
            (
                0,
                20,
                1,
                if number == 6 {
                    Does::Zero
                } else {
                    Does::Put(3)
                },
            ),
        ];
        write(&mut store, false, &steps, &[("a", b"two")], number);
    }
    store.begin_flattening().unwrap();
    store.switch().unwrap();
    write(
        &mut store,
        true,
        &[(7, 1, 1, Does::Put(1))],
        &[("a", b"two")],
        9,
    );
    write(&mut store, false, &[], &[("a", b"two")], 10);
    let oldest = store.generations()[0].number;
    let wanted = [3, 4, 7].map(EpochId);
    store.begin_thinning(oldest, &wanted).unwrap();
    store.switch().unwrap();
    let sent_epochs = wholes(&store);
    let numbers: Vec<u64> = sent_epochs.keys().copied().collect();
    assert_eq!(numbers, [3, 4, 7, 8, 9, 10]);
    received(&sent(&store, Which::All), &dir.path().join("to")).unwrap();
    let to = Store::open(dir.path().join("to"), Access::Read).unwrap();
    assert_eq!(to.generations().len(), 1);
    assert!(wholes(&to) == sent_epochs);
}

#[test]
fn every_epoch_arrives_as_it_was() {
    let dir = tempfile::tempdir().unwrap();
    let from = sample(dir.path());
    let bytes = sent(&from, Which::All);
    let passed = received(&bytes, &dir.path().join("to")).unwrap();
    assert_eq!(passed.epochs, Some((2, 4)));
    assert_eq!(passed.bytes, bytes.len() as u64);
    let to = Store::open(dir.path().join("to"), Access::Read).unwrap();
    assert_eq!(wholes(&to), wholes(&from));
    assert!(to.verify(&mut |_, _| {}).unwrap().is_clean());
    let repeated = 2 * (5 << 20);
    assert!(bytes.len() < repeated, "an unchanged tree goes over once");
    // It can be written on.
    drop(to);
    let mut to = Store::open(dir.path().join("to"), Access::Write).unwrap();
    write(&mut to, false, &[], &[], 5);
    assert_eq!(to.newest(), Some(EpochId(5)));
}

#[test]
fn one_epoch_arrives_whole_and_alone() {
    let dir = tempfile::tempdir().unwrap();
    let from = sample(dir.path());
    let bytes = sent(&from, Which::One(EpochId(3)));
    received(&bytes, &dir.path().join("to")).unwrap();
    let to = Store::open(dir.path().join("to"), Access::Read).unwrap();
    let expected = BTreeMap::from([(3, whole(&from, EpochId(3)))]);
    assert_eq!(wholes(&to), expected);
    let gone = Which::One(EpochId(1));
    let error = export(&from, gone, b"", &mut Vec::new(), "out", &mut |_| {});
    assert!(matches!(error, Err(StoreError::Missing { .. })));
}

/// A store with one small epoch, as a stream.
fn small(dir: &Path) -> Vec<u8> {
    let mut store = Store::create(dir.join("small")).unwrap();
    let steps = [(0, 5, 1, Does::Put(3)), (0, 6, 4, Does::Zero)];
    write(&mut store, false, &steps, &[("a", b"tree")], 1);
    let steps = [(0, 5, 1, Does::Absent)];
    write(&mut store, false, &steps, &[("a", b"tree")], 2);
    sent(&store, Which::All)
}

#[test]
fn a_stream_that_ends_early_or_goes_on_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let bytes = small(dir.path());
    // Around every frame, and some places within pages.
    let cuts = (0..bytes.len()).filter(|at| at % 97 == 0 || *at < 200 || bytes.len() - at < 400);
    for at in cuts {
        let to = tempfile::tempdir_in("/dev/shm").unwrap();
        let error = received(&bytes[..at], to.path()).unwrap_err();
        assert!(matches!(error, StoreError::Damaged { .. }), "{at}: {error}");
        assert!(error.to_string().contains("ends after"), "{at}: {error}");
    }
    let mut more = bytes.clone();
    more.push(0);
    let error = received(&more, &dir.path().join("more")).unwrap_err();
    assert!(error.to_string().contains("after its end"), "{error}");
}

#[test]
fn every_flipped_byte_is_noticed() {
    let dir = tempfile::tempdir().unwrap();
    let bytes = small(dir.path());
    for at in (0..bytes.len()).filter(|at| at % 61 == 0 || *at < 300 || bytes.len() - at < 400) {
        let mut bad = bytes.clone();
        bad[at] ^= 1 << (at % 8);
        let to = tempfile::tempdir_in("/dev/shm").unwrap();
        let error = received(&bad, to.path()).unwrap_err();
        let told = matches!(error, StoreError::Damaged { .. });
        assert!(told, "{at}: {error}");
    }
}

#[test]
fn a_newer_stream_is_refused_by_its_version() {
    let mut head = b"OUTLIVE\x1a".to_vec();
    head.extend_from_slice(&2_u32.to_le_bytes());
    let crc = crc32c::crc32c(&head);
    head.extend_from_slice(&crc.to_le_bytes());
    let dir = tempfile::tempdir().unwrap();
    let error = received(&head, dir.path()).unwrap_err();
    assert!(
        matches!(error, StoreError::Newer { found: 2, .. }),
        "{error}"
    );
}

type Frames = Vec<(Kind, Vec<u8>)>;

/// A stream with right checksums and any frames.
fn forged(frames: &[(Kind, Vec<u8>)], epochs: u64) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut sender = Sender::begin(&mut bytes, "out").unwrap();
    sender.frame(Kind::About, b"about", b"").unwrap();
    for (kind, contents) in frames {
        sender.frame(*kind, contents, b"").unwrap();
    }
    sender.end(epochs).unwrap();
    bytes
}

fn numbers(numbers: &[u64]) -> Vec<u8> {
    numbers.iter().flat_map(|n| n.to_le_bytes()).collect()
}

fn run(first: u64, count: u64, space: u32) -> Vec<u8> {
    let mut bytes = numbers(&[first, count]);
    bytes.extend_from_slice(&space.to_le_bytes());
    bytes
}

#[test]
fn frames_that_mean_harm_are_refused_although_their_checksums_are_right() {
    let begin = |id| (Kind::Epoch, numbers(&[id, 0, 0]));
    let commit = |pages, groups| (Kind::Commit, numbers(&[pages, groups]));
    let tree = |name: &[u8]| {
        let mut bytes = (name.len() as u16).to_le_bytes().to_vec();
        bytes.extend_from_slice(name);
        (Kind::Tree, bytes)
    };
    let huge = [run(0, 1 << 52, 0), run(1 << 51, 1 << 51, 7)].concat();
    let good = [begin(8), (Kind::Zero, huge.clone()), commit(0, 0)];
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    received(&forged(&good, 1), dir.path()).unwrap();
    let page = |count| [run(0, count, 0), vec![1; PAGE_SIZE]].concat();
    let bad: &[(&str, Frames)] = &[
        ("epochs are missing", vec![]),
        ("not in its place", vec![commit(0, 0)]),
        ("not in its place", vec![begin(1), commit(0, 0), tree(b"a")]),
        ("not in order", vec![begin(0), commit(0, 0)]),
        ("not in order", vec![begin(u64::MAX), commit(0, 0)]),
        ("not in order", vec![begin(2), commit(0, 0), begin(1)]),
        ("not in order", vec![begin(1), commit(0, 0), begin(1)]),
        ("too short", vec![(Kind::Epoch, vec![1; 9])]),
        ("not complete", vec![begin(1), begin(2)]),
        ("not complete", vec![begin(1)]),
        ("lacks pages", vec![begin(1), commit(1, 0)]),
        ("lacks pages", vec![begin(1), commit(0, 1)]),
        ("not in order", vec![begin(1), (Kind::Pages, page(2))]),
        (
            "not in order",
            vec![begin(1), (Kind::Pages, page(u64::MAX))],
        ),
        ("not in order", vec![begin(1), (Kind::Pages, vec![0; 5])]),
        ("not in order", vec![begin(1), (Kind::Zero, run(0, 0, 0))]),
        (
            "not in order",
            vec![begin(1), (Kind::Zero, run(1, 1 << 52, 0))],
        ),
        ("not in order", vec![begin(1), (Kind::Absent, vec![0; 19])]),
        (
            "not in its place",
            vec![begin(1), (Kind::Zero, huge), tree(b"a")],
        ),
        ("not in order", vec![begin(1), tree(b"b"), tree(b"a")]),
        ("not in order", vec![begin(1), tree(b"a"), tree(b"a")]),
        ("not in order", vec![begin(1), tree(b"\xff")]),
        ("not in order", vec![begin(1), (Kind::Tree, vec![9, 0, 1])]),
        ("not in order", vec![begin(1), (Kind::TreeMore, vec![1])]),
        (
            "not in order",
            vec![begin(1), (Kind::TreeSame, b"a".to_vec())],
        ),
    ];
    for (what, frames) in bad {
        let dir = tempfile::tempdir_in("/dev/shm").unwrap();
        let error = received(&forged(frames, 1), dir.path()).unwrap_err();
        let said = matches!(error, StoreError::Damaged { .. }) && error.to_string().contains(what);
        assert!(said, "{what}, {frames:?}: {error}");
    }
    let two = [begin(1), commit(0, 0)];
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let error = received(&forged(&two, 2), dir.path()).unwrap_err();
    assert!(error.to_string().contains("epochs are missing"), "{error}");
}

fn does() -> impl Strategy<Value = Does> {
    prop_oneof![
        (1_u8..).prop_map(Does::Put),
        Just(Does::Zero),
        Just(Does::Absent),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn any_epochs_come_back_as_they_were(
        epochs in prop::collection::vec(
            (prop::collection::vec((0_u32..2, 0_u64..300, 1_u64..300, does()), 0..6), 0_u8..3),
            1..5,
        ),
    ) {
        let dir = tempfile::tempdir_in("/dev/shm").unwrap();
        let mut from = Store::create(dir.path().join("from")).unwrap();
        for (at, (steps, tree)) in epochs.iter().enumerate() {
            let tree = [*tree; 4];
            write(&mut from, false, steps, &[("tree", &tree)], at as u64);
        }
        let bytes = sent(&from, Which::All);
        received(&bytes, &dir.path().join("to")).unwrap();
        let to = Store::open(dir.path().join("to"), Access::Read).unwrap();
        prop_assert_eq!(wholes(&to), wholes(&from));
    }

    #[test]
    fn rubbish_is_refused_and_does_no_harm(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
        let dir = tempfile::tempdir_in("/dev/shm").unwrap();
        let mut with_head = small_head();
        with_head.extend_from_slice(&bytes);
        prop_assert!(received(&bytes, dir.path()).is_err());
        prop_assert!(received(&with_head, dir.path()).is_err());
    }
}

fn small_head() -> Vec<u8> {
    forged(&[], 0)[..16].to_vec()
}
