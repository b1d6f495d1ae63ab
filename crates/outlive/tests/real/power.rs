//! Power events: what is durable is compared with the frozen program itself, the program goes on
//! when the mains are back, and a thread that cannot be stopped does not hold up the rest.

use crate::support::{
    Place, alone, installed, lives, make_fifo, may_run, reap, signal, times, until,
};
use outlive_epoch::{Content, EpochReader, PAGE_SIZE};
use outlive_keeper::images::Image;
use rustix::process::Signal;
use serde_json::Value;
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::process::Child;

/// Writes to a part of its memory all the time, and appends to a file.
const WRITER: &str = r#"
import os
memory = bytearray(32 << 20)
out = os.open("rounds", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
n = 0
while True:
    n += 1
    at = n * 7919 % 30 << 20
    for page in range(at, at + (1 << 20), 4096):
        memory[page:page + 8] = n.to_bytes(8, "little")
    os.write(out, b"%d\n" % n)
"#;

fn pid_of(place: &Place) -> u32 {
    u32::try_from(place.status("a")["pid"].as_u64().unwrap()).unwrap()
}

/// Whether every thread is held by a tracer.
fn stands(pid: u32) -> bool {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    status.lines().any(|line| line.starts_with("State:\tt"))
}

/// The pages of an epoch, all in one address space.
fn pages(place: &Place) -> (u64, BTreeMap<u64, Vec<u8>>) {
    let image = Image::open(&place.store().join("a/epochs")).unwrap();
    let reader = image.epoch(None).unwrap();
    let mut pages = BTreeMap::new();
    reader
        .pages(&mut |run, content| {
            for n in 0..run.count() {
                let from = usize::try_from(n).unwrap() * PAGE_SIZE;
                let bytes = match content {
                    Content::Bytes(bytes) => bytes[from..from + PAGE_SIZE].to_vec(),
                    Content::Zero => vec![0; PAGE_SIZE],
                };
                pages.insert(run.first() + n, bytes);
            }
            Ok(())
        })
        .unwrap();
    (EpochReader::id(&*reader).0, pages)
}

/// Compares the newest epoch with the memory of the frozen program: what the epoch has is there, and
/// what is there is in the epoch, but for the working memory that lies in it while it is kept.
fn compare(place: &Place, pid: u32) -> u64 {
    let (epoch, pages) = pages(place);
    let mem = File::open(format!("/proc/{pid}/mem")).unwrap();
    let mut page = vec![0; PAGE_SIZE];
    for (index, bytes) in &pages {
        mem.read_exact_at(&mut page, index * PAGE_SIZE as u64)
            .unwrap();
        assert!(
            page == *bytes,
            "page {index:x} of epoch {epoch} is not the program's"
        );
    }
    let maps = fs::read_to_string(format!("/proc/{pid}/maps")).unwrap();
    let mut missing = BTreeMap::new();
    for line in maps.lines() {
        let fields: Vec<&str> = line.split_ascii_whitespace().collect();
        if fields[1] != "rw-p" || fields[4] != "0" {
            continue;
        }
        let (start, end) = fields[0].split_once('-').unwrap();
        let number = |text| u64::from_str_radix(text, 16).unwrap();
        for at in (number(start)..number(end)).step_by(PAGE_SIZE) {
            mem.read_exact_at(&mut page, at).unwrap();
            let there = page.iter().any(|b| *b != 0);
            if there && !pages.contains_key(&(at / PAGE_SIZE as u64)) {
                *missing.entry(fields[0].to_owned()).or_insert(0u64) += 1;
            }
        }
    }
    assert!(missing.len() <= 1, "memory is missing: {missing:?}");
    assert!(missing.values().all(|pages| *pages < 64), "{missing:?}");
    assert!(pages.len() > 1000);
    epoch
}

fn event(place: &Place, words: &[&str]) -> Child {
    let mut all = vec!["power", "simulate", "a", "--json"];
    all.extend(words);
    let mut command = place.command(&all);
    command.stdout(std::process::Stdio::piped());
    command.spawn().unwrap()
}

fn rounds(place: &Place) -> usize {
    let text = fs::read_to_string(place.path("rounds")).unwrap_or_default();
    text.lines().count()
}

#[test]
fn at_an_event_all_of_the_frozen_program_is_on_the_medium_and_it_goes_on() {
    if !may_run("at_an_event_all_of_the_frozen_program_is_on_the_medium_and_it_goes_on") {
        return;
    }
    let (_alone, place) = (alone(), Place::new());
    let python = installed("python3");
    let words = [
        "run",
        "--name",
        "a",
        "--every",
        "50ms",
        "--hold-up",
        "30s",
        "--",
        &python,
        "-I",
        "-S",
        "-c",
        WRITER,
    ];
    let mut kept = place.start(&words);
    place.epoch_after("a", 0);
    let pid = pid_of(&place);
    for round in 0..times(4, 50) {
        let event = event(&place, &["--mains-back-after", "20s"]);
        until("all is durable", || place.status("a")["state"] == "frozen");
        assert!(stands(pid));
        let epoch = compare(&place, pid);
        assert!(stands(pid), "it stood still meanwhile");
        let standing = rounds(&place);
        place.call(&["power", "back", "a"]).succeeds();
        let output = event.wait_with_output().unwrap();
        let report: Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!(report["epoch"], epoch, "round {round}: {report}");
        assert_eq!(report["state"], "running", "{report}");
        assert_eq!(report["power"]["went_on"], true, "{report}");
        assert!(report["power"]["event_us"].as_u64().unwrap() > 0);
        until("it goes on", || rounds(&place) > standing);
    }
    let status = place.status("a");
    assert_eq!(status["power_events"]["count"], times(4, 50), "{status}");
    assert_eq!(status["hold_up"]["budget_us"], 30_000_000, "{status}");
    // A budget that is over ends the program; this one would take half a minute.
    place.call(&["stop", "a"]).succeeds();
    kept.code();
}

#[test]
fn strictly_no_more_is_written_than_the_budget_allows() {
    if !may_run("strictly_no_more_is_written_than_the_budget_allows") {
        return;
    }
    let (_alone, place) = (alone(), Place::new());
    let python = installed("python3");
    // More than may be unsaved.
    let large = WRITER
        .replace("32 << 20", "320 << 20")
        .replace("% 30", "% 318");
    let words = [
        "run",
        "--name",
        "a",
        "--every",
        "1h",
        "--hold-up",
        "2s",
        "--strict",
        "--",
        &python,
        "-I",
        "-S",
        "-c",
        &large,
    ];
    let mut kept = place.start(&words);
    until("it writes", || rounds(&place) > 0);
    place.call(&["checkpoint", "a"]).succeeds();
    assert_eq!(place.status("a")["strategy"], "cow");
    let (mut known, mut most) = (0, 0);
    for round in 0..times(12, 300) {
        let budget = place.status("a")["hold_up"].clone();
        let bytes = |field: &str| budget[field].as_u64();
        // Where the medium has become too slow for the budget, there is no limit, and it is counted.
        let Some(limit) = bytes("limit_bytes") else {
            continue;
        };
        let dirty = bytes("dirty_bytes").unwrap();
        // A limit that was lowered a moment ago was not in force when the pages were written.
        most = limit.max(most);
        assert!(dirty <= most, "{dirty} of {most}: {budget}");
        known += 1;
        if round % 4 == 0 {
            let words = [
                "power",
                "simulate",
                "a",
                "--mains-back-after",
                "1ms",
                "--json",
            ];
            let report = place.call(&words).json();
            let late = report["power"]["event_us"].as_u64().unwrap() > 2_000_000;
            let counted = place.status("a")["power_events"]["late"] != 0;
            assert!(!late || counted, "{report}");
        }
    }
    assert!(known > 0);
    let before = rounds(&place);
    until("it goes on", || rounds(&place) > before);
    let epochs = place.newest("a");
    until("further epochs are taken", || place.newest("a") > epochs);
    place.call(&["stop", "a"]).succeeds();
    kept.code();
}

/// Maps, unmaps, grows its heap and touches holes and a private file mapping as fast as it goes.
const MAPPER: &str = r#"
import mmap, os
fd = os.open("below", os.O_RDWR | os.O_CREAT, 0o600)
os.ftruncate(fd, 64 << 12)
anon = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
holes = mmap.mmap(-1, 1 << 30, flags=anon)
above = mmap.mmap(fd, 64 << 12, flags=mmap.MAP_PRIVATE)
held, heap, n = [], [], 0
while True:
    n += 1
    new = mmap.mmap(-1, 1 << 20, flags=anon)
    for at in range(0, 1 << 20, 4096):
        new[at] = n & 255
    held.append(new)
    if len(held) > 8:
        held.pop(0).close()
    heap.append(bytearray(50000))
    if len(heap) > 300:
        heap.clear()
    for i in range(100):
        holes[(n * 7919 + i * 104729) % (1 << 18) << 12] = n & 255
        above[(n + i) % 64 << 12] = n & 255
    if n % 50 == 0:
        holes.madvise(mmap.MADV_DONTNEED, 0, 1 << 29)
    if n % 20 == 0:
        print(n, file=open("turns", "w"))
"#;

/// What is unsaved is compared with the program itself, at an event: all that differs from the epoch
/// before it.
#[test]
fn strictly_all_that_is_unsaved_is_known_whatever_is_mapped() {
    if !may_run("strictly_all_that_is_unsaved_is_known_whatever_is_mapped") {
        return;
    }
    let (_alone, place) = (alone(), Place::new());
    let python = installed("python3");
    let words = [
        "run",
        "--name",
        "a",
        "--every",
        "1h",
        "--hold-up",
        "20s",
        "--strict",
        "--",
        &python,
        "-I",
        "-S",
        "-c",
        MAPPER,
    ];
    let mut kept = place.start(&words);
    let turns = || fs::read_to_string(place.path("turns")).unwrap_or_default();
    until("it runs", || !turns().is_empty());
    for _ in 0..times(3, 100) {
        // Memory that is given back before it was copied costs an epoch, and not who asks for one.
        place.call(&["checkpoint", "a"]).succeeds();
        let (_, before) = pages(&place);
        let then = turns();
        until("it goes on", || turns() != then);
        let status = place.status("a")["hold_up"].clone();
        let event = event(&place, &["--mains-back-after", "15s"]);
        until("all is durable", || place.status("a")["state"] == "frozen");
        let (_, now) = pages(&place);
        let differs = |(at, page): &(&u64, &Vec<u8>)| before.get(at) != Some(page);
        let unsaved = now.iter().filter(differs).count() * PAGE_SIZE;
        place.call(&["power", "back", "a"]).succeeds();
        event.wait_with_output().unwrap();
        let after = place.status("a")["hold_up"].clone();
        let limit = status["limit_bytes"].as_u64();
        let fits = limit.is_some_and(|limit| unsaved as u64 <= limit);
        let counted = after["violations"] != 0;
        assert!(fits || counted, "{unsaved} bytes: {status}, then {after}");
        assert!(unsaved > 1 << 20, "it wrote little: {unsaved}");
        assert!(
            status["exposed_bytes"].as_u64().unwrap() >= 64 << 12,
            "{status}"
        );
    }
    place.call(&["stop", "a"]).succeeds();
    kept.code();
}

#[test]
fn strictness_that_cannot_be_kept_is_refused_with_the_figures() {
    if !may_run("strictness_that_cannot_be_kept_is_refused_with_the_figures") {
        return;
    }
    let (_alone, place) = (alone(), Place::new());
    let script = "import mmap, os, time\n\
                  fd = os.open('big', os.O_RDWR | os.O_CREAT, 0o600)\n\
                  os.ftruncate(fd, 1 << 40)\n\
                  m = mmap.mmap(fd, 1 << 40, flags=mmap.MAP_PRIVATE | 0x4000)\n\
                  print('ready', flush=True)\n\
                  time.sleep(1000)\n";
    let python = installed("python3");
    let mut command = std::process::Command::new(python);
    command.args(["-I", "-S", "-c", script]);
    command.current_dir(place.path("."));
    command.stdin(std::process::Stdio::null());
    command.stdout(std::process::Stdio::piped());
    let mut child = command.spawn().unwrap();
    let mut line = String::new();
    let mut out = std::io::BufReader::new(child.stdout.take().unwrap());
    std::io::BufRead::read_line(&mut out, &mut line).unwrap();
    assert_eq!(line, "ready\n");
    let pid = child.id().to_string();
    let words = [
        "attach",
        "--pid",
        &pid,
        "--name",
        "b",
        "--hold-up",
        "10s",
        "--strict",
    ];
    let refused = place.call(&words);
    refused.fails(3, &["--strict", "guarded by nobody", "--hold-up", &pid]);
    let smaps = fs::read_to_string(format!("/proc/{pid}/smaps")).unwrap();
    let flags = smaps.lines().filter(|l| l.starts_with("VmFlags:"));
    let registered = flags.filter(|l| l.contains(" um") || l.contains(" uw"));
    assert_eq!(registered.count(), 0, "a trace was left");
    child.kill().unwrap();
    child.wait().unwrap();
}

#[test]
fn a_thread_that_cannot_be_stopped_meets_the_deadline_and_the_last_epoch_counts() {
    if !may_run("a_thread_that_cannot_be_stopped_meets_the_deadline_and_the_last_epoch_counts") {
        return;
    }
    let (_alone, place) = (alone(), Place::new());
    make_fifo(&place.path("gate"));
    // Until the gate opens, the parent sleeps without hearing of anything (vfork).
    let script = r#"
import os, sys
print("ready", flush=True)
sys.stdin.readline()
gate = [(os.POSIX_SPAWN_OPEN, 9, "gate", os.O_RDONLY, 0)]
os.waitpid(os.posix_spawn("/bin/true", ["true"], {}, file_actions=gate), 0)
print("on", flush=True)
sys.stdin.readline()
"#;
    let python = installed("python3");
    make_fifo(&place.path("in"));
    let line = format!("exec {python} -I -S -c '{script}' < in");
    let words = [
        "run",
        "--name",
        "a",
        "--every",
        "1h",
        "--hold-up",
        "2s",
        "--",
        "sh",
        "-c",
        &line,
    ];
    let mut kept = place.start(&words);
    let mut stdin = fs::OpenOptions::new()
        .write(true)
        .open(place.path("in"))
        .unwrap();
    assert_eq!(kept.line(), "ready");
    place.call(&["checkpoint", "a"]).succeeds();
    let pid = pid_of(&place);
    std::io::Write::write_all(&mut stdin, b"\n").unwrap();
    until("the parent waits for its child's program", || {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
        stat.rsplit(')')
            .next()
            .unwrap()
            .trim_start()
            .starts_with('D')
    });
    let failed = place.call(&["power", "simulate", "a"]);
    failed.fails(1, &["epoch 1 is what would come back", "vfork"]);
    assert!(lives(pid));
    let status = place.status("a");
    assert_eq!(status["power_events"]["late"], 1, "{status}");
    drop(
        fs::OpenOptions::new()
            .write(true)
            .open(place.path("gate"))
            .unwrap(),
    );
    assert_eq!(kept.line(), "on");
    let report = place.call(&[
        "power",
        "simulate",
        "a",
        "--mains-back-after",
        "1ms",
        "--json",
    ]);
    report.succeeds();
    assert_eq!(report.json()["state"], "running");
    place.call(&["stop", "a"]).succeeds();
    kept.code();
}

#[test]
fn a_subject_whose_keeper_died_is_kept_again_as_it_was() {
    if !may_run("a_subject_whose_keeper_died_is_kept_again_as_it_was") {
        return;
    }
    let (_alone, place) = (alone(), Place::new());
    let words = [
        "run",
        "--name",
        "a",
        "--every",
        "30ms",
        "--hold-up",
        "40s",
        "--max-wear",
        "80TB",
        "--",
        "sleep",
        "1000",
    ];
    let mut kept = place.start(&words);
    let before = place.epoch_after("a", 0);
    let pid = pid_of(&place);
    place
        .call(&["attach", "b"])
        .fails(1, &["no subject named b"]);
    kept.kill();
    let status = place.status("a");
    assert_eq!(status["state"], "not kept");
    assert!(status["untracked_since"].is_string(), "{status}");
    // The program is still in the group of its first keeper, which is not to be ended.
    std::mem::forget(kept);
    let by_pid = pid.to_string();
    for words in [vec!["attach", "a"], vec!["attach", "--pid", &by_pid]] {
        let mut again = place.start(&words);
        until("it is kept again", || {
            place.status("a")["state"] == "running"
        });
        place.epoch_after("a", before);
        let status = place.status("a");
        assert_eq!(status["pid"], pid);
        if words.len() == 2 {
            assert_eq!(status["every_us"], 30_000, "{status}");
            assert_eq!(status["hold_up"]["budget_us"], 40_000_000, "{status}");
            assert_eq!(status["max_wear"], 80_000_000_000_000_u64, "{status}");
        }
        signal(again.pid(), Signal::INT);
        assert_eq!(again.code(), 0);
        assert!(lives(pid));
    }
    signal(pid, Signal::KILL);
    until("it is gone", || reap(pid).is_some());
    place
        .call(&["attach", "a"])
        .fails(3, &["outlive restore a"]);
}

#[test]
fn a_budget_below_the_floor_is_refused_with_the_floor() {
    let place = Place::new();
    let words = ["run", "--name", "a", "--hold-up", "1us", "--", "true"];
    place
        .call(&words)
        .fails(3, &["cannot be kept here", "--hold-up", "flushes"]);
    assert!(place.names("store/a").is_empty(), "nothing was made");
    let report = place.call(&["power", "budget", "--json"]).json();
    let floor = report["floor_us"].as_u64().unwrap();
    assert!(floor > 0);
    let budgets = report["budgets"].as_array().unwrap();
    assert_eq!(budgets.len(), 4, "{report}");
    for budget in budgets {
        let fits = budget["hold_up_us"].as_u64().unwrap() > floor;
        assert_eq!(budget["allowed_bytes"].is_u64(), fits, "{budget}");
    }
    let small = ["power", "budget", "--hold-up", "1us"];
    place.call(&small).fails(3, &["cannot be kept here"]);
}
