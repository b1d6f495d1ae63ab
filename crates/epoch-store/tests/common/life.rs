//! Lives of a store: what a writer does over time, drawn from a seed, and what may be found then.
//!
//! A [`Life`] is run on a disk that may fail or lose its power at any operation. [`Truth`] keeps,
//! from outside, which epochs were acknowledged, which ones may be there, and what each of them
//! may hold. It is the oracle of all tests that use this module:
//! what is found is one of these, byte for byte, and never older than the newest acknowledged one.

use super::{Model, Script, SimHost, Step, read_back};
use outlive_epoch::{EpochReader, StoreError};
use outlive_epoch_store::{Access, Codec, Host, Store};
use outlive_media::{SimDisk, power_off};
use std::cell::{Cell, OnceCell, RefCell};
use std::collections::BTreeMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Arc;

/// Numbers that look random; the same seed gives the same (SplitMix64, Steele and others 2014).
#[derive(Clone, Debug)]
pub struct Dice(pub u64);

impl Dice {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub fn below(&mut self, n: u64) -> u64 {
        self.next() % n.max(1)
    }
}

thread_local! {
    static IDENTITIES: Cell<u64> = const { Cell::new(0) };
    static UNDER_TRIAL: RefCell<String> = const { RefCell::new(String::new()) };
}

/// Notes what is tried now, for the message of a violation.
pub fn trying(what: String) {
    UNDER_TRIAL.with_borrow_mut(|now| *now = what);
}

/// What is tried now.
pub fn tried() -> String {
    UNDER_TRIAL.with_borrow(Clone::clone)
}

/// Begins a sequence of identities, none of which comes twice, as none does in the real world. The stores of
/// every third seed pack their pages with LZ4, of another third with zstd.
pub fn begin_identities(seed: u64) {
    IDENTITIES.set(seed << 24);
    super::pack([None, Some(Codec::Lz4), Some(Codec::Zstd)][(seed % 3) as usize]);
}

/// A host like [`SimHost`], with the identities of this thread's sequence.
#[derive(Default)]
struct LifeHost(SimHost);

impl Host for LifeHost {
    fn realtime_ns(&self) -> u64 {
        self.0.realtime_ns()
    }

    fn monotonic_us(&self) -> u64 {
        self.0.monotonic_us()
    }

    fn uuid(&self) -> [u8; 16] {
        let n = IDENTITIES.get() + 1;
        IDENTITIES.set(n);
        (u128::from(Dice(n).next()) << 64 | u128::from(n)).to_le_bytes()
    }
}

/// Opens the store on a disk.
pub fn open(disk: &SimDisk, access: Access) -> Result<Store, StoreError> {
    let host = Arc::new(LifeHost::default());
    Store::open_in(Arc::new(disk.directory()), host, access).map(super::packing)
}

fn create(disk: &SimDisk) -> Result<Store, StoreError> {
    let host = Arc::new(LifeHost::default());
    Store::create_in(Arc::new(disk.directory()), host).map(super::packing)
}

/// One thing that happens to a store.
#[derive(Clone, Debug)]
pub enum Act {
    Epoch(Script),
    /// An epoch of a power event, in space written ahead.
    Event(Script),
    /// An epoch that is begun and given up.
    Abandon(Script),
    /// The store is closed and opened again.
    Reopen,
    /// Whether replaced generations stay, from now on.
    KeepOlder(bool),
    /// A flattening is begun, and so many pieces of it are done.
    Flatten(u64),
    /// What was begun is brought to its end; a flattening, where nothing was.
    Switch,
    /// A generation is written again with some of its epochs only, by the bits of this number.
    Thin(u64),
    /// All older generations are removed.
    Forget,
}

pub type Life = Vec<Act>;

fn script(dice: &mut Dice) -> Script {
    let step = |dice: &mut Dice| {
        let (space, first) = (dice.below(2) as u32, dice.below(6));
        if dice.below(5) == 0 {
            return Step::Absent(space, first, 1 + dice.below(3));
        }
        let seeds = (0..1 + dice.below(3))
            .map(|_| dice.below(6) as u8)
            .collect();
        Step::Put(space, first, seeds)
    };
    // Few sizes and few contents, so that attempts often differ in their bytes alone.
    let tree =
        |dice: &mut Dice| vec![dice.below(3) as u8; [8, 8, 700, 5000][dice.below(4) as usize]];
    Script {
        base: dice.below(5) == 0,
        steps: (0..dice.below(4)).map(|_| step(dice)).collect(),
        trees: [("root", dice.below(4) > 0), ("fds", dice.below(3) == 0)]
            .into_iter()
            .filter(|(_, there)| *there)
            .map(|(name, _)| (name, tree(dice)))
            .collect(),
    }
}

/// The life that a seed stands for.
pub fn life(seed: u64) -> Life {
    let mut dice = Dice(seed);
    let mut acts = vec![Act::Epoch(script(&mut dice))];
    for _ in 0..2 + dice.below(3) {
        acts.push(match dice.below(9) {
            0..5 => Act::Epoch(script(&mut dice)),
            5 => Act::Event(script(&mut dice)),
            6 | 7 => Act::Abandon(script(&mut dice)),
            _ => Act::Reopen,
        });
    }
    grow(&mut acts, &mut Dice(!seed));
    acts
}

/// Puts work on generations into a life, at any place of it.
fn grow(acts: &mut Life, dice: &mut Dice) {
    let place = |acts: &Life, dice: &mut Dice| 1 + dice.below(acts.len() as u64) as usize;
    for _ in 0..1 + dice.below(3) {
        let at = place(acts, dice);
        match dice.below(6) {
            0..3 => {
                acts.insert(at, Act::Flatten(dice.below(7)));
                let later = at + 1 + dice.below((acts.len() - at) as u64) as usize;
                acts.insert(later, Act::Switch);
            }
            3 | 4 => acts.insert(at, Act::Thin(dice.next())),
            _ => acts.insert(at, Act::Forget),
        }
    }
    acts.insert(0, Act::KeepOlder(dice.below(3) > 0));
}

/// What may be found, by all that is known outside.
#[derive(Clone, Debug)]
pub struct Truth {
    /// The newest acknowledged epoch: its number (0 for none) and what it may hold.
    acked: (u64, Vec<Model>),
    /// Epochs of attempts that failed since.
    maybe: Vec<(u64, Model)>,
    /// All contents that an epoch was ever given.
    ever: BTreeMap<u64, Vec<Model>>,
    /// Errors that were met.
    pub failures: u64,
    /// A number that stands for all of this, once it is asked for, which is after the life.
    key: OnceCell<u64>,
}

/// What was found on a disk: an epoch, and a number that stands for what it holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Found {
    pub id: u64,
    contents: u64,
}

fn hash_of(of: &impl Hash) -> u64 {
    let mut hasher = DefaultHasher::new();
    of.hash(&mut hasher);
    hasher.finish()
}

impl Default for Truth {
    fn default() -> Self {
        Self {
            acked: (0, vec![Model::default()]),
            maybe: Vec::new(),
            ever: BTreeMap::new(),
            failures: 0,
            key: OnceCell::new(),
        }
    }
}

impl Truth {
    /// The newest acknowledged epoch.
    pub fn acked(&self) -> u64 {
        self.acked.0
    }

    /// The same for two lives after which the same may be found.
    pub fn key(&self) -> u64 {
        *self
            .key
            .get_or_init(|| hash_of(&(&self.acked, &self.maybe, &self.ever)))
    }

    /// An attempt begins.
    fn attempt(&mut self, script: &Script) -> Vec<(u64, Model)> {
        let below = self.acked.1.iter().map(|model| (self.acked.0, model));
        let below = below.chain(self.maybe.iter().map(|(id, model)| (*id, model)));
        let mut fresh: Vec<(u64, Model)> = below
            .map(|(id, model)| (id + 1, script.apply(model)))
            .collect();
        fresh.sort_by_key(|(id, _)| *id);
        fresh.dedup();
        for (id, model) in &fresh {
            let ever = self.ever.entry(*id).or_default();
            if !ever.contains(model) {
                ever.push(model.clone());
            }
        }
        self.maybe.extend(fresh.iter().cloned());
        fresh
    }

    fn acknowledge(&mut self, id: u64, fresh: Vec<(u64, Model)>) {
        let models: Vec<Model> = fresh
            .into_iter()
            .filter(|(i, _)| *i == id)
            .map(|(_, m)| m)
            .collect();
        assert!(
            !models.is_empty(),
            "epoch {id} was acknowledged, which cannot be"
        );
        self.acked = (id, models);
        self.maybe.clear();
    }

    /// Takes what was found for the state of things.
    fn adopt(&mut self, found: (u64, Model)) {
        self.acked = (found.0, vec![found.1]);
        self.maybe.clear();
    }

    /// Compares everything on a disk; gives the newest epoch, or the damage that was named.
    pub fn check(&self, disk: &SimDisk) -> Result<Found, StoreError> {
        let (id, model) = self.compare(disk)?;
        let contents = hash_of(&model);
        Ok(Found { id, contents })
    }

    fn compare(&self, disk: &SimDisk) -> Result<(u64, Model), StoreError> {
        let store = match open(disk, Access::Read) {
            Ok(store) => store,
            Err(StoreError::Missing { .. }) => {
                assert_eq!(
                    self.acked.0,
                    0,
                    "{}: acknowledged, and nothing is there",
                    tried()
                );
                return Ok((0, Model::default()));
            }
            Err(e) => return Err(e),
        };
        self.check_store(&store)
    }

    fn check_store(&self, store: &Store) -> Result<(u64, Model), StoreError> {
        let reader = store.epoch(None)?;
        let (id, found) = (reader.id().0, read_back(&reader)?);
        let acked = id == self.acked.0 && self.acked.1.contains(&found);
        let maybe = || self.maybe.iter().any(|(i, m)| *i == id && *m == found);
        assert!(
            acked || maybe(),
            "{}: epoch {id} is found with {found:?}, but {} is acknowledged: {self:?}",
            tried(),
            self.acked.0
        );
        for epoch in store.epochs() {
            let older = read_back(&store.epoch(Some(epoch.id))?)?;
            let ever = self.ever.get(&epoch.id.0);
            assert!(
                ever.is_some_and(|ever| ever.contains(&older)),
                "{}: epoch {} holds what it never was given",
                tried(),
                epoch.id
            );
        }
        Ok((id, found))
    }
}

/// How often one thing is tried again that fails.
const TRIES: u32 = 4;

fn is_power_off(error: &StoreError) -> bool {
    matches!(error, StoreError::Medium { source, .. } if source.kind() == power_off())
}

/// Runs a life as far as the disk lets it; what fails (and not for lack of power) is tried again.
pub fn live(disk: &SimDisk, life: &[Act]) -> Truth {
    let mut truth = Truth::default();
    if let Err(e) = run(disk, life, &mut truth) {
        let known = matches!(
            e,
            StoreError::Medium { .. } | StoreError::Full { .. } | StoreError::Damaged { .. }
        );
        assert!(known, "{e}");
        truth.failures += 1;
    }
    truth
}

fn run(disk: &SimDisk, life: &[Act], truth: &mut Truth) -> Result<(), StoreError> {
    let mut store = again(truth, |_| create(disk))?;
    let mut keeps = false;
    for act in life {
        match act {
            Act::KeepOlder(on) => {
                keeps = *on;
                store.keep_older(keeps);
            }
            Act::Flatten(pieces) => again(truth, |_| {
                store.begin_flattening()?;
                (0..*pieces).try_for_each(|_| store.work(4096).map(|_| ()))
            })?,
            Act::Switch => again(truth, |_| switch(&mut store))?,
            Act::Thin(which) => again(truth, |_| thin(&mut store, *which))?,
            Act::Forget => again(truth, |_| forget(&mut store))?,
            Act::Epoch(script) => epoch(&mut store, script, false, truth)?,
            Act::Event(script) => epoch(&mut store, script, true, truth)?,
            Act::Abandon(script) => again(truth, |_| {
                let writer = if script.base {
                    store.begin_base()
                } else {
                    store.begin()
                };
                script.stage(&mut *writer?)
            })?,
            Act::Reopen => {
                let closed = store.close();
                truth.failures += u64::from(closed.is_err());
                store = again(truth, |_| open(disk, Access::Write))?;
                store.keep_older(keeps);
                // What a writer found counts from then on, also if it was not acknowledged.
                again(truth, |truth| {
                    if store.newest().is_some() {
                        let found = truth.check_store(&store)?;
                        truth.adopt(found);
                    }
                    Ok(())
                })?;
            }
        }
    }
    store.close()
}

/// Ends a flattening that was begun, or one of its own. What came in the place of that which was being
/// flattened since then makes the store give it up, by a word and without harm.
fn switch(store: &mut Store) -> Result<(), StoreError> {
    if store.is_working() {
        match store.switch() {
            Err(StoreError::Misuse(why))
                if why.contains("another base") || why.contains("has no generation") =>
            {
                assert!(!store.is_working(), "{why}");
            }
            done => return done,
        }
    }
    store.begin_flattening()?;
    store.switch()
}

/// Leaves epochs of a generation out.
fn thin(store: &mut Store, which: u64) -> Result<(), StoreError> {
    let all = store.generations();
    let one = &all[which as usize % all.len()];
    let wanted = one.epochs.iter().enumerate();
    let wanted = wanted.filter(|(i, _)| which >> (8 + i % 40) & 1 == 1);
    let mut wanted: Vec<_> = wanted.map(|(_, epoch)| epoch.id).collect();
    if wanted.is_empty() {
        wanted.push(one.epochs[0].id);
    }
    store.begin_thinning(one.number, &wanted)?;
    store.switch()
}

/// Removes all older generations.
pub fn forget(store: &mut Store) -> Result<(), StoreError> {
    for one in store.generations().iter().filter(|one| !one.newest) {
        store.remove_generation(one.number)?;
    }
    Ok(())
}

fn epoch(
    store: &mut Store,
    script: &Script,
    event: bool,
    truth: &mut Truth,
) -> Result<(), StoreError> {
    again(truth, |truth| {
        let fresh = truth.attempt(script);
        let id = if event && store.newest().is_some() && !script.base {
            script.write_event(store)?
        } else {
            script.write(store)?
        };
        truth.acknowledge(id.0, fresh);
        Ok(())
    })
}

fn again<T>(
    truth: &mut Truth,
    mut act: impl FnMut(&mut Truth) -> Result<T, StoreError>,
) -> Result<T, StoreError> {
    let mut tries = 0;
    loop {
        match act(truth) {
            Err(e) if !is_power_off(&e) && tries < TRIES => {
                tries += 1;
                truth.failures += 1;
            }
            other => return other,
        }
    }
}
