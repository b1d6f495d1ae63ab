//! Subjects that come from elsewhere.
//!
//! # Rules
//! - What arrives is put together in `ROOT/.arriving-NAME`, which no command takes for a subject. It
//!   becomes `ROOT/NAME` in one step, after all of it is durable.
//! - One arrival of a name at a time: its directory is locked. What an arrival left behind that was
//!   killed is removed by the next one of that name, but for the spool: pieces that came already, which
//!   are checked again before they are used.
//! - A subject that is there is never replaced.
//! - What an arrival left behind can be seen ([`unsettled`]) and given up ([`abandon`]).

use crate::subject::{ARRIVING, Card, Lock, Root, Subject};
use crate::{KeeperError, subject};
use rustix::fs::{FlockOperation, RenameFlags};
use rustix::io::Errno;
use std::fs::{self, File};
use std::path::{Path, PathBuf};

/// A subject on its way into the store; what was brought so far is removed when this is dropped.
#[derive(Debug)]
pub struct Arrival {
    root: PathBuf,
    target: Subject,
    here: Subject,
    lock: Option<Lock>,
}

impl Arrival {
    /// Begins.
    ///
    /// # Errors
    /// Refused, where there is such a subject already, or another arrival of this name; usage for a
    /// bad name.
    pub fn begin(root: &Root, name: &str) -> Result<Self, KeeperError> {
        let target = root.subject(name)?;
        if fs::symlink_metadata(target.dir()).is_ok() {
            return Err(taken(&target));
        }
        let here = subject::arriving(&target, root.path());
        here.make()?;
        let lock = lock(&here)?;
        let arrival = Self {
            root: root.path().to_path_buf(),
            target,
            here,
            lock: Some(lock),
        };
        arrival.clear()?;
        Ok(arrival)
    }

    /// The directory for its epochs, which does not exist yet.
    #[must_use]
    pub fn epochs_dir(&self) -> PathBuf {
        self.here.epochs_dir()
    }

    /// The directory for what came, and is not needed any more once it has settled.
    #[must_use]
    pub fn spool_dir(&self) -> PathBuf {
        self.here.dir().join("spool")
    }

    /// Where it is put together.
    #[must_use]
    pub fn dir(&self) -> &Path {
        self.here.dir()
    }

    /// Gives up for now: what is in the spool stays for the next arrival of this name.
    pub fn postpone(mut self) {
        let _ = self.clear();
        self.lock = None;
    }

    /// Removes what an earlier arrival left behind.
    fn clear(&self) -> Result<(), KeeperError> {
        match fs::remove_dir_all(self.epochs_dir()) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                let place = self.epochs_dir();
                Err(KeeperError::io(format!("remove {}", place.display()))(
                    error,
                ))
            }
            _ => Ok(()),
        }
    }

    /// Makes it a subject. Its store must be closed.
    ///
    /// # Errors
    /// What the operating system says; refused, where a subject of that name came to be meanwhile.
    pub fn settle(mut self, card: &Card) -> Result<(), KeeperError> {
        let Some(lock) = &self.lock else {
            return Ok(());
        };
        let spool = self.spool_dir();
        match fs::remove_dir_all(&spool) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(KeeperError::io(format!("remove {}", spool.display()))(
                    error,
                ));
            }
            _ => {}
        }
        self.here.write_card(lock, card)?;
        let (from, to) = (self.here.dir(), self.target.dir());
        let here = rustix::fs::CWD;
        match rustix::fs::renameat_with(here, from, here, to, RenameFlags::NOREPLACE) {
            Err(Errno::EXIST | Errno::NOTEMPTY) => return Err(taken(&self.target)),
            other => other.map_err(KeeperError::io(format!("rename to {}", to.display())))?,
        }
        self.lock = None;
        sync(&self.root)
    }
}

impl Drop for Arrival {
    fn drop(&mut self) {
        if self.lock.is_some() {
            let _ = fs::remove_dir_all(self.here.dir());
        }
    }
}

/// An arrival that has not become a subject.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unsettled {
    /// The name that the subject will have.
    pub name: String,
    /// A command is at it; else it was interrupted.
    pub at_it: bool,
    /// What came so far, bytes.
    pub bytes: u64,
}

/// All arrivals that have not become subjects, sorted by name; none where there is no store.
///
/// # Errors
/// What the operating system says of the store.
pub fn unsettled(root: &Root) -> Result<Vec<Unsettled>, KeeperError> {
    let entries = match fs::read_dir(root.path()) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        other => other.map_err(KeeperError::io(format!("read {}", root.path().display())))?,
    };
    let mut all = Vec::new();
    for entry in entries.flatten() {
        let name = entry.file_name().into_string().unwrap_or_default();
        let name = name.strip_prefix(ARRIVING).map(str::to_owned);
        all.extend(name.filter(|name| root.subject(name).is_ok()).map(|name| {
            let dir = entry.path();
            Unsettled {
                name,
                at_it: is_locked(&dir),
                bytes: ["spool", "epochs"]
                    .map(|sub| bytes_in(&dir.join(sub)))
                    .iter()
                    .sum(),
            }
        }));
    }
    all.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(all)
}

/// Removes what an interrupted arrival of this name left; says whether there was any.
///
/// # Errors
/// Refused, while a command is at it; usage for a bad name; what the operating system says.
pub fn abandon(root: &Root, name: &str) -> Result<bool, KeeperError> {
    let here = subject::arriving(&root.subject(name)?, root.path());
    if fs::symlink_metadata(here.dir()).is_err() {
        return Ok(false);
    }
    here.remove(&lock(&here)?)?;
    Ok(true)
}

fn lock(here: &Subject) -> Result<Lock, KeeperError> {
    here.lock().map_err(|error| match error {
        KeeperError::Refused(_) => KeeperError::Refused(format!(
            "{} is just arriving by another command: wait for it, or use --name",
            here.name()
        )),
        other => other,
    })
}

/// Whether a command holds the lock, which is not waited for.
fn is_locked(dir: &Path) -> bool {
    let lock = File::open(dir.join("keeper.lock"));
    lock.is_ok_and(|lock| {
        let tried = rustix::fs::flock(&lock, FlockOperation::NonBlockingLockShared);
        tried == Err(Errno::WOULDBLOCK)
    })
}

fn bytes_in(dir: &Path) -> u64 {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    entries
        .filter_map(|entry| Some(entry.metadata().ok()?.len()))
        .sum()
}

fn sync(dir: &Path) -> Result<(), KeeperError> {
    let synced = File::open(dir).and_then(|dir| dir.sync_all());
    synced.map_err(KeeperError::io(format!("sync {}", dir.display())))
}

fn taken(subject: &Subject) -> KeeperError {
    let name = subject.name();
    KeeperError::Refused(format!(
        "there is a subject named {name} already, in {}: --name gives the new one another name, \
         `outlive forget {name}` removes the old one",
        subject.dir().display()
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn root() -> (tempfile::TempDir, Root) {
        let dir = tempfile::tempdir().unwrap();
        let root = Root::find(Some(&dir.path().join("store"))).unwrap();
        (dir, root)
    }

    #[test]
    fn what_arrives_is_a_subject_only_when_it_settles() {
        let (_dir, root) = root();
        let arrival = Arrival::begin(&root, "a").unwrap();
        fs::create_dir(arrival.epochs_dir()).unwrap();
        assert!(root.names().unwrap().is_empty());
        let second = Arrival::begin(&root, "a").unwrap_err();
        assert_eq!(second.exit_code(), 3);
        assert!(second.to_string().contains("just arriving"), "{second}");
        arrival.settle(&Card::elsewhere("imported")).unwrap();
        assert_eq!(root.names().unwrap(), ["a"]);
        assert!(root.subject("a").unwrap().epochs_dir().is_dir());
        let third = Arrival::begin(&root, "a").unwrap_err();
        assert_eq!(third.exit_code(), 3);
        assert!(third.to_string().contains("--name"), "{third}");
        let names = fs::read_dir(root.path()).unwrap().count();
        assert_eq!(names, 1, "nothing else is left");
    }

    #[test]
    fn what_does_not_settle_leaves_nothing_and_what_was_left_is_not_taken_over() {
        let (_dir, root) = root();
        drop(Arrival::begin(&root, "a").unwrap());
        assert_eq!(fs::read_dir(root.path()).unwrap().count(), 0);
        let killed = Arrival::begin(&root, "a").unwrap();
        fs::create_dir(killed.epochs_dir()).unwrap();
        fs::write(killed.epochs_dir().join("epochs.1"), "old").unwrap();
        let mut killed = std::mem::ManuallyDrop::new(killed);
        // Its locks go with a process, and its directory stays.
        drop(killed.lock.take());
        let next = Arrival::begin(&root, "a").unwrap();
        assert!(!next.epochs_dir().exists());
    }

    #[test]
    fn what_is_postponed_keeps_its_spool_until_it_settles() {
        let (_dir, root) = root();
        let first = Arrival::begin(&root, "a").unwrap();
        fs::create_dir(first.epochs_dir()).unwrap();
        fs::create_dir(first.spool_dir()).unwrap();
        fs::write(first.spool_dir().join("piece"), "p").unwrap();
        first.postpone();
        let second = Arrival::begin(&root, "a").unwrap();
        assert!(!second.epochs_dir().exists());
        assert!(second.spool_dir().join("piece").exists());
        second.settle(&Card::elsewhere("pulled")).unwrap();
        let subject = root.subject("a").unwrap();
        assert!(!subject.dir().join("spool").exists());
    }

    #[test]
    fn what_an_arrival_left_is_seen_and_can_be_given_up() {
        let (_dir, root) = root();
        assert_eq!(unsettled(&root).unwrap(), []);
        let arrival = Arrival::begin(&root, "a").unwrap();
        fs::create_dir(arrival.spool_dir()).unwrap();
        fs::write(arrival.spool_dir().join("piece"), "four").unwrap();
        let seen = |at_it| Unsettled {
            name: "a".into(),
            at_it,
            bytes: 4,
        };
        assert_eq!(unsettled(&root).unwrap(), [seen(true)]);
        let busy = abandon(&root, "a").unwrap_err();
        assert!(busy.to_string().contains("just arriving"), "{busy}");
        arrival.postpone();
        assert_eq!(unsettled(&root).unwrap(), [seen(false)]);
        assert!(abandon(&root, "a").unwrap());
        assert!(!abandon(&root, "a").unwrap());
        assert_eq!(fs::read_dir(root.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_subject_that_came_to_be_meanwhile_stays() {
        let (_dir, root) = root();
        let arrival = Arrival::begin(&root, "a").unwrap();
        let own = root.subject("a").unwrap();
        own.make().unwrap();
        let error = arrival.settle(&Card::elsewhere("imported")).unwrap_err();
        assert_eq!(error.exit_code(), 3);
        assert_eq!(fs::read_dir(own.dir()).unwrap().count(), 0);
        assert_eq!(fs::read_dir(root.path()).unwrap().count(), 1);
    }
}
