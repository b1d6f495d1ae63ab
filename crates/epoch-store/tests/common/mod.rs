//! What the tests of the store share: a model of an epoch, and scripts of what a writer does.
#![allow(dead_code, reason = "each test uses a part")]

pub mod life;
pub mod trials;

use outlive_epoch::{
    Content, EpochFacts, EpochId, EpochReader, EpochWriter, PAGE_SIZE, Run, SpaceId, StoreError,
};
use outlive_epoch_store::{Access, Codec, Host, Reader, Secret, Store, Writer};
use outlive_media::SimDisk;
use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, LazyLock};

/// A host whose clock counts its questions and whose identities are numbered.
#[derive(Default)]
pub struct SimHost(AtomicU64);

impl Host for SimHost {
    fn realtime_ns(&self) -> u64 {
        1_000_000 + 5000 * self.0.fetch_add(1, Ordering::Relaxed)
    }

    fn monotonic_us(&self) -> u64 {
        self.0.fetch_add(1, Ordering::Relaxed)
    }

    fn uuid(&self) -> [u8; 16] {
        [self.0.fetch_add(1, Ordering::Relaxed) as u8; 16]
    }
}

/// The contents of an epoch: trees by group, and pages (by space and index) as their seeds.
#[derive(Clone, Default, PartialEq, Eq, Hash)]
pub struct Model {
    pub trees: BTreeMap<String, Vec<u8>>,
    pub pages: BTreeMap<(u32, u64), u8>,
}

impl std::fmt::Debug for Model {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let brief = |tree: &Vec<u8>| (tree.len(), tree.first().copied());
        let trees: Vec<_> = self.trees.iter().map(|(n, t)| (n, brief(t))).collect();
        write!(f, "trees {trees:?} pages {:?}", self.pages)
    }
}

/// One thing that a writer does.
#[derive(Clone, Debug)]
pub enum Step {
    /// Space, first page, and a seed for each page; 0 stands for a page of zeros.
    Put(u32, u64, Vec<u8>),
    Absent(u32, u64, u64),
}

/// An epoch to be written: whether it is a base, its steps and its trees.
#[derive(Clone, Debug)]
pub struct Script {
    pub base: bool,
    pub steps: Vec<Step>,
    pub trees: Vec<(&'static str, Vec<u8>)>,
}

/// The page that a seed stands for: no two sectors of it are alike.
pub fn page(seed: u8) -> &'static [u8] {
    static PAGES: LazyLock<Vec<Vec<u8>>> = LazyLock::new(|| (0..=255).map(make_page).collect());
    &PAGES[usize::from(seed)]
}

fn make_page(seed: u8) -> Vec<u8> {
    let byte = |i: usize| seed.wrapping_add((i / 512) as u8).wrapping_mul(seed) ^ (i as u8 & seed);
    let mut page: Vec<u8> = (0..PAGE_SIZE).map(byte).collect();
    page[PAGE_SIZE - 1] = seed;
    page
}

pub fn run(space: u32, first: u64, count: u64) -> Run {
    Run::new(SpaceId(space), first, count).unwrap()
}

impl Script {
    /// The model after this epoch.
    pub fn apply(&self, before: &Model) -> Model {
        let mut model = if self.base {
            Model::default()
        } else {
            before.clone()
        };
        model.trees = self
            .trees
            .iter()
            .map(|(n, b)| ((*n).to_owned(), b.clone()))
            .collect();
        for step in &self.steps {
            match step {
                Step::Put(space, first, seeds) => {
                    let pages = (*first..).zip(seeds).map(|(i, seed)| ((*space, i), *seed));
                    model.pages.extend(pages);
                }
                Step::Absent(space, first, count) => {
                    let gone = *first..first + count;
                    model
                        .pages
                        .retain(|(s, i), _| s != space || !gone.contains(i));
                }
            }
        }
        model
    }

    /// Hands all of it to a writer.
    pub fn stage(&self, writer: &mut dyn EpochWriter) -> Result<(), StoreError> {
        for step in &self.steps {
            match step {
                Step::Put(space, first, seeds) => {
                    let bytes: Vec<u8> =
                        seeds.iter().flat_map(|seed| page(*seed)).copied().collect();
                    writer.put(run(*space, *first, seeds.len() as u64), &bytes)?;
                }
                Step::Absent(space, first, count) => writer.absent(run(*space, *first, *count))?,
            }
        }
        self.trees
            .iter()
            .try_for_each(|(name, bytes)| writer.tree(name, bytes))
    }

    /// Writes and commits it.
    pub fn write(&self, store: &mut Store) -> Result<EpochId, StoreError> {
        let writer = if self.base {
            store.begin_base()?
        } else {
            store.begin()?
        };
        self.write_with(writer)
    }

    /// The same as the epoch of a power event, in space that is written ahead.
    pub fn write_event(&self, store: &mut Store) -> Result<EpochId, StoreError> {
        while store.write_ahead(3 * PAGE_SIZE as u64)?.more {}
        self.write_with(store.begin_event()?)
    }

    fn write_with(&self, mut writer: Box<Writer<'_>>) -> Result<EpochId, StoreError> {
        self.stage(&mut *writer)?;
        let id = writer.id();
        let facts = EpochFacts {
            taken_at_ns: id.0,
            stop_us: id.0,
        };
        let acked = writer.commit(facts)?;
        assert_eq!(acked.epoch, id);
        Ok(id)
    }
}

/// Everything that a reader gives, byte for byte.
pub fn read_back(reader: &Reader) -> Result<Model, StoreError> {
    let mut model = Model::default();
    for group in reader.groups() {
        let tree = reader.tree(&group)?.expect("a group that is listed");
        model.trees.insert(group, tree);
    }
    let mut put = |run: Run, seeds: &mut dyn Iterator<Item = u8>| {
        for i in run.first()..run.end() {
            let seed = seeds.next().expect("a seed for each page");
            let twice = model.pages.insert((run.space().0, i), seed);
            assert_eq!(twice, None, "page {i} is handed out twice");
        }
    };
    let walked = reader.pages(&mut |run, content| {
        match content {
            Content::Zero => put(run, &mut std::iter::repeat(0)),
            Content::Bytes(bytes) => {
                assert_eq!(bytes.len() as u64, run.bytes());
                let seed = |bytes: &[u8]| {
                    let seed = bytes[PAGE_SIZE - 1];
                    assert!(bytes == page(seed), "a page is not what was written");
                    seed
                };
                put(run, &mut bytes.chunks(PAGE_SIZE).map(seed));
            }
        }
        Ok(())
    });
    walked.map_err(|e| match e {
        outlive_epoch::VisitError::Store(e) => e,
        outlive_epoch::VisitError::Visitor(e) => panic!("the visitor has no errors: {e}"),
    })?;
    let runs = reader.runs();
    let listed = runs
        .iter()
        .flat_map(|r| (r.first()..r.end()).map(|i| (r.space().0, i)));
    assert!(
        listed.eq(model.pages.keys().copied()),
        "runs and pages differ"
    );
    Ok(model)
}

thread_local! {
    static PACKING: Cell<Option<Codec>> = const { Cell::new(None) };
    static KEY: RefCell<Option<Secret>> = const { RefCell::new(None) };
}

/// The stores that this thread opens from now on are encrypted so.
pub fn encrypt(secret: Option<Secret>) {
    KEY.set(secret);
}

/// A key for tests.
pub fn secret(first: u8) -> Secret {
    let mut bytes: Vec<u8> = (0..32).collect();
    bytes[0] = first;
    Secret::parse(&bytes).unwrap()
}

/// The stores that this thread opens from now on pack pages so.
pub fn pack(codec: Option<Codec>) {
    PACKING.set(codec);
}

fn packing(mut store: Store) -> Store {
    store.pack(PACKING.get());
    store
}

pub fn open(disk: &SimDisk, access: Access) -> Result<Store, StoreError> {
    let host = Arc::new(SimHost::default());
    let key = KEY.with_borrow(Clone::clone);
    Store::open_in_with(Arc::new(disk.directory()), host, access, key).map(packing)
}

pub fn create(disk: &SimDisk) -> Result<Store, StoreError> {
    let host = Arc::new(SimHost::default());
    let key = KEY.with_borrow(Clone::clone);
    Store::create_in_with(Arc::new(disk.directory()), host, key).map(packing)
}

/// A small history that uses every feature: zero pages, superseded pages, absent pages, trees
/// that change, stay and go, a base in the middle.
pub fn history() -> Vec<Script> {
    let put = |space, first, seeds: &[u8]| Step::Put(space, first, seeds.to_vec());
    vec![
        Script {
            base: false,
            steps: vec![put(1, 10, &[1, 2, 0, 3]), put(2, 0, &[4])],
            trees: vec![("root", b"first".to_vec()), ("fds", vec![9; 700])],
        },
        Script {
            base: false,
            steps: vec![put(1, 11, &[5, 0]), put(1, 11, &[6]), Step::Absent(2, 0, 1)],
            trees: vec![("root", b"second".to_vec()), ("fds", vec![9; 700])],
        },
        Script {
            base: false,
            steps: vec![put(1, 12, &[7])],
            trees: vec![("fds", vec![9; 700])],
        },
        Script {
            base: true,
            steps: vec![put(1, 10, &[1, 6]), put(3, 1 << 40, &[8])],
            trees: vec![("root", b"based".to_vec()), ("fds", vec![9; 700])],
        },
        Script {
            base: false,
            steps: vec![put(1, 12, &[9]), Step::Absent(1, 10, 1)],
            trees: vec![("root", b"based".to_vec())],
        },
    ]
}

/// The models after each of these epochs.
pub fn models(history: &[Script]) -> Vec<Model> {
    let mut model = Model::default();
    let after = |script: &Script| {
        model = script.apply(&model);
        model.clone()
    };
    history.iter().map(after).collect()
}
