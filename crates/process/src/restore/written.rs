//! Files that the program had open for writing and whose contents the epoch holds: each is what it
//! was, whatever became of it since.
//!
//! # What becomes of them
//! - A file that is there is compared byte by byte. Nothing is done where nothing differs; what it has
//!   behind its recorded end is cut off and kept aside; what it lacks or has otherwise is written, in
//!   place, so that it stays the same file. One that was overwritten after the epoch is copied aside
//!   as it is first (to `PATH.outlive-after.EPOCH`); one that is older than the epoch, as after a power
//!   cut, is completed.
//! - One that is gone is made again. In the place of another file it is made again as well, and that
//!   one gets the name `PATH.outlive-after.EPOCH`: no file is written to that is not the recorded one.
//! - Beside a file that was overwritten lies perhaps a journal by which it would be changed again:
//!   a file that has its name with `-` and more behind it (`PATH-journal`), was made after the epoch
//!   and is not in it. It is given the name `….outlive-after.EPOCH`.
//!
//! # Rules
//! - Before [`Written::put_back`] nothing changes but that files to be made again lie beside their
//!   place, as `PATH.outlive-new.EPOCH`.
//! - Copies are durable before anything is overwritten. An interrupted restore is made again.
//!
//! # What is lost
//! Extended attributes and links of a file that is made again.

use super::saved::{MadeFiles, Saved};
use crate::resources::descriptors::{
    FileAction, Seen, WrittenFile, look_up, rename_new, same_file, set_aside, set_time,
    sync_directory_of,
};
use crate::resources::shared::{FileContents, Origin, WrittenFileState, reopen};
use crate::{ProcessError, Refusal};
use rustix::fs::{FileType, Mode, OFlags};
use rustix::io::Errno;
use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fs::{File, Permissions};
use std::os::fd::AsFd;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{PermissionsExt, fchown};
use std::path::{Path, PathBuf};

/// One such file.
#[derive(Debug)]
pub struct Written {
    /// The space of its contents.
    pub space: u32,
    state: WrittenFileState,
    size: u64,
    file: File,
    place: Place,
    epoch: u64,
    /// When the epoch was taken, nanoseconds since 1970.
    taken: i64,
    /// Paths of all files in the epoch.
    known: std::rc::Rc<BTreeSet<Vec<u8>>>,
}

/// Where it is.
#[derive(Debug)]
enum Place {
    /// Where it was, with this time of the last change.
    Here(i64),
    /// It is made again, beside its place; there may be another file in that.
    Beside(PathBuf),
}

/// Opens all of them, and makes those again that are not there.
pub fn open(
    saved: &Saved,
    epoch: u64,
    made: &mut MadeFiles,
    refusals: &mut Vec<Refusal>,
) -> Result<Vec<(Written, WrittenFile)>, ProcessError> {
    let known = std::rc::Rc::new(paths(saved));
    let mut all = Vec::new();
    for memory in &saved.shared.memories {
        let Origin::WrittenFile(state) = &memory.origin else {
            continue;
        };
        if !state.path.starts_with(b"/") || state.path.contains(&0) {
            let what = "the path of a file that was written to is none";
            return Err(ProcessError::Image(what.into()));
        }
        let (file, place) = match find(state, memory.size, epoch, made) {
            Ok(found) => found,
            Err(why) => {
                let remedy = "put the file back as it was, or restore with --files keep";
                let what = format!("file {}: {why}", shown(&state.path));
                refusals.push(saved.refusal(what, remedy));
                continue;
            }
        };
        let opened = WrittenFile {
            then: state.seen(memory.size),
            path: state.path.clone(),
            file: duplicate(&file)?,
        };
        let written = Written {
            space: memory.space,
            state: state.clone(),
            size: memory.size,
            file,
            place,
            epoch,
            taken: i64::try_from(saved.subject.realtime_ns).unwrap_or(i64::MAX),
            known: known.clone(),
        };
        all.push((written, opened));
    }
    Ok(all)
}

/// The file where it was, or a new one for its place.
fn find(
    state: &WrittenFileState,
    size: u64,
    epoch: u64,
    made: &mut MadeFiles,
) -> std::io::Result<(File, Place)> {
    match look_up(&state.path) {
        Ok(held) => {
            let (now, sort) = Seen::of_fd(held.as_fd())?;
            if sort != FileType::RegularFile {
                return Err(std::io::Error::other("it is no regular file any more"));
            }
            if same_file(&state.seen(size), &now) {
                let file = reopen(&held, OFlags::RDWR | OFlags::NONBLOCK)?;
                return Ok((File::from(file), Place::Here(now.modified)));
            }
        }
        Err(Errno::NOENT) => {}
        Err(errno) => return Err(errno.into()),
    }
    let beside = named(&state.path, "new", epoch);
    // Of a restore that was interrupted.
    remove(&beside)?;
    let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
    let file = rustix::fs::open(&beside[..], flags, Mode::RUSR | Mode::WUSR)?;
    let beside = PathBuf::from(OsStr::from_bytes(&beside));
    made.0.push(beside.clone());
    Ok((File::from(file), Place::Beside(beside)))
}

/// All files that an epoch names.
fn paths(saved: &Saved) -> BTreeSet<Vec<u8>> {
    let mapped = saved.processes.iter().flat_map(|p| &p.memory.files);
    let mapped = mapped.map(|f| f.path.clone());
    let written = saved
        .shared
        .memories
        .iter()
        .filter_map(|m| match &m.origin {
            Origin::WrittenFile(file) => Some(file.path.clone()),
            _ => None,
        });
    mapped.chain(written).chain(saved.table.paths()).collect()
}

impl Written {
    /// What takes note of its contents.
    pub fn contents(&self) -> Result<FileContents, ProcessError> {
        FileContents::new(duplicate(&self.file)?, self.size)
    }

    /// Gives it its contents, all being noted; says what was done.
    pub fn put_back(&self, contents: FileContents, pid: u32) -> Result<Vec<String>, ProcessError> {
        let failed = |source| ProcessError::Kernel {
            pid,
            what: format!("putting {} back", shown(&self.state.path)),
            source,
        };
        match &self.place {
            Place::Here(modified) => self.reconcile(contents, *modified, pid, &failed),
            Place::Beside(beside) => self.replace(contents, beside).map_err(failed),
        }
    }

    fn replace(&self, mut contents: FileContents, beside: &Path) -> std::io::Result<Vec<String>> {
        contents.apply()?;
        if let [mode, owner, group] = self.state.access[..] {
            // Without the right to give files away it stays ours.
            let _ = fchown(&self.file, Some(owner), Some(group));
            let mode = Permissions::from_mode(mode & 0o7777);
            self.file.set_permissions(mode)?;
        }
        set_time(&self.file, self.state.modified)?;
        let (path, name) = (&self.state.path, shown(&self.state.path));
        let other = set_aside(path, &named(path, "after", self.epoch))?;
        rename_new(beside.as_os_str().as_bytes(), path)?;
        sync_directory_of(path)?;
        let mut said = vec![match other {
            Some(other) => format!(
                "{name} was another file: made again, the other one is {}",
                shown(&other)
            ),
            None => format!("{name} was gone: made again"),
        }];
        said.extend(self.set_journals_aside()?);
        Ok(said)
    }

    fn reconcile(
        &self,
        mut contents: FileContents,
        modified: i64,
        pid: u32,
        failed: &dyn Fn(std::io::Error) -> ProcessError,
    ) -> Result<Vec<String>, ProcessError> {
        let found = contents.difference().map_err(failed)?;
        let longer = found.length.saturating_sub(self.size);
        if !found.incomplete {
            if longer == 0 && modified == self.state.modified {
                return Ok(Vec::new());
            }
            let action = FileAction {
                path: self.state.path.clone(),
                file: duplicate(&self.file)?.into(),
                size: self.size,
                grown_by: longer,
                modified: self.state.modified,
                epoch: self.epoch,
            };
            return Ok(vec![action.apply(pid)?]);
        }
        let newer = modified > self.state.modified;
        let keep = found.overwritten && newer || longer > 0;
        let mut done = || -> std::io::Result<Vec<String>> {
            let kept = keep.then(|| self.copy_aside()).transpose()?;
            contents.apply()?;
            set_time(&self.file, self.state.modified)?;
            let name = shown(&self.state.path);
            let mut said = vec![match kept {
                Some(kept) => format!(
                    "{name} was written to after the epoch: put back, what it was is in {}",
                    shown(&kept)
                ),
                None => format!("{name} had not all that it had at the epoch: completed"),
            }];
            said.extend(self.set_journals_aside()?);
            Ok(said)
        };
        done().map_err(failed)
    }

    /// Copies the file as it is, durably; shares its blocks where the file system can.
    fn copy_aside(&self) -> std::io::Result<Vec<u8>> {
        let path = &self.state.path;
        let copying = named(path, "copy", self.epoch);
        // Of a restore that was interrupted before it overwrote anything.
        remove(&copying)?;
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
        let copy = rustix::fs::open(&copying[..], flags, Mode::RUSR | Mode::WUSR)?;
        if rustix::fs::ioctl_ficlone(&copy, &self.file).is_err() {
            let mut from = File::from(reopen(&self.file, OFlags::RDONLY)?);
            std::io::copy(&mut from, &mut File::from(copy.try_clone()?))?;
        }
        rustix::fs::fsync(&copy)?;
        let aside = set_aside(&copying, &named(path, "after", self.epoch))?;
        aside.ok_or_else(|| std::io::Error::other("its copy is gone"))
    }

    /// Gives journals that were made after the epoch another name; says so.
    fn set_journals_aside(&self) -> std::io::Result<Vec<String>> {
        let path = Path::new(OsStr::from_bytes(&self.state.path));
        let (Some(directory), Some(name)) = (path.parent(), path.file_name()) else {
            return Ok(Vec::new());
        };
        let start = [name.as_bytes(), b"-"].concat();
        let mut said = Vec::new();
        for entry in std::fs::read_dir(directory)? {
            let entry = entry?;
            let found = entry.path().into_os_string().into_vec();
            let ours = entry
                .file_name()
                .as_bytes()
                .windows(9)
                .any(|w| w == b".outlive-");
            if !entry.file_name().as_bytes().starts_with(&start)
                || ours
                || self.known.contains(&found)
            {
                continue;
            }
            let Ok(held) = look_up(&found) else {
                continue;
            };
            let (now, sort) = Seen::of_fd(held.as_fd())?;
            if sort != FileType::RegularFile || now.born.is_none_or(|born| born <= self.taken) {
                continue;
            }
            if let Some(aside) = set_aside(&found, &named(&found, "after", self.epoch))? {
                said.push(format!(
                    "{} was made after the epoch: it is {} now",
                    shown(&found),
                    shown(&aside)
                ));
            }
        }
        Ok(said)
    }
}

fn named(path: &[u8], what: &str, epoch: u64) -> Vec<u8> {
    [path, format!(".outlive-{what}.{epoch}").as_bytes()].concat()
}

fn remove(path: &[u8]) -> std::io::Result<()> {
    match rustix::fs::unlink(path) {
        Ok(()) | Err(Errno::NOENT) => Ok(()),
        Err(errno) => Err(errno.into()),
    }
}

fn duplicate(file: &File) -> Result<File, ProcessError> {
    file.try_clone()
        .map_err(|e| super::internal("duplicating a descriptor", e))
}

fn shown(path: &[u8]) -> String {
    String::from_utf8_lossy(path).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use outlive_epoch::PAGE_SIZE;
    use std::time::{Duration, SystemTime};

    const EPOCH: u64 = 4;

    /// A file that was of these bytes when an epoch was taken.
    struct Fixture {
        dir: tempfile::TempDir,
        state: WrittenFileState,
        then: Vec<u8>,
        known: BTreeSet<Vec<u8>>,
        taken: i64,
    }

    impl Fixture {
        fn new(then: &[u8]) -> Self {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("data");
            std::fs::write(&path, then).unwrap();
            let file = File::open(&path).unwrap();
            let state = WrittenFileState::collect(path.as_os_str().as_bytes(), &file).unwrap();
            let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
            let taken = now.unwrap().as_nanos().try_into().unwrap();
            // So that what is made from now on is younger also by a coarse clock.
            std::thread::sleep(Duration::from_millis(20));
            Self {
                dir,
                state,
                then: then.to_vec(),
                known: BTreeSet::new(),
                taken,
            }
        }

        fn path(&self, name: &str) -> PathBuf {
            self.dir.path().join(name)
        }

        fn text(&self, name: &str) -> String {
            std::fs::read_to_string(self.path(name)).unwrap()
        }

        /// Puts it back; returns what was said.
        fn restore(&self) -> String {
            let mut made = MadeFiles::default();
            let size = self.then.len() as u64;
            let (file, place) = find(&self.state, size, EPOCH, &mut made).unwrap();
            let written = Written {
                space: 1,
                state: self.state.clone(),
                size,
                file,
                place,
                epoch: EPOCH,
                taken: self.taken,
                known: std::rc::Rc::new(self.known.clone()),
            };
            let mut contents = written.contents().unwrap();
            for (i, page) in self.then.chunks(PAGE_SIZE).enumerate() {
                let mut whole = page.to_vec();
                whole.resize(PAGE_SIZE, 0);
                contents.note((i * PAGE_SIZE) as u64, &whole).unwrap();
            }
            let said = written.put_back(contents, 1).unwrap().join("; ");
            assert_eq!(std::fs::read(self.path("data")).unwrap(), self.then);
            let file = File::open(self.path("data")).unwrap();
            let now = WrittenFileState::collect(&self.state.path, &file).unwrap();
            assert_eq!(now.modified, self.state.modified, "{said}");
            assert_eq!(now.access, self.state.access, "{said}");
            said
        }

        /// The names of all files.
        fn names(&self) -> Vec<String> {
            let entries = std::fs::read_dir(self.dir.path()).unwrap();
            let name = |e: std::io::Result<std::fs::DirEntry>| e.unwrap().file_name();
            let mut all: Vec<String> = entries.map(|e| name(e).into_string().unwrap()).collect();
            all.sort();
            all
        }
    }

    #[test]
    fn an_untouched_file_is_left_alone() {
        let fixture = Fixture::new(b"then");
        assert_eq!(fixture.restore(), "");
        assert_eq!(fixture.names(), ["data"]);
    }

    #[test]
    fn what_was_overwritten_is_put_back_and_kept_aside() {
        let fixture = Fixture::new(&[b'a'; 9000]);
        let mut now = vec![b'a'; 9000];
        now[5000] = b'b';
        let text = String::from_utf8(now.clone()).unwrap();
        std::fs::write(fixture.path("data"), &now).unwrap();
        assert!(fixture.restore().contains("data.outlive-after.4"));
        assert_eq!(fixture.text("data.outlive-after.4"), text);
        assert_eq!(fixture.restore(), "");
        // Of another life from the same epoch, after a restore that was interrupted.
        std::fs::write(fixture.path("data.outlive-copy.4"), "half").unwrap();
        std::fs::write(fixture.path("data"), text.clone() + "longer").unwrap();
        assert!(fixture.restore().contains("data.outlive-after.4.1"));
        assert_eq!(fixture.text("data.outlive-after.4.1"), text + "longer");
        assert_eq!(fixture.names().len(), 3, "{:?}", fixture.names());
    }

    #[test]
    fn what_grew_is_cut_and_its_tail_kept() {
        let fixture = Fixture::new(b"then");
        std::fs::write(fixture.path("data"), "then and more").unwrap();
        assert!(fixture.restore().contains("9 bytes"));
        assert_eq!(fixture.text("data.outlive-tail.4"), " and more");
    }

    /// As after a power cut.
    #[test]
    fn what_is_older_is_completed() {
        let fixture = Fixture::new(&[b'a'; 9000]);
        let before = SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000);
        for now in [&[b'a'; 9000][..100], &[0; 9000], &[]] {
            std::fs::write(fixture.path("data"), now).unwrap();
            let file = File::options().write(true).open(fixture.path("data"));
            file.unwrap().set_modified(before).unwrap();
            assert!(fixture.restore().contains("completed"));
        }
        // Lost without a trace in the time of the file.
        let now = vec![0; 9000];
        std::fs::write(fixture.path("data"), now).unwrap();
        let file = File::options()
            .write(true)
            .open(fixture.path("data"))
            .unwrap();
        set_time(&file, fixture.state.modified).unwrap();
        assert!(fixture.restore().contains("completed"));
        assert_eq!(fixture.names(), ["data"]);
    }

    #[test]
    fn what_is_gone_is_made_again_and_another_file_is_left_whole() {
        let fixture = Fixture::new(b"then");
        std::fs::remove_file(fixture.path("data")).unwrap();
        std::fs::write(fixture.path("data.outlive-new.4"), "of an interrupted one").unwrap();
        assert!(fixture.restore().contains("gone"));
        assert_eq!(fixture.names(), ["data"]);
        std::fs::write(fixture.path("other"), "other").unwrap();
        std::fs::rename(fixture.path("other"), fixture.path("data")).unwrap();
        assert!(fixture.restore().contains("another file"));
        assert_eq!(fixture.text("data.outlive-after.4"), "other");
        std::fs::remove_file(fixture.path("data")).unwrap();
        std::os::unix::fs::symlink("data.outlive-after.4", fixture.path("data")).unwrap();
        let mut made = MadeFiles::default();
        let refused = find(&fixture.state, 4, EPOCH, &mut made).unwrap_err();
        assert!(refused.to_string().contains("no regular file"));
        std::fs::remove_file(fixture.path("data")).unwrap();
        drop(find(&fixture.state, 4, EPOCH, &mut made).unwrap());
        drop(made);
        assert_eq!(
            fixture.names(),
            ["data.outlive-after.4"],
            "a restore that failed"
        );
    }

    #[test]
    fn journals_of_later_changes_are_set_aside() {
        let fixture = Fixture::new(b"then");
        let names = ["data-journal", "data-known", "data.bak", "dat-a"];
        for name in names {
            std::fs::write(fixture.path(name), name).unwrap();
        }
        std::fs::create_dir(fixture.path("data-dir")).unwrap();
        let known = fixture.path("data-known").into_os_string().into_vec();
        let mut fixture = Fixture {
            known: [known].into(),
            ..fixture
        };
        assert_eq!(fixture.restore(), "", "nothing was changed by them");
        std::fs::write(fixture.path("data"), "now!").unwrap();
        // What was there at the epoch is part of it.
        let taken = std::mem::replace(&mut fixture.taken, i64::MAX);
        assert!(!fixture.restore().contains("journal"));
        fixture.taken = taken;
        std::fs::write(fixture.path("data"), "now!").unwrap();
        assert!(fixture.restore().contains("data-journal.outlive-after.4"));
        assert_eq!(fixture.text("data-journal.outlive-after.4"), "data-journal");
        let left = [
            "dat-a",
            "data",
            "data-dir",
            "data-journal.outlive-after.4",
            "data-known",
        ];
        let names = fixture.names();
        let names: Vec<_> = names.iter().filter(|n| !n.starts_with("data.")).collect();
        assert_eq!(names, left);
        assert_eq!(fixture.text("data.bak"), "data.bak");
    }
}
