//! Keeping a store short while epochs are added to it: flattening, and what retention says.
//!
//! # Rules
//! - A log that has grown long is flattened from what is stored; the program is not stopped for it, and
//!   copies nothing. Only where that cannot be done (what is stored is damaged, a hold-up budget has
//!   no room, or the log has grown four times as long meanwhile) a full epoch of the program begins a
//!   new generation.
//! - The work is done in pieces of [`PIECE`] bytes, by the keeper's own thread, while the next epoch is
//!   at least [`ROOM`] away, and at most [`RATE`] bytes a second. Where the log has grown by half since
//!   it was found to be long, or the work began, each epoch is preceded by a piece twice as large as what the last one wrote: so
//!   the work comes to an end however fast the program writes.
//! - With a predicted hold-up budget a piece is done only where an event that came right then would
//!   still be durable in time, after waiting for the piece; with a strict one none is done.
//! - What fails is said once, changes nothing of the epochs, and is tried again after [`PAUSE`].
//! - What was asked for is done at once, without a limit, and answered when it is done.

use crate::KeeperError;
use crate::control::{Asker, Reply, failed};
use crate::retention::{self, Action, Generation, Policy};
use outlive_epoch::{EpochId, StoreError};
use outlive_epoch_store::Store;
use serde::{Deserialize, Serialize};

/// Bytes that are copied at a time.
pub const PIECE: u64 = 1 << 20;
/// Bytes that are copied a second, at most.
pub const RATE: u64 = 128 << 20;
/// A piece is copied where the next epoch is due so much later, nanoseconds.
pub const ROOM: u64 = 5_000_000;
/// How often it is looked for epochs that are not wanted any more, nanoseconds.
pub const LOOK: u64 = 60_000_000_000;
/// From a failure to the next attempt, nanoseconds.
pub const PAUSE: u64 = 60_000_000_000;

/// What became of epochs that were not wanted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pruned {
    /// Epochs that are gone.
    pub removed: u64,
    /// Epochs that are there.
    pub left: u64,
    /// Bytes of all files before.
    pub bytes_before: u64,
    /// The same after.
    pub bytes: u64,
}

/// What a piece of work came to.
#[derive(Debug, Default)]
pub struct Done {
    /// Bytes that were written.
    pub written: u64,
    /// What is to be said.
    pub warning: Option<String>,
    /// Something that is stored is lost.
    pub lost: bool,
    /// Another file is the newest generation.
    pub switched: bool,
}

/// What was asked for, and who waits for it.
struct Asked {
    policy: Policy,
    asker: Asker,
    before: Pruned,
}

/// The work on one store.
#[derive(Default)]
pub struct Upkeep {
    policy: Policy,
    asked: Option<Asked>,
    /// The log is long, and how long it was when that was found.
    long: bool,
    since: Option<u64>,
    /// Something is being copied; by how many bytes of log that began.
    copying: Option<u64>,
    /// The next piece, and the next look at what is wanted, nanoseconds.
    due: u64,
    look: u64,
}

impl Upkeep {
    /// For a store that has this policy.
    #[must_use]
    pub fn new(policy: Policy) -> Self {
        Self {
            policy,
            ..Self::default()
        }
    }

    /// The policy.
    #[must_use]
    pub fn policy(&self) -> Policy {
        self.policy
    }

    /// The log has grown long. Says whether there is hope: not where it has grown four times as long
    /// since it was found to be.
    pub fn shorten(&mut self, log_bytes: u64) -> bool {
        self.long = true;
        let since = self.since.map_or(log_bytes, |since| since.min(log_bytes));
        self.since = Some(since);
        log_bytes <= since.saturating_mul(4)
    }

    /// Somebody asks for order, and waits until there is.
    pub fn ask(&mut self, policy: Policy, asker: Asker, store: &Store) {
        if self.asked.is_some() {
            let error = "somebody else has asked for the same just now: try again".to_owned();
            asker.answer(&failed(error, 1));
            return;
        }
        let before = count(store);
        self.asked = Some(Asked {
            policy,
            asker,
            before,
        });
        self.due = 0;
    }

    /// Whether there is nothing to do but to look from time to time.
    fn is_idle(&self) -> bool {
        self.copying.is_none() && self.asked.is_none() && !self.long
    }

    /// Nanoseconds until a piece is to be done, if the next epoch is due in `wait`; `None` where it
    /// comes first.
    #[must_use]
    pub fn wait(&self, now: u64, wait: u64) -> Option<u64> {
        let due = if self.is_idle() { self.look } else { self.due };
        let until = due.saturating_sub(now);
        (until.saturating_add(ROOM) <= wait).then_some(until)
    }

    /// How much is to be copied before an epoch comes, because the log grows faster than the work is
    /// done; `last` is what the last epoch wrote.
    #[must_use]
    pub fn late(&self, log_bytes: u64, last: u64) -> Option<u64> {
        let began = self.since.or(self.copying)?;
        let late = log_bytes > began.saturating_add(began / 2);
        late.then_some(last.saturating_mul(2).max(PIECE))
    }

    /// There is nothing to do for a while.
    pub fn rest(&mut self, now: u64) {
        self.look = now.saturating_add(LOOK);
        self.due = self.look;
    }

    /// Frees what is not wanted at once: the medium is full.
    pub fn give_up_space(&mut self, store: &mut Store) {
        store.abandon_beside();
        self.copying = None;
        self.due = self.due.max(self.look);
        while let Some(Action::Remove(number)) = retention::next(self.policy, &files(store)) {
            if store.remove_generation(number).is_err() {
                break;
            }
        }
    }

    /// Does a piece of about `limit` bytes.
    pub fn piece(&mut self, now: u64, limit: u64, store: &mut Store) -> Done {
        let mut done = Done::default();
        if let Err(error) = self.step(now, limit, store, &mut done) {
            self.copying = None;
            self.long = false;
            self.due = now.saturating_add(PAUSE);
            self.look = self.due;
            done.lost = matches!(error, StoreError::Damaged { .. });
            done.warning = Some(format!("the store could not be made shorter: {error}"));
            if let Some(asked) = self.asked.take() {
                let error = KeeperError::from(error);
                asked
                    .asker
                    .answer(&failed(error.to_string(), error.exit_code()));
            }
        }
        done
    }

    fn step(
        &mut self,
        now: u64,
        limit: u64,
        store: &mut Store,
        done: &mut Done,
    ) -> Result<(), StoreError> {
        if self.copying.is_some() && store.is_working() {
            let worked = store.work(limit)?;
            done.written = worked.written;
            if worked.ready {
                store.switch()?;
                done.switched = true;
                self.copying = None;
                // If it is long all the same, the next epoch says so.
                (self.long, self.since) = (false, None);
            }
            let pause = worked.written.saturating_mul(1_000_000_000) / RATE;
            self.due = now.saturating_add(if self.asked.is_some() { 0 } else { pause });
            self.look = now;
            return Ok(());
        }
        self.copying = None;
        if std::mem::take(&mut self.long) {
            store.begin_flattening()?;
            self.copying = Some(store.log_bytes());
            return Ok(());
        }
        let policy = self
            .asked
            .as_ref()
            .map_or(self.policy, |asked| asked.policy);
        match retention::next(policy, &files(store)) {
            Some(Action::Remove(number)) => {
                store.remove_generation(number)?;
            }
            Some(Action::Thin(number, wanted)) => {
                let wanted: Vec<EpochId> = wanted.into_iter().map(EpochId).collect();
                store.begin_thinning(number, &wanted)?;
                self.copying = Some(store.log_bytes());
                if let Some(asked) = &mut self.asked
                    && store
                        .generations()
                        .iter()
                        .any(|g| g.newest && g.number == number)
                {
                    // Epochs that are added meanwhile are not made a reason to begin again.
                    asked.policy.thorough = false;
                }
            }
            None => {
                self.look = now.saturating_add(LOOK);
                if let Some(asked) = self.asked.take() {
                    let report = count(store).since(&asked.before);
                    asked.asker.answer(&Reply::Pruned(report));
                }
            }
        }
        Ok(())
    }
}

/// The files of a store, as the rules see them.
#[must_use]
pub fn files(store: &Store) -> Vec<Generation> {
    let all = store.generations().into_iter();
    all.map(|file| Generation {
        number: file.number,
        bytes: file.bytes,
        newest: file.newest,
        epochs: file
            .epochs
            .iter()
            .map(|epoch| (epoch.id.0, epoch.facts.taken_at_ns))
            .collect(),
    })
    .collect()
}

fn count(store: &Store) -> Pruned {
    let bytes = store.generations().iter().map(|file| file.bytes).sum();
    Pruned {
        removed: 0,
        left: store.epochs().len() as u64,
        bytes_before: bytes,
        bytes,
    }
}

impl Pruned {
    fn since(self, before: &Self) -> Self {
        Self {
            removed: before.left.saturating_sub(self.left),
            bytes_before: before.bytes,
            ..self
        }
    }
}

/// Does all that is to be done to a store that nobody else writes.
///
/// # Errors
/// What the store says; what was done before stays done.
pub fn prune(store: &mut Store, policy: Policy) -> Result<Pruned, StoreError> {
    let before = count(store);
    while let Some(action) = retention::next(policy, &files(store)) {
        match action {
            Action::Remove(number) => {
                store.remove_generation(number)?;
            }
            Action::Thin(number, wanted) => {
                let wanted: Vec<EpochId> = wanted.into_iter().map(EpochId).collect();
                store.begin_thinning(number, &wanted)?;
                store.switch()?;
            }
        }
    }
    Ok(count(store).since(&before))
}

#[cfg(test)]
#[path = "upkeep_tests.rs"]
mod tests;
