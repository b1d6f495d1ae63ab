//! Regular files and directories, and what becomes of them between epoch and restore.

use super::super::finish_calls;
use super::*;
use rustix::fs::{FlockOperation, Mode, OFlags, SeekFrom, flock, seek};
use rustix::io::Errno;
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

struct Fixture {
    dir: tempfile::TempDir,
}

impl Fixture {
    fn new() -> Self {
        Self {
            dir: tempfile::tempdir().unwrap(),
        }
    }

    fn file(&self, name: &str, contents: &[u8]) -> PathBuf {
        let path = self.dir.path().join(name);
        std::fs::write(&path, contents).unwrap();
        path
    }
}

fn writable(path: &Path) -> File {
    OpenOptions::new()
        .read(true)
        .write(true)
        .open(path)
        .unwrap()
}

fn append(path: &Path, bytes: &[u8]) {
    OpenOptions::new()
        .append(true)
        .open(path)
        .unwrap()
        .write_all(bytes)
        .unwrap();
}

#[test]
fn positions_and_flags_are_kept_and_duplicates_share_them() {
    let _quiet = no_child_starts();
    let fixture = Fixture::new();
    let path = fixture.file("data", &[7; 5000]);
    let reader = File::open(&path).unwrap();
    seek(&reader, SeekFrom::Start(1234)).unwrap();
    let twin = reader.try_clone().unwrap();
    let other = File::open(&path).unwrap();
    let flags = OFlags::WRONLY | OFlags::APPEND | OFlags::DSYNC | OFlags::CLOEXEC;
    let log = rustix::fs::open(&path, flags, Mode::empty()).unwrap();
    seek(&log, SeekFrom::Start(17)).unwrap();
    let pathonly = rustix::fs::open(&path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).unwrap();

    let numbers = [
        number(&reader),
        number(&twin),
        number(&other),
        number(&log),
        number(&pathonly),
    ];
    let collected = collect_result(&numbers).unwrap();
    assert_eq!(
        collected.files.len(),
        1,
        "only what is open for writing is synced"
    );
    collected.files.sync(1).unwrap();
    let table = collect(&numbers);
    assert_eq!(table.descriptions.len(), 4);
    assert_eq!(
        table.find(me(), number(&twin)),
        table.find(me(), number(&reader))
    );
    let made = recreate(&table);
    assert_same(&reader, &made_for(&made, number(&reader)));
    assert_same(&other, &made_for(&made, number(&other)));
    assert_same(&log, &made_for(&made, number(&log)));
    assert_same(&pathonly, &made_for(&made, number(&pathonly)));
    let (a, b) = (
        made_for(&made, number(&reader)),
        made_for(&made, number(&twin)),
    );
    seek(&a, SeekFrom::Start(3)).unwrap();
    assert_eq!(info(&b).position, 3);
}

#[test]
fn directories() {
    let _quiet = no_child_starts();
    let fixture = Fixture::new();
    let dir = File::open(fixture.dir.path()).unwrap();
    let table = collect(&[number(&dir)]);
    let made = recreate(&table);
    let again = made_for(&made, number(&dir));
    assert_eq!(info(&again).position, 0);
    let names = rustix::fs::Dir::read_from(&again).unwrap().count();
    assert_eq!(names, 2);
    fixture.dir.close().unwrap();
    assert!(check_refused(&table)[0].what.contains("is gone"));
}

#[test]
fn a_file_that_grew_is_cut_back_once_everything_else_is_done() {
    let _quiet = no_child_starts();
    let fixture = Fixture::new();
    let path = fixture.file("log", &[b'a'; 10_000]);
    let file = writable(&path);
    let table = collect(&[number(&file)]);
    let before = std::fs::metadata(&path).unwrap().modified().unwrap();
    append(&path, b"after the epoch");
    let mut made = recreate(&table);
    assert_eq!(
        std::fs::metadata(&path).unwrap().len(),
        10_015,
        "not before apply_files"
    );
    let notices = made.apply_files(me()).unwrap();
    assert_eq!(notices.len(), 1);
    assert_eq!(std::fs::metadata(&path).unwrap().len(), 10_000);
    assert_eq!(
        std::fs::metadata(&path).unwrap().modified().unwrap(),
        before
    );
    let tail = fixture.dir.path().join("log.outlive-tail.9");
    assert_eq!(std::fs::read(tail).unwrap(), b"after the epoch");
    // A second restore of the same epoch finds nothing left to do.
    let mut again = recreate(&table);
    assert_eq!(again.apply_files(me()).unwrap(), Vec::<String>::new());
}

#[test]
fn a_file_open_twice_is_cut_once() {
    let _quiet = no_child_starts();
    let fixture = Fixture::new();
    let path = fixture.file("log", b"abc");
    let (a, b) = (writable(&path), writable(&path));
    let table = collect(&[number(&a), number(&b)]);
    append(&path, b"def");
    let mut made = recreate(&table);
    assert_eq!(made.apply_files(me()).unwrap().len(), 1);
    assert_eq!(std::fs::read(&path).unwrap(), b"abc");
}

/// As a writer leaves it that was killed inside `write(2)`, before its first byte.
#[test]
fn a_file_whose_time_alone_changed_gets_it_back() {
    let _quiet = no_child_starts();
    for contents in [&b""[..], b"abcdef"] {
        let fixture = Fixture::new();
        let path = fixture.file("data", contents);
        let file = writable(&path);
        let table = collect(&[number(&file)]);
        let modified = || std::fs::metadata(&path).unwrap().modified().unwrap();
        let before = modified();
        let later = before + std::time::Duration::from_secs(5);
        file.set_modified(later).unwrap();
        let mut made = recreate(&table);
        let notices = made.apply_files(me()).unwrap();
        assert!(
            notices.len() == 1 && notices[0].contains("data has its contents of the epoch"),
            "{notices:?}"
        );
        assert_eq!(modified(), before);
        assert_eq!(std::fs::read(&path).unwrap(), contents);
        assert_eq!(std::fs::read_dir(fixture.dir.path()).unwrap().count(), 1);
        let mut again = recreate(&table);
        assert_eq!(again.apply_files(me()).unwrap(), Vec::<String>::new());
    }
}

/// A log of any length, if its writers can only append.
#[test]
fn all_of_a_log_is_vouched_for() {
    let _quiet = no_child_starts();
    let fixture = Fixture::new();
    let path = fixture.file("log", &[b'a'; 100_000]);
    let log = OpenOptions::new().append(true).open(&path).unwrap();
    let table = collect(&[number(&log)]);
    let later = std::time::SystemTime::now() + std::time::Duration::from_secs(5);
    log.set_modified(later).unwrap();
    let notices = recreate(&table).apply_files(me()).unwrap();
    assert!(notices[0].contains("set back"), "{notices:?}");
    append(&path, b"more");
    let notices = recreate(&table).apply_files(me()).unwrap();
    assert!(notices[0].contains("grown by 4 bytes"), "{notices:?}");
    // Far from the end.
    rustix::io::pwrite(writable(&path), b"b", 10).unwrap();
    assert!(check_refused(&table)[0].what.contains("overwritten"));
    append(&path, b"more");
    assert!(check_refused(&table)[0].what.contains("overwritten"));
    // Somebody else who has it open may write anywhere: only the end is looked at.
    let other = writable(&path);
    let table = collect(&[number(&log), number(&other)]);
    other.set_modified(later).unwrap();
    assert!(check_refused(&table)[0].what.contains("modified"));
}

#[test]
fn what_is_not_as_it_was_is_refused_unless_kept() {
    let _quiet = no_child_starts();
    type Change = fn(&Path);
    let cases: [(&str, Change); 4] = [
        ("rewritten", |p| std::fs::write(p, b"ABCDEF").unwrap()),
        ("shorter", |p| writable(p).set_len(2).unwrap()),
        ("overwritten and longer", |p| {
            std::fs::write(p, b"ABCDEFGHI").unwrap()
        }),
        ("replaced", |p| {
            let other = p.with_extension("new");
            std::fs::write(&other, b"abcdefghi").unwrap();
            std::fs::rename(other, p).unwrap();
        }),
    ];
    for (name, change) in cases {
        let fixture = Fixture::new();
        let path = fixture.file("data", b"abcdef");
        let file = writable(&path);
        let table = collect(&[number(&file)]);
        drop(file);
        change(&path);
        let left = std::fs::read(&path).unwrap();
        let refusals = check_refused(&table);
        assert_eq!(refusals.len(), 1, "{name}");
        assert!(
            refusals[0].remedy.contains("--files keep"),
            "{name}: {}",
            refusals[0]
        );
        let checked = check_table(&table, &request(FilesPolicy::Keep)).unwrap();
        let mut made = recreate_table(&table, checked).unwrap();
        assert!(made.apply_files(me()).unwrap().is_empty(), "{name}");
        assert_eq!(std::fs::read(&path).unwrap(), left, "{name}");
    }
}

#[test]
fn a_file_that_is_only_read_must_be_the_same_or_look_the_same() {
    let _quiet = no_child_starts();
    let fixture = Fixture::new();
    let path = fixture.file("data", b"abcdef");
    let file = File::open(&path).unwrap();
    let table = collect(&[number(&file)]);
    append(&path, b"more, by somebody else");
    drop(recreate(&table));
    let other = fixture.file("other", b"something else");
    std::fs::rename(&other, &path).unwrap();
    assert!(check_refused(&table)[0].what.contains("another one"));
    std::fs::remove_file(&path).unwrap();
    assert!(check_refused(&table)[0].what.contains("is gone"));
    std::os::unix::fs::symlink("/dev/zero", &path).unwrap();
    assert!(check_refused(&table)[0].what.contains("no regular file"));
}

#[test]
fn nothing_is_changed_when_one_of_many_is_refused() {
    let _quiet = no_child_starts();
    let fixture = Fixture::new();
    let (log, data) = (fixture.file("log", b"abc"), fixture.file("data", b"abc"));
    let (a, b) = (writable(&log), writable(&data));
    let table = collect(&[number(&a), number(&b)]);
    append(&log, b"tail");
    std::fs::remove_file(&data).unwrap();
    assert_eq!(check_refused(&table).len(), 1);
    assert_eq!(std::fs::read(&log).unwrap(), b"abctail");
    assert_eq!(std::fs::read_dir(fixture.dir.path()).unwrap().count(), 1);
}

#[test]
fn files_of_the_kernel_are_opened_again_whatever_they_say() {
    let _quiet = no_child_starts();
    let file = File::open("/proc/meminfo").unwrap();
    let made = recreate(&collect(&[number(&file)]));
    assert_same(&file, &made_for(&made, number(&file)));
}

#[test]
fn a_name_that_ends_like_a_deleted_one_is_just_a_name() {
    let _quiet = no_child_starts();
    let fixture = Fixture::new();
    let path = fixture.file("x (deleted)", b"abc");
    let file = File::open(&path).unwrap();
    assert_same(
        &file,
        &made_for(&recreate(&collect(&[number(&file)])), number(&file)),
    );
    std::fs::remove_file(&path).unwrap();
    let table = collect(&[number(&file)]);
    let object = &table.descriptions[0].object;
    assert_eq!(object.name(), "file without a name");
}

#[test]
fn locks_of_a_description_are_taken_again() {
    let _quiet = no_child_starts();
    let fixture = Fixture::new();
    let (one, two) = (fixture.file("one", b"abc"), fixture.file("two", b"abc"));
    let (a, b) = (writable(&one), writable(&two));
    flock(&a, FlockOperation::LockExclusive).unwrap();
    outlive_linux::descriptors::lock_description(b.as_fd(), true, 1, 2).unwrap();
    let table = collect(&[number(&a), number(&b)]);
    drop((a, b));
    let _made = recreate(&table);
    assert_eq!(
        flock(writable(&one), FlockOperation::NonBlockingLockShared),
        Err(Errno::AGAIN)
    );
    let other = writable(&two);
    let lock = |start| outlive_linux::descriptors::lock_description(other.as_fd(), true, start, 1);
    assert_eq!((lock(0), lock(2)), (Ok(()), Err(Errno::AGAIN)));
}

#[test]
fn locks_of_the_process_are_left_to_it() {
    let _quiet = no_child_starts();
    let fixture = Fixture::new();
    let file = writable(&fixture.file("data", b"abc"));
    rustix::fs::fcntl_lock(&file, FlockOperation::NonBlockingLockExclusive).unwrap();
    let table = collect(&[number(&file)]);
    let calls = finish_calls(&table);
    assert_eq!(calls.len(), 1);
    assert_eq!((calls[0].process, calls[0].number), (me(), libc::SYS_fcntl));
}

#[test]
fn watched_files_are_watched_again_under_the_same_numbers() {
    use rustix::fs::inotify;
    let _quiet = no_child_starts();
    let fixture = Fixture::new();
    let path = fixture.file("a log", b"abc");
    let link = fixture.dir.path().join("link");
    std::os::unix::fs::symlink(&path, &link).unwrap();
    let instance = inotify::init(inotify::CreateFlags::CLOEXEC).unwrap();
    let add = |path: &Path, flags| inotify::add_watch(&instance, path, flags).unwrap();
    let gone = add(&path, inotify::WatchFlags::OPEN);
    inotify::remove_watch(&instance, gone).unwrap();
    rustix::io::read(&instance, &mut [0; 64]).unwrap();
    add(&link, inotify::WatchFlags::MODIFY);
    let flags = inotify::WatchFlags::CREATE | inotify::WatchFlags::ONESHOT;
    add(fixture.dir.path(), flags);
    let writer = writable(&path);
    let table = collect(&[number(&instance), number(&writer)]);
    let watches = info(&instance).rest;
    append(&path, b"tail");
    assert!(
        refused(&[number(&instance)])[0]
            .what
            .contains("not read yet")
    );
    let mut made = recreate(&table);
    assert_eq!(made.apply_files(me()).unwrap().len(), 1);
    let again = made_for(&made, number(&instance));
    assert_eq!(info(&again).rest, watches);
    assert_eq!(
        rustix::io::ioctl_fionread(&again),
        Ok(0),
        "nothing is told of the restore"
    );
    append(&path, b"news");
    assert_eq!(rustix::io::ioctl_fionread(&again), Ok(16));
    std::fs::remove_file(&path).unwrap();
    assert!(
        check_refused(&table)
            .iter()
            .any(|r| r.what.contains("inotify watches"))
    );
}

#[test]
fn contents_are_kept_of_small_files_that_may_be_overwritten() {
    use crate::resources::shared::Origin;
    use std::collections::BTreeMap;
    let _quiet = no_child_starts();
    let fixture = Fixture::new();
    let [data, log, read, large] = ["data", "log", "read", "large"].map(|name| {
        let length = if name == "large" { 8193 } else { 8192 };
        fixture.file(name, &vec![1; length])
    });
    let reader = File::open(&data).unwrap();
    let (data, large) = (writable(&data), writable(&large));
    let log = OpenOptions::new().append(true).open(&log).unwrap();
    let read = File::open(&read).unwrap();
    let numbers = [
        number(&reader),
        number(&data),
        number(&log),
        number(&read),
        number(&large),
    ];
    let mut objects = SharedObjects::with_files(8192);
    let root = crate::target::Target::open(me()).unwrap();
    let mut take = || {
        objects.begin();
        let table = collect_shared(&numbers, &mut objects).unwrap().table;
        let (state, residue) = objects.take(&[], &root, &BTreeMap::new()).unwrap();
        (table, state, residue)
    };
    let (table, state, residue) = take();
    let [memory] = &state.memories[..] else {
        panic!("{state:?}");
    };
    let Origin::WrittenFile(file) = &memory.origin else {
        panic!("{state:?}");
    };
    assert!(file.path.ends_with(b"/data"));
    assert_eq!((memory.size, residue.pages()), (8192, 2));
    let vouched = |fd: &File| match &table.find(me(), number(fd)).unwrap().object {
        super::super::Description::File(state) => state.tail_crc.is_some(),
        other => panic!("{other:?}"),
    };
    assert!(!vouched(&data) && vouched(&log) && !vouched(&read) && vouched(&large));
    let (.., residue) = take();
    assert_eq!(residue.pages(), 0);
    rustix::io::pwrite(&data, b"2", 5000).unwrap();
    let (.., residue) = take();
    assert_eq!(residue.pages(), 1);
    data.set_len(8193).unwrap();
    let (_, state, residue) = take();
    assert!(
        state.memories.is_empty() && residue.absent.len() == 2,
        "it is too large now"
    );
}

/// Files without a name are made again with their contents, from the bytes of the epoch.
#[test]
fn nameless_files_keep_contents_modes_and_seals() {
    use crate::resources::shared::{self, SharedState};
    use rustix::fs::{MemfdFlags, Mode, OFlags, SealFlags, fcntl_add_seals, fcntl_get_seals};
    use rustix::fs::{fchmod, memfd_create};
    use std::collections::BTreeMap;
    use std::os::unix::fs::FileExt;
    let _quiet = no_child_starts();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("x");
    let flags = OFlags::CREATE | OFlags::RDWR | OFlags::CLOEXEC;
    let deleted = rustix::fs::open(&path, flags, Mode::RWXU).unwrap();
    std::fs::remove_file(&path).unwrap();
    let plain = memfd_create("plain", MemfdFlags::CLOEXEC).unwrap();
    let sealable = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let sealed = memfd_create("a (deleted)", sealable).unwrap();
    let files = [&plain, &sealed, &deleted];
    for file in files {
        rustix::io::write(file, b"contents").unwrap();
        rustix::fs::ftruncate(file, 2_000_000).unwrap();
        rustix::io::pwrite(file, b"far", 1_500_000).unwrap();
        fchmod(file, Mode::RUSR).unwrap();
    }
    fcntl_add_seals(&sealed, SealFlags::WRITE | SealFlags::GROW).unwrap();
    let again = shared::reopen(&plain, OFlags::RDONLY).unwrap();
    let mut objects = SharedObjects::default();
    let numbers = [&plain, &sealed, &deleted, &again].map(number);
    let table = collect_shared(&numbers, &mut objects).unwrap().table;
    let root = crate::target::Target::open(me()).unwrap();
    let (state, residue) = objects.take(&[], &root, &BTreeMap::new()).unwrap();
    let state: SharedState = from_fdt(&to_fdt(&state).unwrap()).unwrap();
    assert_eq!(state.memories.len(), 3);
    let memories = shared::recreate(&state, &|_, _| panic!("refused")).unwrap();
    let pages = residue.buffer.chunks(4096);
    for (run, page) in residue.runs.iter().zip(pages) {
        let memory = &memories[&run.space().0];
        let length = page.len().min((memory.size - run.address()) as usize);
        let written = memory.file.write_all_at(&page[..length], run.address());
        written.unwrap();
    }
    let spaces: Vec<u32> = state.memories.iter().map(|m| m.space).collect();
    let request = CheckRequest {
        spaces: &spaces,
        ..request(FilesPolicy::Reconcile)
    };
    let mut checked = check_table(&table, &request).unwrap();
    let memories = std::rc::Rc::new(memories);
    checked.set_memories(memories.clone());
    let made = recreate_table(&table, checked).unwrap();
    shared::seal(&state, &memories).unwrap();
    for file in files {
        let copy = made_for(&made, number(file));
        assert_same(file, &copy);
        assert_eq!(fcntl_get_seals(&copy), fcntl_get_seals(file));
        let mode = |fd: &OwnedFd| rustix::fs::fstat(fd).unwrap().st_mode;
        assert_eq!(mode(&copy), mode(file));
        let mut out = vec![1; 2_000_001];
        assert_eq!(rustix::io::pread(&copy, &mut out, 0), Ok(2_000_000));
        assert!(out.starts_with(b"contents\0") && out[1_500_000..].starts_with(b"far\0"));
        assert_eq!(out.iter().filter(|&&b| b != 0).count(), 8 + 3 + 1);
    }
    for file in files {
        let link = |fd: &OwnedFd| std::fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd()));
        let copy = made_for(&made, number(file));
        assert_eq!(link(&copy).unwrap(), link(file).unwrap());
    }
    let copy = made_for(&made, number(&sealed));
    assert_eq!(rustix::io::pwrite(&copy, b"x", 0), Err(Errno::PERM));
    let (first, second) = (made_for(&made, numbers[0]), made_for(&made, numbers[3]));
    rustix::io::pwrite(&first, b"C", 0).unwrap();
    let mut seen = [0];
    rustix::io::pread(&second, &mut seen, 0).unwrap();
    assert_eq!(&seen, b"C", "what was one file is one file");
    let missing = check_table(&table, &self::request(FilesPolicy::Reconcile));
    assert!(matches!(missing, Err(ProcessError::Image(_))));
}
