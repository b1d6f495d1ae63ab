//! Simulated media: a disk in memory that is dishonest in every way that is allowed.
//!
//! What was not flushed is kept apart as a list of pending changes. [`SimDisk::power_cut`] asks
//! for the [`Fate`] of each and gives the disk as it would be found afterwards. Single operations
//! can be made to fail ([`SimDisk::fault`]), or to say that they were done when they were not
//! ([`SimDisk::lie`]), which no medium may do, but some do. Nothing here makes a system call, reads a clock or
//! draws a random number: the same calls give the same disk.

mod bytes;
mod state;

pub use state::{Fate, Pending};

use crate::{Access, BLOCK, Directory, Geometry, Medium, MediumError, check_blocks};
use bytes::Bytes;
use state::State;
use std::collections::BTreeMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// What an operation was, for choosing where to cut or to fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    /// A listing, an opening, or reading of bytes or sizes.
    Read,
    /// Writing of bytes.
    Write,
    /// Change of a length.
    Resize,
    /// Flush of one medium.
    Flush,
    /// A name made, changed or removed.
    Name,
    /// Flush of the names.
    Sync,
}

/// An operation that is made to fail.
#[derive(Clone, Copy, Debug)]
pub struct Fault {
    /// Which operation, counted from 0 over the life of the disk.
    pub at: u64,
    /// Whether all operations after it fail as well, as they do without power.
    pub lasting: bool,
    /// The error that it gives.
    pub error: io::ErrorKind,
    /// Whether it takes effect in spite of the error (a flush never does).
    pub applied: bool,
}

/// What an operation does instead of what it says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lie {
    /// A write leaves what was there; a flush or a sync makes nothing durable; a change of a
    /// name or length does not happen.
    Lost,
    /// A write goes to this offset of its medium. For anything else as [`Lie::Lost`].
    Misdirected(u64),
}

/// The fates of all pending changes, by position.
pub type Cut<'a> = &'a mut dyn FnMut(usize, &Pending) -> Fate;

/// A disk in memory. Clones are handles of the same disk; see [`SimDisk::fork`].
#[derive(Clone, Debug, Default)]
pub struct SimDisk(Arc<Mutex<Inner>>);

#[derive(Debug, Default)]
struct Inner {
    now: State,
    durable: State,
    pending: Vec<Pending>,
    next: u64,
    trace: Vec<Op>,
    faults: Vec<Fault>,
    lie: Option<(u64, Lie)>,
    capacity: Option<u64>,
    defer: bool,
    forgetful: bool,
    /// Errors of writes that the next flush reports, by medium.
    deferred: BTreeMap<u64, MediumError>,
}

/// The error kind by which [`SimDisk`] says that the power is off.
#[must_use]
pub fn power_off() -> io::ErrorKind {
    io::ErrorKind::BrokenPipe
}

impl SimDisk {
    /// An empty disk.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// An independent copy, with the same pending changes (but without deferred errors).
    #[must_use]
    pub fn fork(&self) -> Self {
        let inner = self.inner();
        let copy = Inner {
            now: inner.now.clone(),
            durable: inner.durable.clone(),
            pending: inner.pending.clone(),
            next: inner.next,
            trace: inner.trace.clone(),
            faults: inner.faults.clone(),
            lie: inner.lie,
            capacity: inner.capacity,
            defer: inner.defer,
            forgetful: inner.forgetful,
            deferred: BTreeMap::new(),
        };
        Self(Arc::new(Mutex::new(copy)))
    }

    /// The directory of this disk.
    #[must_use]
    pub fn directory(&self) -> SimDirectory {
        SimDirectory(self.clone())
    }

    /// The operations so far.
    #[must_use]
    pub fn trace(&self) -> Vec<Op> {
        self.inner().trace.clone()
    }

    /// Plans a failure, in place of any planned before.
    pub fn fault(&self, fault: Option<Fault>) {
        self.inner().faults = fault.into_iter().collect();
    }

    /// Plans a failure beside those planned before.
    pub fn fault_too(&self, fault: Fault) {
        self.inner().faults.push(fault);
    }

    /// Makes one operation, counted as for a [`Fault`], do something else than it says.
    pub fn lie(&self, at: u64, lie: Lie) {
        self.inner().lie = Some((at, lie));
    }

    /// Whether a flush that fails makes the disk forget the writes that it was to make durable:
    /// they can be read still, and a later flush succeeds without them. That is what Linux does
    /// with pages that it could not write.
    pub fn forget_on_failed_flush(&self, forgetful: bool) {
        self.inner().forgetful = forgetful;
    }

    /// What space holds before it is written, by offset, instead of zeros.
    pub fn set_dirt(&self, dirt: &[u8]) {
        let mut inner = self.inner();
        inner.now.dirt = dirt.into();
        inner.durable.dirt = dirt.into();
    }

    /// Limits the sum of all sizes, in bytes.
    pub fn set_capacity(&self, bytes: Option<u64>) {
        self.inner().capacity = bytes;
    }

    /// Whether the error of a write is reported only by the next flush, as media may do that
    /// write in the background.
    pub fn defer_errors(&self, defer: bool) {
        self.inner().defer = defer;
    }

    /// The changes that are not durable.
    #[must_use]
    pub fn pending(&self) -> Vec<Pending> {
        self.inner().pending.clone()
    }

    /// The disk as it is found after a power cut now.
    #[must_use]
    pub fn power_cut(&self, fates: Cut<'_>) -> Self {
        let inner = self.inner();
        let mut after = inner.durable.clone();
        for (i, pending) in inner.pending.iter().enumerate() {
            after.suffer(pending, fates(i, pending));
        }
        let next = inner.next;
        let inner = Inner {
            now: after.clone(),
            durable: after,
            next,
            ..Inner::default()
        };
        Self(Arc::new(Mutex::new(inner)))
    }

    /// Numbers that are the same for disks on which the same can be read: of the names, and of what
    /// they stand for.
    #[must_use]
    pub fn fingerprint(&self) -> [u64; 2] {
        let inner = self.inner();
        [0u8, 1].map(|salt| {
            let mut hasher = DefaultHasher::new();
            salt.hash(&mut hasher);
            for (name, id) in &inner.now.names {
                (name, inner.now.media.get(id)).hash(&mut hasher);
            }
            hasher.finish()
        })
    }

    /// The bytes that a name stands for, as they are read now; for looking at and damaging.
    #[must_use]
    pub fn contents(&self, name: &str) -> Option<Vec<u8>> {
        let inner = self.inner();
        let medium = inner.now.media.get(inner.now.names.get(name)?)?;
        Some(medium.to_vec())
    }

    /// Replaces the bytes that a name stands for, durably: damage done from outside.
    pub fn set_contents(&self, name: &str, bytes: Vec<u8>) {
        let mut inner = self.inner();
        let Inner {
            now, durable, next, ..
        } = &mut *inner;
        let id = *now.names.entry(name.to_owned()).or_insert_with(|| {
            *next += 1;
            *next
        });
        durable.names.insert(name.to_owned(), id);
        let bytes = Bytes::from(&bytes[..]);
        durable.media.insert(id, bytes.clone());
        now.media.insert(id, bytes);
    }
}

impl Inner {
    /// Counts an operation; the answer says whether it takes effect, or fails, or both.
    fn step(&mut self, place: &str, op: Op) -> (bool, Result<(), MediumError>) {
        let n = self.trace.len() as u64;
        self.trace.push(op);
        let hits = |f: &&Fault| n == f.at || (f.lasting && n > f.at);
        if let Some(f) = self.faults.iter().find(hits) {
            let what = match op {
                Op::Read => "simulated read",
                Op::Write => "simulated write",
                Op::Resize => "simulated resize",
                Op::Flush => "simulated flush",
                Op::Name => "simulated change of a name",
                Op::Sync => "simulated sync",
            };
            let applied = f.applied && n == f.at;
            return (applied, Err(MediumError::io(place, what, 0, 0, f.error)));
        }
        let lost = self
            .lie
            .is_some_and(|(at, _)| at == n && !matches!(op, Op::Read | Op::Write));
        (!lost, Ok(()))
    }

    /// The write that takes place where one was asked for.
    fn in_truth(&self, pending: Pending) -> Pending {
        let n = self.trace.len() as u64;
        match (self.lie, pending) {
            (Some((at, lie)), Pending::Write(id, offset, bytes)) if at == n => match lie {
                Lie::Lost => Pending::Write(id, offset, self.now.before(id, offset, bytes.len())),
                Lie::Misdirected(to) => Pending::Write(id, to, bytes),
            },
            (_, pending) => pending,
        }
    }

    fn change(&mut self, place: &str, op: Op, pending: Pending) -> Result<(), MediumError> {
        let pending = self.in_truth(pending);
        let (apply, result) = self.step(place, op);
        if apply {
            self.now.suffer(&pending, Fate::Keep);
            self.pending.push(pending);
        }
        result
    }

    fn used(&self) -> u64 {
        self.now
            .names
            .values()
            .filter_map(|id| self.now.media.get(id))
            .map(|m| m.len() as u64)
            .sum()
    }

    /// Refuses growth beyond the capacity.
    fn room(&self, place: &str, id: u64, end: u64) -> Result<(), MediumError> {
        let len = self.now.media.get(&id).map_or(0, |m| m.len() as u64);
        let needed = end.saturating_sub(len);
        match self.capacity {
            Some(capacity) if needed > 0 && self.used().saturating_add(needed) > capacity => {
                Err(MediumError::Full {
                    place: place.to_owned(),
                    needed,
                })
            }
            _ => Ok(()),
        }
    }
}

/// The names of a [`SimDisk`].
#[derive(Clone, Debug)]
pub struct SimDirectory(SimDisk);

/// One medium of a [`SimDisk`].
#[derive(Clone, Debug)]
pub struct SimMedium {
    disk: SimDisk,
    id: u64,
    name: String,
    access: Access,
}

impl Directory for SimDirectory {
    fn place(&self) -> String {
        "sim".to_owned()
    }

    fn list(&self) -> Result<Vec<String>, MediumError> {
        let mut inner = self.0.inner();
        inner.step("sim", Op::Read).1?;
        Ok(inner.now.names.keys().cloned().collect())
    }

    fn create(&self, name: &str) -> Result<Arc<dyn Medium>, MediumError> {
        let mut inner = self.0.inner();
        if inner.now.names.contains_key(name) {
            return Err(MediumError::io(
                name,
                "create",
                0,
                0,
                io::ErrorKind::AlreadyExists,
            ));
        }
        inner.next += 1;
        let id = inner.next;
        inner.change(name, Op::Name, Pending::Name(name.to_owned(), Some(id)))?;
        let (disk, name, access) = (self.0.clone(), name.to_owned(), Access::Write);
        Ok(Arc::new(SimMedium {
            disk,
            id,
            name,
            access,
        }))
    }

    fn open(&self, name: &str, access: Access) -> Result<Arc<dyn Medium>, MediumError> {
        let mut inner = self.0.inner();
        inner.step(name, Op::Read).1?;
        let id = inner.now.names.get(name).copied();
        let missing = || MediumError::io(name, "open", 0, 0, io::ErrorKind::NotFound);
        let id = id.ok_or_else(missing)?;
        Ok(Arc::new(SimMedium {
            disk: self.0.clone(),
            id,
            name: name.to_owned(),
            access,
        }))
    }

    fn rename(&self, from: &str, to: &str) -> Result<(), MediumError> {
        let mut inner = self.0.inner();
        if !inner.now.names.contains_key(from) {
            return Err(MediumError::io(
                from,
                "rename",
                0,
                0,
                io::ErrorKind::NotFound,
            ));
        }
        inner.change(
            to,
            Op::Name,
            Pending::Rename(from.to_owned(), to.to_owned()),
        )
    }

    fn remove(&self, name: &str) -> Result<(), MediumError> {
        let mut inner = self.0.inner();
        if !inner.now.names.contains_key(name) {
            return Err(MediumError::io(
                name,
                "remove",
                0,
                0,
                io::ErrorKind::NotFound,
            ));
        }
        inner.change(name, Op::Name, Pending::Name(name.to_owned(), None))
    }

    fn sync(&self) -> Result<(), MediumError> {
        let mut inner = self.0.inner();
        let (apply, result) = inner.step("sim", Op::Sync);
        result?;
        if !apply {
            return Ok(());
        }
        let is_name = |p: &Pending| matches!(p, Pending::Name(..) | Pending::Rename(..));
        let (names, rest) = std::mem::take(&mut inner.pending)
            .into_iter()
            .partition(is_name);
        inner.pending = rest;
        names
            .iter()
            .for_each(|name| inner.durable.suffer(name, Fate::Keep));
        Ok(())
    }
}

impl SimMedium {
    fn change(&self, op: Op, end: u64, pending: Pending) -> Result<(), MediumError> {
        if self.access == Access::Read {
            let what = "the medium was opened for reading only";
            return Err(MediumError::Misuse {
                place: self.name.clone(),
                what,
            });
        }
        let mut inner = self.disk.inner();
        inner.room(&self.name, self.id, end)?;
        inner.change(&self.name, op, pending)
    }
}

impl Medium for SimMedium {
    fn place(&self) -> String {
        self.name.clone()
    }

    fn geometry(&self) -> Result<Geometry, MediumError> {
        let mut inner = self.disk.inner();
        inner.step(&self.name, Op::Read).1?;
        let len = inner.now.media.get(&self.id).map_or(0, |m| m.len() as u64);
        Ok(Geometry {
            len,
            block: BLOCK as u32,
        })
    }

    fn read(&self, offset: u64, into: &mut [u8]) -> Result<(), MediumError> {
        let mut inner = self.disk.inner();
        inner.step(&self.name, Op::Read).1?;
        let end = offset.saturating_add(into.len() as u64);
        let medium = inner.now.media.get(&self.id);
        if medium.is_some_and(|medium| medium.read(offset as usize, into)) || into.is_empty() {
            return Ok(());
        }
        Err(MediumError::Short {
            place: self.name.clone(),
            end,
        })
    }

    fn write(&self, offset: u64, bytes: &[u8]) -> Result<(), MediumError> {
        check_blocks(&self.name, offset, bytes.len())?;
        let end = offset.saturating_add(bytes.len() as u64);
        let pending = Pending::Write(self.id, offset, bytes.to_vec());
        let result = self.change(Op::Write, end, pending);
        let mut inner = self.disk.inner();
        match result {
            Err(e @ MediumError::Io { .. }) if inner.defer => {
                inner.deferred.entry(self.id).or_insert(e);
                Ok(())
            }
            result => result,
        }
    }

    fn flush(&self) -> Result<(), MediumError> {
        let mut inner = self.disk.inner();
        let (apply, result) = inner.step(&self.name, Op::Flush);
        let result = match inner.deferred.remove(&self.id) {
            Some(e) if result.is_ok() => Err(e),
            _ => result,
        };
        if result.is_ok() && !apply || result.is_err() && !inner.forgetful {
            return result;
        }
        let mine = |p: &Pending| matches!(p, Pending::Write(id, ..) | Pending::Resize(id, _) if *id == self.id);
        let (done, rest): (Vec<_>, Vec<_>) = std::mem::take(&mut inner.pending)
            .into_iter()
            .partition(mine);
        inner.pending = rest;
        result?;
        done.iter()
            .for_each(|change| inner.durable.suffer(change, Fate::Keep));
        Ok(())
    }

    fn reserve(&self, len: u64) -> Result<(), MediumError> {
        let have = self.geometry()?.len;
        if len <= have {
            return Ok(());
        }
        self.change(Op::Resize, len, Pending::Resize(self.id, len))
    }

    fn truncate(&self, len: u64) -> Result<(), MediumError> {
        self.change(Op::Resize, 0, Pending::Resize(self.id, len))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::SECTOR;

    #[test]
    fn only_flushed_bytes_and_synced_names_must_survive() {
        let disk = SimDisk::new();
        let dir = disk.directory();
        let medium = dir.create("a").unwrap();
        medium.write(0, &[1; BLOCK]).unwrap();
        medium.flush().unwrap();
        assert_eq!(disk.power_cut(&mut |_, _| Fate::Drop).contents("a"), None);
        dir.sync().unwrap();
        medium.write(0, &[2; BLOCK]).unwrap();
        medium.write(BLOCK as u64, &[3; BLOCK]).unwrap();
        let after = |fates: [Fate; 2]| disk.power_cut(&mut |i, _| fates[i]).contents("a").unwrap();
        assert_eq!(after([Fate::Drop, Fate::Drop]), [1; BLOCK]);
        let second_only = after([Fate::Drop, Fate::Keep]);
        assert_eq!((second_only[0], second_only[BLOCK]), (1, 3));
        let torn = after([Fate::Torn(0b10), Fate::Drop]);
        assert_eq!((torn[0], torn[SECTOR], torn[2 * SECTOR]), (1, 2, 1));
        assert_eq!(
            after([Fate::Trash(1), Fate::Drop]),
            after([Fate::Trash(1), Fate::Drop])
        );
        assert_ne!(
            after([Fate::Trash(1), Fate::Drop]),
            after([Fate::Trash(2), Fate::Drop])
        );
    }

    #[test]
    fn a_fault_hits_the_operation_it_was_planned_for() {
        let disk = SimDisk::new();
        let medium = disk.directory().create("a").unwrap();
        let error = io::ErrorKind::Other;
        disk.fault(Some(Fault {
            at: 2,
            lasting: false,
            error,
            applied: true,
        }));
        medium.write(0, &[1; BLOCK]).unwrap();
        assert!(medium.write(0, &[2; BLOCK]).is_err());
        assert_eq!(disk.contents("a").unwrap()[0], 2);
        medium.flush().unwrap();
        disk.fault(Some(Fault {
            at: 4,
            lasting: true,
            error,
            applied: false,
        }));
        assert!(medium.write(0, &[3; BLOCK]).is_err());
        assert!(medium.flush().is_err());
        assert_eq!(disk.contents("a").unwrap()[0], 2);
        disk.fault(None);
        disk.set_capacity(Some(2 * BLOCK as u64));
        medium.write(BLOCK as u64, &[4; BLOCK]).unwrap();
        let full = medium.write(2 * BLOCK as u64, &[4; BLOCK]);
        assert!(matches!(full, Err(MediumError::Full { .. })), "{full:?}");
    }

    #[test]
    fn a_lie_is_told_once_and_not_noticed() {
        let block = |disk: &SimDisk, i: usize| disk.contents("a").unwrap()[i * BLOCK];
        let disk = SimDisk::new();
        let dir = disk.directory();
        let medium = dir.create("a").unwrap();
        dir.sync().unwrap();
        medium.write(0, &[1; BLOCK]).unwrap();
        medium.write(BLOCK as u64, &[2; BLOCK]).unwrap();
        disk.lie(4, Lie::Lost);
        medium.write(0, &[3; BLOCK]).unwrap();
        assert_eq!(block(&disk, 0), 1);
        disk.lie(5, Lie::Misdirected(BLOCK as u64));
        medium.write(0, &[4; BLOCK]).unwrap();
        assert_eq!((block(&disk, 0), block(&disk, 1)), (1, 4));
        disk.lie(6, Lie::Lost);
        medium.flush().unwrap();
        let cut = |fate| disk.power_cut(&mut |_, _| fate).contents("a").unwrap();
        assert!(cut(Fate::Drop).is_empty());
        medium.flush().unwrap();
        assert_eq!(disk.pending().len(), 0);
        assert_eq!(cut(Fate::Drop)[BLOCK], 4);
    }

    #[test]
    fn a_failed_flush_may_forget_what_it_was_to_keep() {
        let disk = SimDisk::new();
        let dir = disk.directory();
        let medium = dir.create("a").unwrap();
        dir.sync().unwrap();
        disk.forget_on_failed_flush(true);
        disk.fault(Some(Fault {
            at: 3,
            lasting: false,
            error: io::ErrorKind::Other,
            applied: false,
        }));
        medium.write(0, &[1; BLOCK]).unwrap();
        assert!(medium.flush().is_err());
        medium.flush().unwrap();
        assert_eq!(disk.contents("a").unwrap()[0], 1);
        let after = disk.power_cut(&mut |_, _| Fate::Keep);
        assert!(after.contents("a").unwrap().is_empty());
    }

    #[test]
    fn new_space_is_dirty_and_stale_bytes_come_from_elsewhere() {
        let disk = SimDisk::new();
        disk.set_dirt(&[7; 2 * BLOCK]);
        let dir = disk.directory();
        let (a, b) = (dir.create("a").unwrap(), dir.create("b").unwrap());
        dir.sync().unwrap();
        a.write(BLOCK as u64, &[1; BLOCK]).unwrap();
        a.flush().unwrap();
        let bytes = disk.contents("a").unwrap();
        assert_eq!((bytes[0], bytes[BLOCK]), (7, 1));
        b.write(BLOCK as u64, &[2; BLOCK]).unwrap();
        let after = |fate| disk.power_cut(&mut |_, _| fate).contents("b").unwrap();
        assert_eq!(after(Fate::Stale(0))[BLOCK], 1);
        assert_eq!(after(Fate::Zero)[BLOCK], 0);
    }
}
