//! The store root and a subject's place in it.
//!
//! ```text
//! ROOT/NAME/            0700
//!   subject.json        what runs here: command, interval, process (replaced atomically)
//!   keeper.lock         held (flock) by the one keeper of the subject; holds its pid
//!   control             unix socket of the running keeper
//!   log                 output of a program restored in the background
//!   table.heap          what its keepers counted (see `table`); nothing depends on it
//!   epochs/             the epoch store
//!   elsewhere.json      what was pushed and pulled (see `places`, which has a lock of its own)
//! ```
//!
//! # Rules
//! - A name is 1 to 64 of `A-Z a-z 0-9 . _ -` and does not begin with a dot: it is a file name
//!   and nothing else.
//! - Whoever holds the lock may write in the directory; everybody else only reads.
//! - `subject.json` is read with a bound on its size and every field checked by its type; what
//!   does not parse is an error that names the file.

use crate::budget::keeping::HoldUp;
use crate::keys::KeySource;
use crate::retention::{Keep, Policy};
use crate::{KeeperError, procfs};
use outlive_epoch_store::Codec;
use outlive_process::track::FILES_LIMIT;
use outlive_process::{Granularity, Strategy};
use rustix::fs::{FlockOperation, Mode, OFlags};
use serde::{Deserialize, Serialize};
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{ErrorKind, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Longest name, bytes.
const LONGEST_NAME: usize = 64;
/// Largest `subject.json` that is read, bytes.
const LARGEST_CARD: u64 = 4 << 20;
/// How long the lock of a keeper that is just ending is waited for.
const LOCK_PATIENCE: Duration = Duration::from_millis(500);

/// The directory that holds all subjects.
#[derive(Clone, Debug)]
pub struct Root {
    path: PathBuf,
}

/// What is known of a subject without its epochs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Card {
    /// Format of this file.
    pub version: u32,
    /// The command line, as text.
    pub command: Vec<String>,
    /// Time between epochs, nanoseconds.
    pub every_ns: u64,
    /// How memory is captured.
    #[serde(default)]
    pub capture: Capture,
    /// The hold-up budget.
    #[serde(default)]
    pub hold_up: Option<HoldUp>,
    /// Most bytes that are to be written a day.
    #[serde(default)]
    pub max_wear: Option<u64>,
    /// How long the program may be stopped for an epoch, microseconds.
    #[serde(default)]
    pub max_stop_us: Option<u64>,
    /// The largest file open for writing whose contents are kept, bytes.
    #[serde(default)]
    pub files_limit: Option<u64>,
    /// Which epochs stay.
    #[serde(default)]
    pub keep: Option<Keep>,
    /// Most bytes of all generations, bytes.
    #[serde(default)]
    pub max_size: Option<u64>,
    /// How pages are packed, by its name.
    #[serde(default)]
    pub compress: Option<String>,
    /// Where the key is that its epochs are encrypted with.
    #[serde(default)]
    pub key: Option<KeySource>,
    /// The process.
    pub pid: u32,
    /// Its start time in clock ticks since boot, which tells it from a later process of the same
    /// number.
    pub started: u64,
    /// The boot during which it was started (`/proc/sys/kernel/random/boot_id`).
    pub boot: String,
    /// When the subject was made, nanoseconds since the Unix epoch.
    pub since_ns: u64,
    /// How the program ended, where it ended of itself.
    pub ended: Option<String>,
}

/// How memory is captured, as it is written down.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Capture {
    /// Name of the strategy.
    pub strategy: String,
    /// The unit in which written pages are taken, pages.
    pub granularity: u32,
}

impl Capture {
    /// How to write these down.
    #[must_use]
    pub fn of(strategy: Strategy, granularity: Granularity) -> Self {
        Self {
            strategy: strategy.to_string(),
            granularity: granularity.pages(),
        }
    }

    /// What is written down.
    ///
    /// # Errors
    /// Refused, where this version knows no such strategy or granularity.
    pub fn read(&self) -> Result<(Strategy, Granularity), KeeperError> {
        let known = self.strategy.parse().ok();
        let known = known.and_then(|s| Some((s, Granularity::new(self.granularity)?)));
        known.ok_or_else(|| {
            let Self {
                strategy,
                granularity,
            } = self;
            KeeperError::Refused(format!(
                "its memory was captured by strategy {strategy:?} in units of {granularity} \
                 pages, which this outlive does not know: use a newer one"
            ))
        })
    }
}

impl std::fmt::Display for Capture {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.granularity {
            1 => f.write_str(&self.strategy),
            pages => write!(f, "{}/{pages}", self.strategy),
        }
    }
}

impl Default for Capture {
    fn default() -> Self {
        Self::of(Strategy::default(), Granularity::default())
    }
}

/// Time between epochs where nobody said any, nanoseconds.
const USUAL_INTERVAL_NS: u64 = 100_000_000;
/// Shortest and longest time between epochs that a card from elsewhere may ask for, nanoseconds.
const SHORTEST_INTERVAL_NS: u64 = 1_000_000;
const LONGEST_INTERVAL_NS: u64 = 366 * 86_400 * 1_000_000_000;

/// Version of [`Card`].
pub const CARD_VERSION: u32 = 1;

impl Card {
    /// The largest file open for writing whose contents are kept, bytes.
    #[must_use]
    pub fn files_limit(&self) -> u64 {
        self.files_limit.unwrap_or(FILES_LIMIT)
    }

    /// The card of a program of which nothing is known, and which does not run here; `how` it came
    /// is what is said of its state.
    #[must_use]
    pub fn elsewhere(how: &str) -> Self {
        Self {
            version: CARD_VERSION,
            command: Vec::new(),
            every_ns: USUAL_INTERVAL_NS,
            capture: Capture::default(),
            hold_up: None,
            max_wear: None,
            max_stop_us: None,
            files_limit: None,
            keep: None,
            max_size: None,
            compress: None,
            key: None,
            pid: 0,
            started: 0,
            boot: String::new(),
            since_ns: 0,
            ended: Some(how.to_owned()),
        }
    }

    /// This card, from another machine: without what is true of that machine only. What it says is
    /// somebody else's, so that nothing absurd passes.
    #[must_use]
    pub fn arrived(self, how: &str) -> Self {
        Self {
            every_ns: self
                .every_ns
                .clamp(SHORTEST_INTERVAL_NS, LONGEST_INTERVAL_NS),
            pid: 0,
            started: 0,
            boot: String::new(),
            ended: Some(how.to_owned()),
            // It is on that machine, and may be a command: what came from elsewhere is not run.
            key: None,
            ..self
        }
    }

    /// What is to become of earlier epochs.
    #[must_use]
    pub fn policy(&self) -> Policy {
        Policy {
            keep: self.keep,
            max_size: self.max_size,
            thorough: false,
        }
    }

    /// How pages are packed that are written for it.
    ///
    /// # Errors
    /// Refused, where this version knows no such way.
    pub fn codec(&self) -> Result<Option<Codec>, KeeperError> {
        let Some(name) = &self.compress else {
            return Ok(None);
        };
        name.parse().map(Some).map_err(|_| {
            KeeperError::Refused(format!(
                "its epochs were compressed by {name:?}, which this outlive does not know: use a newer one, or \
                 say `--compress none`"
            ))
        })
    }

    /// How long the program may be stopped for an epoch.
    #[must_use]
    pub fn max_stop(&self) -> Option<std::time::Duration> {
        self.max_stop_us.map(std::time::Duration::from_micros)
    }

    /// Whether the process of this card still runs.
    #[must_use]
    pub fn runs(&self) -> bool {
        procfs::boot_id() == self.boot && procfs::start_time(self.pid) == Some(self.started)
    }
}

impl Root {
    /// The root that was asked for, or else `$OUTLIVE_STORE`, `/var/lib/outlive` for root, and
    /// `$XDG_STATE_HOME/outlive` (`~/.local/state/outlive`) for everybody else.
    ///
    /// # Errors
    /// Usage, where a user without a home gives no store.
    pub fn find(asked: Option<&Path>) -> Result<Self, KeeperError> {
        let variable = |name| {
            std::env::var_os(name)
                .filter(|v| !v.is_empty())
                .map(PathBuf::from)
        };
        let path = if let Some(path) = asked {
            path.to_path_buf()
        } else if let Some(path) = variable("OUTLIVE_STORE") {
            path
        } else if rustix::process::geteuid().is_root() {
            PathBuf::from("/var/lib/outlive")
        } else if let Some(path) = variable("XDG_STATE_HOME") {
            path.join("outlive")
        } else if let Some(home) = variable("HOME") {
            home.join(".local/state/outlive")
        } else {
            return Err(KeeperError::Usage(
                "no place for the store: set OUTLIVE_STORE or give --store DIR".into(),
            ));
        };
        Ok(Self { path })
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The names of all subjects, sorted; none where the root does not exist.
    ///
    /// # Errors
    /// What the operating system says of the directory.
    pub fn names(&self) -> Result<Vec<String>, KeeperError> {
        let entries = match fs::read_dir(&self.path) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
            other => other.map_err(KeeperError::io(format!("read {}", self.path.display())))?,
        };
        let mut names: Vec<String> = entries
            .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
            .filter(|name| check_name(name).is_ok() && self.holds(name))
            .collect();
        names.sort();
        Ok(names)
    }

    /// A name that no subject has yet, made from a program's path.
    #[must_use]
    pub fn free_name(&self, program: &Path) -> String {
        let base = program
            .file_name()
            .map(|n| n.to_string_lossy().into_owned())
            .unwrap_or_default();
        let mut stem: String = base
            .chars()
            .map(|c| if allowed(c) { c } else { '-' })
            .take(LONGEST_NAME - 12)
            .collect();
        if check_name(&stem).is_err() {
            stem = format!("program{stem}");
        }
        let free = |name: &String| !self.dir_of(name).exists();
        let numbered = (2u32..).map(|n| format!("{stem}-{n}"));
        std::iter::once(stem.clone())
            .chain(numbered)
            .find(free)
            .unwrap_or(stem)
    }

    /// The directory of a subject, which need not exist.
    ///
    /// # Errors
    /// Usage, where the name is not allowed.
    pub fn subject(&self, name: &str) -> Result<Subject, KeeperError> {
        check_name(name)?;
        Ok(Subject {
            name: name.to_owned(),
            dir: self.dir_of(name),
        })
    }

    /// A subject that exists.
    ///
    /// # Errors
    /// Usage for a bad name; else says that there is no such subject and where it was looked for.
    pub fn existing(&self, name: &str) -> Result<Subject, KeeperError> {
        let subject = self.subject(name)?;
        match fs::metadata(&subject.dir) {
            Ok(found) if found.is_dir() => return Ok(subject),
            Err(error) if error.kind() == ErrorKind::PermissionDenied => {
                return Err(KeeperError::io(format!(
                    "look at {}",
                    subject.dir.display()
                ))(error));
            }
            _ => {}
        }
        Err(KeeperError::Other(format!(
            "no subject named {name} in {}; `outlive ps` lists them",
            self.path.display()
        )))
    }

    /// Whether there is a subject of this name; one that may not be looked at counts.
    fn holds(&self, name: &str) -> bool {
        match fs::symlink_metadata(self.dir_of(name).join("subject.json")) {
            Ok(_) => true,
            Err(error) => error.kind() == ErrorKind::PermissionDenied,
        }
    }

    fn dir_of(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }
}

fn allowed(c: char) -> bool {
    c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-')
}

fn check_name(name: &str) -> Result<(), KeeperError> {
    let fits = !name.is_empty() && name.len() <= LONGEST_NAME;
    if fits && !name.starts_with('.') && !name.starts_with('-') && name.chars().all(allowed) {
        return Ok(());
    }
    Err(KeeperError::Usage(format!(
        "{name:?} is no name for a subject: use 1 to {LONGEST_NAME} of A-Z a-z 0-9 . _ - \
         and begin with none of . -"
    )))
}

/// One subject's directory.
#[derive(Clone, Debug)]
pub struct Subject {
    name: String,
    dir: PathBuf,
}

/// What the names of directories begin with in which subjects are put together: no name of a subject
/// begins so.
pub(crate) const ARRIVING: &str = ".arriving-";

/// The place where a subject is put together before it is one.
pub(crate) fn arriving(target: &Subject, root: &Path) -> Subject {
    Subject {
        name: target.name.clone(),
        dir: root.join(format!("{ARRIVING}{}", target.name)),
    }
}

/// The right to write in a subject's directory, held until it is dropped.
#[derive(Debug)]
pub struct Lock {
    _file: OwnedFd,
}

impl Subject {
    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its directory.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The directory of its epoch store.
    #[must_use]
    pub fn epochs_dir(&self) -> PathBuf {
        self.dir.join("epochs")
    }

    /// The file that takes the output of a program restored in the background.
    #[must_use]
    pub fn log_path(&self) -> PathBuf {
        self.dir.join("log")
    }

    /// Makes the directory (0700) where it is missing, with its parents.
    ///
    /// # Errors
    /// What the operating system says.
    pub fn make(&self) -> Result<(), KeeperError> {
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&self.dir)
            .map_err(KeeperError::io(format!("create {}", self.dir.display())))
    }

    /// Becomes the one keeper of this subject.
    ///
    /// # Errors
    /// Refused, naming the holder, where there is a keeper already.
    pub fn lock(&self) -> Result<Lock, KeeperError> {
        let path = self.dir.join("keeper.lock");
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        let file = rustix::fs::open(&path, flags, Mode::RUSR | Mode::WUSR)
            .map_err(KeeperError::io(format!("open {}", path.display())))?;
        let patience = Instant::now();
        while let Err(error) = rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
            if error != rustix::io::Errno::WOULDBLOCK {
                return Err(KeeperError::io(format!("lock {}", path.display()))(error));
            }
            if patience.elapsed() > LOCK_PATIENCE {
                return Err(self.busy(&path));
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        let mut file = File::from(file);
        // The number only helps to name the holder: a store that is full can be locked, too.
        let _ = file
            .set_len(0)
            .and_then(|()| writeln!(file, "{}", std::process::id()));
        Ok(Lock { _file: file.into() })
    }

    fn busy(&self, lock: &Path) -> KeeperError {
        let holder = read_bounded(lock, 64).ok();
        let holder =
            holder.and_then(|text| String::from_utf8(text).ok()?.trim().parse::<u32>().ok());
        let holder = holder.map_or_else(|| "another process".into(), |pid| format!("pid {pid}"));
        let name = &self.name;
        KeeperError::Refused(format!(
            "{name} is kept by {holder} already; `outlive stop {name}` ends it, `--name` makes another"
        ))
    }

    /// What is known of the subject.
    ///
    /// # Errors
    /// Where the file cannot be read or does not make sense.
    pub fn card(&self) -> Result<Card, KeeperError> {
        let path = self.dir.join("subject.json");
        let place = path.display().to_string();
        let text =
            read_bounded(&path, LARGEST_CARD).map_err(KeeperError::io(format!("read {place}")))?;
        let card: Card = serde_json::from_slice(&text)
            .map_err(|error| KeeperError::Other(format!("{place} does not make sense: {error}")))?;
        if card.version > CARD_VERSION {
            return Err(KeeperError::Refused(format!(
                "{place} has version {}; this outlive reads up to {CARD_VERSION}: use a newer one",
                card.version
            )));
        }
        Ok(card)
    }

    /// Replaces what is known of the subject, durably. For the holder of the lock.
    ///
    /// # Errors
    /// What the operating system says; the old file stays.
    pub fn write_card(&self, _lock: &Lock, card: &Card) -> Result<(), KeeperError> {
        let (path, new) = (
            self.dir.join("subject.json"),
            self.dir.join("subject.json.new"),
        );
        let wrap =
            |error| KeeperError::io::<std::io::Error>(format!("write {}", new.display()))(error);
        let text = serde_json::to_vec_pretty(card).map_err(|e| wrap(e.into()))?;
        self.replace_card(&new, &path, &text).map_err(|error| {
            let _ = fs::remove_file(&new);
            wrap(error)
        })
    }

    fn replace_card(&self, new: &Path, path: &Path, text: &[u8]) -> std::io::Result<()> {
        let mut options = OpenOptions::new();
        let mut file = options
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(new)?;
        file.write_all(text)?;
        file.sync_all()?;
        fs::rename(new, path)?;
        File::open(&self.dir)?.sync_all()
    }

    /// Removes the subject with all its epochs. For the holder of the lock.
    ///
    /// # Errors
    /// What the operating system says.
    pub fn remove(&self, _lock: &Lock) -> Result<(), KeeperError> {
        fs::remove_dir_all(&self.dir)
            .map_err(KeeperError::io(format!("remove {}", self.dir.display())))
    }
}

fn read_bounded(path: &Path, bound: u64) -> std::io::Result<Vec<u8>> {
    let mut text = Vec::new();
    File::open(path)?.take(bound).read_to_end(&mut text)?;
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn root() -> (tempfile::TempDir, Root) {
        let dir = tempfile::tempdir().unwrap();
        let root = Root::find(Some(&dir.path().join("store"))).unwrap();
        (dir, root)
    }

    fn card() -> Card {
        Card {
            version: CARD_VERSION,
            command: vec!["sleep".into(), "1".into()],
            every_ns: 100_000_000,
            capture: Capture::default(),
            hold_up: None,
            max_wear: Some(5),
            max_stop_us: Some(700),
            files_limit: Some(5),
            keep: Some("last=3,daily=7".parse().unwrap()),
            max_size: Some(9),
            compress: Some("lz4".into()),
            key: Some(KeySource::Credential("outlive".into())),
            pid: std::process::id(),
            started: procfs::start_time(std::process::id()).unwrap(),
            boot: procfs::boot_id(),
            since_ns: 5,
            ended: None,
        }
    }

    #[test]
    fn names_that_would_leave_the_root_are_refused() {
        let (_dir, root) = root();
        for bad in [
            "",
            ".",
            "..",
            ".x",
            "a/b",
            "a b",
            "-x",
            "ä",
            "a\n",
            &"x".repeat(65),
        ] {
            let error = root.subject(bad).unwrap_err();
            assert_eq!(error.exit_code(), 2, "{bad:?}");
        }
        for good in ["a", "redis-server", "A.b_c-9", &"x".repeat(64)] {
            assert_eq!(root.subject(good).unwrap().dir(), root.path().join(good));
        }
    }

    #[test]
    fn default_names_come_from_the_program_and_are_unique() {
        let (_dir, root) = root();
        assert_eq!(
            root.free_name(Path::new("/usr/bin/redis-server")),
            "redis-server"
        );
        assert_eq!(root.free_name(Path::new("/x/my prog")), "my-prog");
        assert_eq!(root.free_name(Path::new("/x/.hidden")), "program.hidden");
        assert_eq!(root.free_name(Path::new("/")), "program");
        root.subject("my-prog").unwrap().make().unwrap();
        assert_eq!(root.free_name(Path::new("/x/my prog")), "my-prog-2");
        let long = root.free_name(Path::new(&"é".repeat(300)));
        assert!(root.subject(&long).is_ok(), "{long}");
    }

    #[test]
    fn one_keeper_at_a_time_and_the_refusal_names_it() {
        let (_dir, root) = root();
        let subject = root.subject("a").unwrap();
        subject.make().unwrap();
        let lock = subject.lock().unwrap();
        let error = subject.lock().unwrap_err();
        assert_eq!(error.exit_code(), 3);
        assert!(
            error
                .to_string()
                .contains(&format!("pid {}", std::process::id())),
            "{error}"
        );
        drop(lock);
        subject.lock().unwrap();
    }

    #[test]
    fn a_card_comes_back_as_it_was_written_and_rubbish_is_named() {
        let (_dir, root) = root();
        let subject = root.subject("a").unwrap();
        subject.make().unwrap();
        assert!(
            root.names().unwrap().is_empty(),
            "a directory without a card is no subject"
        );
        let lock = subject.lock().unwrap();
        subject.write_card(&lock, &card()).unwrap();
        assert_eq!(subject.card().unwrap(), card());
        assert_eq!(root.names().unwrap(), ["a"]);
        assert!(card().runs());
        assert!(
            !Card {
                started: 1,
                ..card()
            }
            .runs()
        );
        let text = fs::read_to_string(subject.dir().join("subject.json")).unwrap();
        let foreign = text.replace("redundant", "telepathy");
        let foreign: Card = serde_json::from_str(&foreign).unwrap();
        assert_eq!(foreign.capture.read().unwrap_err().exit_code(), 3);
        let newer = Card {
            version: CARD_VERSION + 1,
            ..card()
        };
        subject.write_card(&lock, &newer).unwrap();
        assert_eq!(subject.card().unwrap_err().exit_code(), 3);
        fs::write(subject.dir().join("subject.json"), b"{\"version\":").unwrap();
        assert!(
            subject
                .card()
                .unwrap_err()
                .to_string()
                .contains("subject.json")
        );
        subject.remove(&lock).unwrap();
        assert!(!subject.dir().exists());
    }
}
