//! Files that a restart opens again, and output that appears in a file exactly once: under crashes of the
//! heap's memory and of the file, together.
#![allow(clippy::unwrap_used, reason = "all of this is test code")]

mod common;

use common::{SimMemory, options, volatile};
use outlive_media::{Crashes, LineMemory};
use resilient_heap::memory::Memory;
use resilient_heap::{
    Durability, Error, FileMemory, Heap, Options, PFile, POutput, PVec, Persist, Sink,
};
use std::fs::{self, File};
use std::io::{self, Read, Seek, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::{Arc, Mutex};

#[derive(Persist)]
#[repr(C)]
struct Root<'h> {
    count: u64,
    outputs: PVec<'h, POutput<'h>>,
    files: PVec<'h, PFile<'h>>,
}

type Journal = Heap<Root<'static>>;

fn open(options: Options, memory: impl Memory + 'static) -> Result<Journal, Error> {
    options.open(memory, |_| {
        Ok(Root {
            count: 0,
            outputs: PVec::new(),
            files: PVec::new(),
        })
    })
}

fn in_file(path: &Path) -> Journal {
    open(options(), FileMemory::open(path).unwrap()).unwrap()
}

fn keep(heap: &mut Journal, path: &Path, file: &File) -> Result<(), Error> {
    heap.write(|root, tx| {
        let kept = PFile::new(tx, path, file)?;
        root.files.push(tx, kept)
    })
}

fn reopen(heap: &Journal) -> Result<File, Error> {
    heap.read(|root, s| root.files.get(s, 0)?.unwrap().reopen(s))
}

fn replaced<T>(found: Result<T, Error>) -> &'static str {
    match found {
        Err(Error::Replaced { why, .. }) => why,
        Err(other) => panic!("{other}"),
        Ok(_) => panic!("it was taken for the same file"),
    }
}

#[test]
fn a_file_goes_on_where_it_was_with_its_flags() {
    let dir = tempfile::tempdir().unwrap();
    let (path, heap_at) = (dir.path().join("file"), dir.path().join("heap"));
    fs::write(&path, "0123456789").unwrap();
    {
        let mut heap = in_file(&heap_at);
        let mut file = File::open(&path).unwrap();
        keep(&mut heap, &path, &file).unwrap();
        file.read_exact(&mut [0; 4]).unwrap();
        heap.write(|root, tx| root.files.get_mut(tx, 0)?.unwrap().record(tx, &file))
            .unwrap();
    }
    let mut heap = in_file(&heap_at);
    let mut file = reopen(&heap).unwrap();
    let mut rest = String::new();
    file.read_to_string(&mut rest).unwrap();
    assert_eq!(rest, "456789");
    assert!(file.write_all(b"x").is_err(), "it was opened for reading");

    // One that appends, and never cuts.
    let appending = File::options()
        .read(true)
        .append(true)
        .custom_flags(rustix::fs::OFlags::DSYNC.bits().cast_signed())
        .open(&path)
        .unwrap();
    heap.write(|root, tx| {
        let kept = root.files.get_mut(tx, 0)?.unwrap();
        kept.record(tx, &appending)
    })
    .unwrap();
    let mut file = reopen(&heap).unwrap();
    let flags = rustix::fs::fcntl_getfl(&file).unwrap();
    let wanted = rustix::fs::OFlags::APPEND | rustix::fs::OFlags::DSYNC;
    assert!(flags.contains(wanted) && !flags.contains(rustix::fs::OFlags::NONBLOCK));
    file.write_all(b"ab").unwrap();
    file.rewind().unwrap();
    let mut all = String::new();
    file.read_to_string(&mut all).unwrap();
    assert_eq!(all, "0123456789ab");
}

#[test]
fn a_file_in_its_place_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("file");
    let other = dir.path().join("other");
    let mut heap = in_file(&dir.path().join("heap"));
    fs::write(&path, "same").unwrap();
    fs::write(&other, "same").unwrap();
    let file = File::open(&path).unwrap();
    assert_eq!(
        replaced(keep(&mut heap, &other, &file)),
        "another file is there now"
    );
    assert_eq!(
        replaced(keep(
            &mut heap,
            dir.path(),
            &File::open(dir.path()).unwrap()
        )),
        "it is no regular file"
    );
    keep(&mut heap, &path, &file).unwrap();
    drop(file);
    drop(reopen(&heap).unwrap());

    fs::rename(&path, dir.path().join("moved")).unwrap();
    let gone = reopen(&heap).map(drop).unwrap_err();
    assert!(matches!(gone, Error::File { what: "stat", .. }), "{gone}");
    assert!(gone.to_string().contains("/file: stat failed"), "{gone}");
    fs::rename(&other, &path).unwrap();
    assert_eq!(replaced(reopen(&heap)), "another file is there now");
    fs::remove_file(&path).unwrap();
    std::os::unix::fs::symlink(dir.path().join("moved"), &path).unwrap();
    assert_eq!(replaced(reopen(&heap)), "it is no regular file");
    fs::remove_file(&path).unwrap();
    // A pipe would hold up whoever opens it.
    let kind = rustix::fs::FileType::Fifo;
    let mode = rustix::fs::Mode::RUSR;
    rustix::fs::mknodat(rustix::fs::CWD, &path, kind, mode, 0).unwrap();
    assert_eq!(replaced(reopen(&heap)), "it is no regular file");
    fs::remove_file(&path).unwrap();
    fs::rename(dir.path().join("moved"), &path).unwrap();
    drop(reopen(&heap).unwrap());

    // A new file that took over the inode of the old one is known by its birth.
    let inode = |path: &Path| std::os::unix::fs::MetadataExt::ino(&path.metadata().unwrap());
    let before = inode(&path);
    fs::remove_file(&path).unwrap();
    for attempt in 0..200 {
        let name = dir.path().join(format!("new {attempt}"));
        fs::write(&name, "same").unwrap();
        if inode(&name) == before || attempt == 199 {
            fs::rename(&name, &path).unwrap();
            break;
        }
    }
    assert_eq!(replaced(reopen(&heap)), "another file is there now");
}

fn output(heap: &mut Journal, path: &Path) -> Result<(), Error> {
    heap.write(|root, tx| {
        let output = POutput::new(tx, path)?;
        root.outputs.push(tx, output)
    })
}

/// Stages a line, and counts it.
fn say(heap: &mut Journal, text: &str) -> Result<(), Error> {
    heap.write(|root, tx| {
        root.count += 1;
        let output = root.outputs.get_mut(tx, 0)?.unwrap();
        output.append(tx, text.as_bytes())
    })
}

fn deliver(heap: &mut Journal, sink: &impl Sink) -> Result<u64, Error> {
    heap.deliver(sink, |root, tx| {
        root.outputs.get_mut(tx, 0)?.ok_or(Error::NotAHeap)
    })
}

#[test]
fn output_goes_on_behind_what_is_there_and_what_was_taken_back_never_appears() {
    let dir = tempfile::tempdir().unwrap();
    let (path, heap_at) = (dir.path().join("file"), dir.path().join("heap"));
    fs::write(&path, "before;").unwrap();
    let mut heap = in_file(&heap_at);
    output(&mut heap, &path).unwrap();
    say(&mut heap, "one;").unwrap();
    let failed: Result<(), Error> = heap.write(|root, tx| {
        let output = root.outputs.get_mut(tx, 0)?.unwrap();
        output.append(tx, b"never;")?;
        tx.abort("on purpose")
    });
    assert!(failed.is_err());
    assert_eq!(fs::read_to_string(&path).unwrap(), "before;");
    drop(heap);

    let mut heap = in_file(&heap_at);
    say(&mut heap, "two;").unwrap();
    let reopened = |heap: &Journal| {
        heap.read(|root, s| root.outputs.get(s, 0)?.unwrap().reopen(s))
            .unwrap()
    };
    let file = reopened(&heap);
    assert_eq!(deliver(&mut heap, &file), Ok(8));
    assert_eq!(deliver(&mut heap, &file), Ok(0));
    assert_eq!(fs::read_to_string(&path).unwrap(), "before;one;two;");
    let (staged, delivered) = heap
        .read(|root, s| {
            let output = root.outputs.get(s, 0)?.unwrap();
            Ok((output.staged(s)?, output.delivered()))
        })
        .unwrap();
    assert_eq!((staged, delivered), (0, 15));

    // Cut, or written to by somebody else.
    say(&mut heap, "three;").unwrap();
    file.set_len(14).unwrap();
    let why = replaced(deliver(&mut heap, &file));
    assert_eq!(why, "it is shorter than what was put into it");
    fs::write(&path, "before;one;two;and of somebody else").unwrap();
    let why = replaced(deliver(&mut heap, &file));
    assert_eq!(why, "somebody else wrote to it: it is too long");
    fs::write(&path, "before;one;two;").unwrap();
    assert_eq!(deliver(&mut heap, &file), Ok(6));
    assert_eq!(fs::read_to_string(&path).unwrap(), "before;one;two;three;");
    let mut other = in_file(&dir.path().join("other"));
    assert_eq!(
        replaced(output(&mut other, Path::new("/dev/null"))),
        "it is no regular file"
    );
}

/// A file of which a crash leaves any part of what was not synced.
#[derive(Clone, Default)]
struct Pages {
    durable: Vec<u8>,
    now: Vec<u8>,
    writes: Vec<(usize, Vec<u8>)>,
}

/// Writes bytes at an offset, with zeros before them where there was nothing.
fn put(bytes: &mut Vec<u8>, at: usize, new: &[u8]) {
    bytes.resize(bytes.len().max(at + new.len()), 0);
    bytes[at..at + new.len()].copy_from_slice(new);
}

impl Pages {
    /// All subsets of the pieces of what is not durable; with the length that it would have, and without.
    fn crashes(&self) -> Vec<Vec<u8>> {
        let pieces: Vec<(usize, &[u8])> = self
            .writes
            .iter()
            .flat_map(|(at, bytes)| {
                let size = bytes.len().div_ceil(3).max(1);
                let pieces = bytes.chunks(size).enumerate();
                pieces.map(move |(i, piece)| (at + i * size, piece))
            })
            .collect();
        let mut found = Vec::new();
        for chosen in 0..1u32 << pieces.len() {
            let mut bytes = self.durable.clone();
            for (i, (at, piece)) in pieces.iter().enumerate() {
                if chosen >> i & 1 == 1 {
                    put(&mut bytes, *at, piece);
                }
            }
            found.push(bytes.clone());
            bytes.resize(self.now.len(), 0);
            found.push(bytes);
        }
        found.sort();
        found.dedup();
        found
    }
}

/// What can go wrong on purpose.
#[derive(Clone, Copy, PartialEq)]
enum Planted {
    Nothing,
    /// The file is never made durable.
    NoSync,
    /// Output is written while its transaction can still be taken back.
    Early,
}

/// The file beside the memory: before each of its steps, both may crash.
struct SimFile {
    pages: Arc<Mutex<Pages>>,
    memory: Option<SimMemory>,
    planted: Planted,
}

impl SimFile {
    fn look(&self) {
        if let Some(memory) = &self.memory {
            memory.look();
        }
    }
}

impl Sink for SimFile {
    fn size(&self) -> io::Result<u64> {
        Ok(self.pages.lock().unwrap().now.len() as u64)
    }
    fn write_at(&self, bytes: &[u8], at: u64) -> io::Result<()> {
        self.look();
        let mut pages = self.pages.lock().unwrap();
        put(&mut pages.now, at as usize, bytes);
        pages.writes.push((at as usize, bytes.to_vec()));
        drop(pages);
        self.look();
        Ok(())
    }
    fn sync(&self) -> io::Result<()> {
        let mut pages = self.pages.lock().unwrap();
        if self.planted != Planted::NoSync {
            pages.durable = pages.now.clone();
            pages.writes.clear();
        }
        drop(pages);
        self.look();
        Ok(())
    }
}

const LINES: u64 = 5;

fn line(n: u64) -> String {
    format!("line {n}, and {}\n", "more ".repeat(n as usize))
}

fn lines(count: u64) -> Vec<u8> {
    (0..count).map(line).collect::<String>().into_bytes()
}

/// What is wrong after a crash, if anything. The steps that were acknowledged must be there, and those that
/// were begun may be.
fn judge(memory: &[u8], file: &[u8], acknowledged: u64, begun: u64) -> Option<String> {
    let mut heap = match open(options(), volatile(memory)) {
        Ok(heap) => heap,
        Err(error) => return Some(format!("cannot be opened: {error}")),
    };
    let count = heap.read(|root, _| Ok(root.count)).unwrap();
    if !(acknowledged..=begun).contains(&count) {
        return Some(format!("{count} of {acknowledged} to {begun} lines"));
    }
    let wanted = lines(count);
    if file.len() > wanted.len() {
        return Some("output of a transaction that is no more".to_owned());
    }
    let pages = Pages {
        durable: file.to_vec(),
        now: file.to_vec(),
        writes: Vec::new(),
    };
    let sink = SimFile {
        pages: Arc::new(Mutex::new(pages)),
        memory: None,
        planted: Planted::Nothing,
    };
    if let Err(error) = deliver(&mut heap, &sink) {
        return Some(format!("not delivered: {error}"));
    }
    let found = sink.pages.lock().unwrap().durable.clone();
    (found != wanted).then(|| format!("{:?}", String::from_utf8_lossy(&found)))
}

/// Runs, and looks at every crash of both; what was wrong first, and how many crashes there were.
fn run(durability: Durability, planted: Planted) -> (Option<String>, u64) {
    let dir = tempfile::tempdir().unwrap();
    let begun_from = {
        let memory = SimMemory::new(&[], None, None, None);
        let mut heap = open(options(), memory.clone()).unwrap();
        output(&mut heap, &dir.path().join("file")).unwrap();
        heap.close().unwrap();
        // SAFETY: the memory is readable as long as it is, and nobody writes now.
        #[allow(unsafe_code)]
        unsafe { std::slice::from_raw_parts(memory.base().as_ptr(), memory.len()) }.to_vec()
    };
    let pages = Arc::new(Mutex::new(Pages::default()));
    let steps = Arc::new(Mutex::new((0, 0)));
    let wrong = Arc::new(Mutex::new(None));
    let crashes = Arc::new(Mutex::new(0));
    let look = {
        let (pages, steps) = (Arc::clone(&pages), Arc::clone(&steps));
        let (wrong, crashes) = (Arc::clone(&wrong), Arc::clone(&crashes));
        move |memory: &LineMemory| {
            let files = pages.lock().unwrap().crashes();
            let (acknowledged, begun) = *steps.lock().unwrap();
            let how = Crashes {
                all: 4,
                pairs: 6,
                seeded: 12,
                seed: begun,
            };
            memory.crash_states(how, &mut |bytes| {
                let mut wrong = wrong.lock().unwrap();
                for file in &files {
                    *crashes.lock().unwrap() += 1;
                    *wrong = wrong
                        .take()
                        .or_else(|| judge(&bytes, file, acknowledged, begun));
                }
                wrong.is_none()
            });
        }
    };
    let memory = SimMemory::new(&begun_from, None, None, Some(Box::new(look)));
    let mut heap = open(options().durability(durability), memory.clone()).unwrap();
    let sink = SimFile {
        pages: Arc::clone(&pages),
        memory: Some(memory.clone()),
        planted,
    };
    for n in 0..LINES {
        steps.lock().unwrap().1 = n + 1;
        say(&mut heap, &line(n)).unwrap();
        if durability == Durability::Each {
            steps.lock().unwrap().0 = n + 1;
        }
        if n % 2 == 0 {
            if planted == Planted::Early {
                let at = pages.lock().unwrap().now.len();
                sink.write_at(&lines(n + 1)[at..], at as u64).unwrap();
            }
            deliver(&mut heap, &sink).unwrap();
            steps.lock().unwrap().0 = n + 1;
            memory.look();
        }
    }
    heap.close().unwrap();
    memory.look();
    if planted == Planted::Nothing {
        assert_eq!(pages.lock().unwrap().durable, lines(LINES));
    }
    (wrong.lock().unwrap().take(), *crashes.lock().unwrap())
}

#[test]
fn every_crash_of_memory_and_file_leaves_each_line_once() {
    for durability in [Durability::Each, Durability::Group(2), Durability::Barrier] {
        let (wrong, crashes) = run(durability, Planted::Nothing);
        assert_eq!(wrong, None, "{durability:?}");
        println!("{crashes} crashes, {durability:?}");
        assert!(crashes > 500, "{crashes}");
    }
}

#[test]
fn planted_file_that_is_never_durable() {
    assert!(run(Durability::Each, Planted::NoSync).0.is_some());
}

#[test]
fn planted_output_before_its_transaction_is_durable() {
    assert!(run(Durability::Barrier, Planted::Early).0.is_some());
}
