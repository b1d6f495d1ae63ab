//! Writes to files in all the ways there are, never asks for any of it to be made durable, and knows
//! what each of them must hold: `scribe FOLDER`.
//!
//! In each round it appends to a log, overwrites a piece of a file and of one that is mapped, writes
//! a file and closes it, and changes two databases (`sqlite3`, which is a program of its own; one
//! with a rollback journal, one with a write-ahead log, both with `synchronous=off`). Then it
//! reads all of it and compares; every few rounds a fresh `sqlite3`, which knows nothing but the
//! files, is asked too. It says `round N` for each round, and ends with 7 once there is a file
//! `FOLDER/end`.
//!
//! # Safety
//! The mapping is as long as the file, which nobody shortens, and nobody holds a reference into it.
#![allow(unsafe_code)]

use outlive_test_programs::{Random, check, fail, say};
use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::Duration;

/// Bytes of the mapped file.
const MAPPED: usize = 64 << 10;
/// The most bytes of the file that is overwritten.
const TABLE: u64 = 200_000;
/// Rows of a database.
const ROWS: u64 = 150;
/// Rounds from one look of a fresh `sqlite3` to the next.
const FRESH: u64 = 16;
/// How many of the closed files are looked at again.
const NOTES: u64 = 100;

fn must<T, E: std::fmt::Display>(what: &str, result: Result<T, E>) -> T {
    result.unwrap_or_else(|error| fail(&format!("{what}: {error}")))
}

/// Some bytes that tell where they were made.
fn line(round: u64, length: u64) -> Vec<u8> {
    let text = format!("{round:016}\n");
    text.bytes().cycle().take(length as usize).collect()
}

fn same(path: &Path, wanted: &[u8], round: u64) {
    let found = must("reading a file", fs::read(path));
    let differs = found.iter().zip(wanted).position(|(a, b)| a != b);
    check(found.len() == wanted.len() && differs.is_none(), || {
        format!(
            "{} has {} bytes and not {}, and differs at {differs:?} (round {round})",
            path.display(),
            found.len(),
            wanted.len()
        )
    });
}

/// A file with what it must hold.
struct Plain {
    path: PathBuf,
    file: File,
    holds: Vec<u8>,
}

impl Plain {
    fn new(path: PathBuf, append: bool) -> Self {
        let mut options = OpenOptions::new();
        options.read(true).create(true);
        let options = if append {
            options.append(true)
        } else {
            options.write(true)
        };
        let file = must("making a file", options.open(&path));
        Self {
            path,
            file,
            holds: Vec::new(),
        }
    }

    fn append(&mut self, round: u64, random: &mut Random) {
        let more = line(round, 1 + random.below(3000));
        must("appending", self.file.write_all(&more));
        self.holds.extend(more);
    }

    fn overwrite(&mut self, round: u64, random: &mut Random) {
        if random.below(20) == 0 {
            let shorter = random.below(TABLE);
            self.holds.truncate(shorter as usize);
            must("cutting", self.file.set_len(self.holds.len() as u64));
        }
        let at = random.below(self.holds.len() as u64 + 1) as usize;
        let most = (TABLE - at as u64).clamp(1, 20_000);
        let piece = line(round, 1 + random.below(most));
        must("overwriting", self.file.write_all_at(&piece, at as u64));
        let end = self.holds.len().max(at + piece.len());
        self.holds.resize(end, 0);
        self.holds[at..at + piece.len()].copy_from_slice(&piece);
    }
}

/// A file that is mapped.
struct Mapped {
    path: PathBuf,
    at: *mut u8,
    holds: Vec<u8>,
}

impl Mapped {
    fn new(path: PathBuf) -> Self {
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).truncate(false);
        let file = must("making a file", options.open(&path));
        must("its length", file.set_len(MAPPED as u64));
        let access = libc::PROT_READ | libc::PROT_WRITE;
        let (null, fd) = (std::ptr::null_mut(), file.as_raw_fd());
        // SAFETY: a fresh mapping of a file of this length.
        let at = unsafe { libc::mmap(null, MAPPED, access, libc::MAP_SHARED, fd, 0) };
        check(at != libc::MAP_FAILED, || "mmap failed".into());
        Self {
            path,
            at: at.cast(),
            holds: vec![0; MAPPED],
        }
    }

    fn write(&mut self, round: u64, random: &mut Random) {
        let at = random.below(MAPPED as u64 - 5000) as usize;
        let piece = line(round, 1 + random.below(5000));
        for (i, byte) in piece.iter().enumerate() {
            // SAFETY: at + i is below MAPPED.
            unsafe { self.at.add(at + i).write_volatile(*byte) };
        }
        self.holds[at..at + piece.len()].copy_from_slice(&piece);
    }
}

/// A database with what it must hold.
struct Book {
    path: PathBuf,
    child: Child,
    orders: ChildStdin,
    answers: BufReader<ChildStdout>,
    rows: BTreeMap<u64, u64>,
}

const ALL: &str = "select k, v, length(more) from t order by k;";

impl Book {
    fn new(path: PathBuf, journal: &str) -> Self {
        let mut command = Command::new("sqlite3");
        command
            .arg("-batch")
            .arg("-init")
            .arg("/dev/null")
            .arg(&path);
        let command = command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = must("starting sqlite3", command.spawn());
        let (Some(orders), Some(answers)) = (child.stdin.take(), child.stdout.take()) else {
            fail("sqlite3 has no pipes");
        };
        let answers = BufReader::new(answers);
        let mut book = Self {
            path,
            child,
            orders,
            answers,
            rows: BTreeMap::new(),
        };
        book.ask("pragma synchronous=off;");
        let mode = book.ask(&format!("pragma journal_mode={journal};"));
        check(mode.iter().any(|answer| answer == journal), || {
            format!("{mode:?}")
        });
        book.ask("pragma wal_autocheckpoint=30;");
        book.ask("create table t(k integer primary key, v integer, more text);");
        book
    }

    fn ask(&mut self, what: &str) -> Vec<String> {
        must(
            "asking sqlite3",
            writeln!(self.orders, "{what}\nselect 'end';"),
        );
        let mut said = Vec::new();
        loop {
            let mut text = String::new();
            let read = must("hearing sqlite3", self.answers.read_line(&mut text));
            check(read > 0, || format!("sqlite3 ended at {what}"));
            match text.trim_end() {
                "end" => return said,
                text => said.push(text.to_owned()),
            }
        }
    }

    fn change(&mut self, round: u64, random: &mut Random) {
        let mut order = "begin;".to_owned();
        for _ in 0..=random.below(4) {
            let key = random.below(ROWS);
            if random.below(4) == 0 {
                self.rows.remove(&key);
                order += &format!("delete from t where k={key};");
            } else {
                let value = round * 1000 + random.below(1000);
                self.rows.insert(key, value);
                order += &format!("replace into t values({key},{value},printf('%0300d',{value}));");
            }
        }
        self.ask(&(order + "commit;"));
    }

    fn wanted(&self) -> Vec<String> {
        let row = |(k, v): (&u64, &u64)| format!("{k}|{v}|300");
        self.rows.iter().map(row).collect()
    }

    fn compare(&self, found: &[String], who: &str, round: u64) {
        let wanted = self.wanted();
        let differs = found.iter().zip(&wanted).find(|(a, b)| a != b);
        check(found == wanted, || {
            let path = self.path.display();
            format!(
                "{path}, {who}, round {round}: {} rows, {differs:?}",
                found.len()
            )
        });
    }

    fn look(&mut self, round: u64) {
        let found = self.ask(ALL);
        self.compare(&found, "the sqlite3 that wrote it", round);
    }

    fn look_afresh(&self, round: u64) {
        let all = format!("pragma integrity_check; {ALL}");
        let mut command = Command::new("sqlite3");
        command.arg("-batch").arg("-init").arg("/dev/null");
        let command = command.arg(&self.path).arg(all).stdin(Stdio::null());
        let output = must("starting sqlite3", command.output());
        let text = String::from_utf8_lossy(&output.stdout);
        let mut lines = text.lines().map(str::to_owned);
        let (whole, error) = (lines.next(), String::from_utf8_lossy(&output.stderr));
        check(whole.as_deref() == Some("ok"), || {
            format!("{}: {whole:?} {error} (round {round})", self.path.display())
        });
        let found: Vec<String> = lines.collect();
        self.compare(&found, "a fresh sqlite3", round);
    }

    fn end(mut self) {
        drop(self.orders);
        let ended = must("waiting for sqlite3", self.child.wait());
        check(ended.success(), || format!("sqlite3: {ended}"));
    }
}

fn note(folder: &Path, number: u64) -> PathBuf {
    folder.join(format!("note.{number}"))
}

fn main() {
    let Some(folder) = std::env::args_os().nth(1).map(PathBuf::from) else {
        fail("usage: scribe FOLDER");
    };
    let mut random = Random::new(1);
    let mut log = Plain::new(folder.join("log"), true);
    let mut table = Plain::new(folder.join("table"), false);
    let mut mapped = Mapped::new(folder.join("mapped"));
    let mut books = [
        Book::new(folder.join("journal.db"), "delete"),
        Book::new(folder.join("wal.db"), "wal"),
    ];
    say("ready");
    for round in 0.. {
        log.append(round, &mut random);
        table.overwrite(round, &mut random);
        mapped.write(round, &mut random);
        must(
            "writing a note",
            fs::write(note(&folder, round), line(round, 100)),
        );
        for book in &mut books {
            book.change(round, &mut random);
            book.look(round);
        }
        same(&log.path, &log.holds, round);
        same(&table.path, &table.holds, round);
        same(&mapped.path, &mapped.holds, round);
        for number in round.saturating_sub(NOTES)..=round {
            same(&note(&folder, number), &line(number, 100), round);
        }
        let ending = folder.join("end").exists();
        if ending || round % FRESH == 0 {
            books.iter().for_each(|book| book.look_afresh(round));
        }
        say(&format!("round {round}"));
        if ending {
            books.into_iter().for_each(Book::end);
            std::process::exit(7);
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}
