//! Simulated media: a disk in memory that is dishonest in every way that is allowed.
//!
//! What was not flushed is kept apart as a list of pending changes. [`SimDisk::power_cut`] asks
//! for the [`Fate`] of each and gives the disk as it would be found afterwards. Single operations
//! can be made to fail ([`SimDisk::fault`]). Nothing here makes a system call, reads a clock or
//! draws a random number: the same calls give the same disk.

use crate::{Access, BLOCK, Directory, Geometry, Medium, MediumError, SECTOR, check_blocks};
use std::collections::BTreeMap;
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

/// A change that is not durable yet.
#[derive(Clone, Debug)]
pub enum Pending {
    /// Bytes written to the medium with this number.
    Write(u64, u64, Vec<u8>),
    /// A new length.
    Resize(u64, u64),
    /// A name that shall stand for this medium, or for none.
    Name(String, Option<u64>),
    /// A medium that changes its name.
    Rename(String, String),
}

/// What becomes of a pending change when the power is cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// It is there.
    Keep,
    /// It is not there.
    Drop,
    /// Only the sectors whose bit is set are there (sector 64 as sector 0, and so on). For
    /// anything but a write: kept if bit 0 is set.
    Torn(u64),
    /// The range holds bytes made from this seed. For anything but a write: dropped.
    Trash(u64),
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
    fault: Option<Fault>,
    capacity: Option<u64>,
    defer: bool,
    /// Errors of writes that the next flush reports, by medium.
    deferred: BTreeMap<u64, MediumError>,
}

#[derive(Clone, Debug, Default)]
struct State {
    media: BTreeMap<u64, Vec<u8>>,
    names: BTreeMap<String, u64>,
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
            fault: inner.fault,
            capacity: inner.capacity,
            defer: inner.defer,
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
        self.inner().fault = fault;
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

    /// The bytes that a name stands for, as they are read now; for looking at and damaging.
    #[must_use]
    pub fn contents(&self, name: &str) -> Option<Vec<u8>> {
        let inner = self.inner();
        inner.now.media.get(inner.now.names.get(name)?).cloned()
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
        durable.media.insert(id, bytes.clone());
        now.media.insert(id, bytes);
    }
}

impl Inner {
    /// Counts an operation; the answer says whether it takes effect, or fails, or both.
    fn step(&mut self, place: &str, op: Op) -> (bool, Result<(), MediumError>) {
        let n = self.trace.len() as u64;
        self.trace.push(op);
        match self.fault {
            Some(f) if n == f.at || (f.lasting && n > f.at) => {
                let what = match op {
                    Op::Read => "simulated read",
                    Op::Write => "simulated write",
                    Op::Resize => "simulated resize",
                    Op::Flush => "simulated flush",
                    Op::Name => "simulated change of a name",
                    Op::Sync => "simulated sync",
                };
                let applied = f.applied && n == f.at;
                (applied, Err(MediumError::io(place, what, 0, 0, f.error)))
            }
            _ => (true, Ok(())),
        }
    }

    fn change(&mut self, place: &str, op: Op, pending: Pending) -> Result<(), MediumError> {
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

impl State {
    fn suffer(&mut self, pending: &Pending, fate: Fate) {
        let kept = match fate {
            Fate::Keep => true,
            Fate::Drop | Fate::Trash(_) => false,
            Fate::Torn(mask) => mask & 1 == 1,
        };
        match pending {
            Pending::Write(id, offset, bytes) => self.write(*id, *offset, bytes, fate),
            Pending::Resize(id, len) if kept => {
                self.media.entry(*id).or_default().resize(*len as usize, 0);
            }
            Pending::Name(name, Some(id)) if kept => {
                self.media.entry(*id).or_default();
                self.names.insert(name.clone(), *id);
            }
            Pending::Name(name, None) if kept => {
                self.names.remove(name);
            }
            Pending::Rename(from, to) if kept => {
                if let Some(id) = self.names.remove(from) {
                    self.names.insert(to.clone(), id);
                }
            }
            _ => {}
        }
    }

    fn write(&mut self, id: u64, offset: u64, bytes: &[u8], fate: Fate) {
        let offset = offset as usize;
        let medium = self.media.entry(id).or_default();
        let mut put = |at: usize, sector: &[u8]| {
            let end = at + sector.len();
            if medium.len() < end {
                medium.resize(end, 0);
            }
            medium[at..end].copy_from_slice(sector);
        };
        let sectors = bytes
            .chunks(SECTOR)
            .enumerate()
            .map(|(i, s)| (i, offset + i * SECTOR, s));
        match fate {
            Fate::Keep => put(offset, bytes),
            Fate::Drop => {}
            Fate::Torn(mask) => {
                sectors
                    .filter(|(i, ..)| mask >> (i % 64) & 1 == 1)
                    .for_each(|(_, at, s)| put(at, s));
            }
            Fate::Trash(mut seed) => {
                let mut trash = bytes.to_vec();
                for byte in &mut trash {
                    // A linear congruential generator (Knuth's MMIX constants).
                    seed = seed
                        .wrapping_mul(6364136223846793005)
                        .wrapping_add(1442695040888963407);
                    *byte = (seed >> 56) as u8;
                }
                put(offset, &trash);
            }
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
        inner.step("sim", Op::Sync).1?;
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
        let medium = inner.now.media.get(&self.id).map_or(&[][..], Vec::as_slice);
        match medium.get(offset as usize..end as usize) {
            Some(bytes) => {
                into.copy_from_slice(bytes);
                Ok(())
            }
            None => Err(MediumError::Short {
                place: self.name.clone(),
                end,
            }),
        }
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
        inner.step(&self.name, Op::Flush).1?;
        if let Some(e) = inner.deferred.remove(&self.id) {
            return Err(e);
        }
        let mine = |p: &Pending| matches!(p, Pending::Write(id, ..) | Pending::Resize(id, _) if *id == self.id);
        let (done, rest) = std::mem::take(&mut inner.pending)
            .into_iter()
            .partition(mine);
        inner.pending = rest;
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
}
