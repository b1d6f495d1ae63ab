//! An independent look at a process that stands still: everything that `/proc` and a few system
//! calls tell of it, read by code that shares nothing with the capture.
//!
//! # What may differ after a restore, and why
//! - Inode numbers of pipes, sockets and anonymous objects: the kernel gives new ones. What is the
//!   same object stays the same object: each is named after the lowest descriptor that has it.
//! - `mnt_id`, `eventfd-id`, and inodes in epoll's lists: numbers of the kernel's own, as above.
//! - `it_value` and `ticks` of a timerfd: time runs while it is looked at.
//! - A pending SIGALRM or signal 48: timers of the zoo may fire while it stands.
//! - Memory flags `uw` and `um` (registered for write tracking, by us), `sd` (new or changed, where the
//!   kernel has such a note) and `ac` (pages count as committed:
//!   memory that once was writable keeps the flag), `gu` (it may have guards: the flag spreads to
//!   mappings that were one with it; the guards themselves are compared).
//! - The mappings of working memory, and the contents of `[vvar]`, which change all the time.
//! - Blocked signals, registers and wait channels: the capture has calls made by the threads. The
//!   tests compare these with a look of their own while nobody else holds the program ([`crate::stand`]).
//! - What lies just below the red zone of a thread's stack: the time that is left of a call which
//!   is made again is written there, and becomes less. The kernel writes what is left of a sleep
//!   to the place that the program gave for it.
//! - The processor numbers in the restartable-sequences area, which the kernel writes.
//! - The order in which POSIX timers are listed: that in which they were made.
//! - Memory that processes share: it is a memory file afterwards, and bears another name.
//! - Who took a lock of an open file description: whoever restores. It is nobody's in particular.
//! - A one-shot watch of epoll that had fired: the kernel adds errors and hang-ups to it.
//! - `O_TMPFILE`, which has done its work.
//! - Watches of inotify, which are made as the last thing.
//! - Counters: faults, context switches, CPU time, resident pages, start time, the parent.
//! - In a PID namespace of its own: that, its mount namespace, and all numbers that it does not see
//!   itself. Threads and processes go by the numbers that they see.
//!
//! # Safety
//! `kcmp`, `sched_getattr`, `ioprio_get` and `get_robust_list` are called with numbers and
//! pointers to live local values.
#![allow(unsafe_code)]

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

const PAGE: u64 = 4096;
/// What is read at once, bytes.
const PIECE: u64 = 1 << 20;
/// Bit 58 of an entry of the page map, in its last byte.
const GUARD: u8 = 1 << 2;

/// A mapping; neighbours that the kernel may or may not have joined are one.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Area {
    start: u64,
    end: u64,
    /// Protection, device, inode and name.
    what: String,
    file: bool,
    offset: u64,
    flags: Vec<String>,
}

/// What was seen.
#[derive(Clone)]
pub struct View {
    areas: Vec<Area>,
    /// Every page that is not zero, by address; one that cannot be read is empty.
    pub pages: BTreeMap<u64, Vec<u8>>,
    facts: BTreeMap<String, String>,
}

impl View {
    /// Looks at a process, which must not run. `moving` are the places that
    /// may differ in the contents of memory.
    pub fn take(pid: u32, moving: &[(u64, u64)]) -> Self {
        let areas = areas(pid);
        let mut blanks = Vec::new();
        for rseq in tids(pid).into_iter().filter_map(rseq_of) {
            blanks.extend([(rseq, rseq + 8), (rseq + 20, rseq + 28)]);
        }
        blanks.extend(moving);
        let pages = pages(pid, &areas, &blanks);
        let mut facts = BTreeMap::new();
        process_facts(pid, &mut facts);
        descriptor_facts(pid, &mut facts);
        for tid in tids(pid) {
            thread_facts(pid, tid, &mut facts);
        }
        Self {
            areas: joined(areas),
            pages,
            facts,
        }
    }

    /// The same of a program that moves to another PID namespace.
    pub fn wherever(mut self) -> Self {
        for name in ["pid", "mnt"] {
            self.facts.remove(&format!("namespace {name}"));
        }
        self
    }

    /// Everything in which two looks differ.
    pub fn differences(&self, other: &Self) -> Vec<String> {
        let mut found = Vec::new();
        for area in self.areas.iter().filter(|a| !other.areas.contains(a)) {
            found.push(format!("before only: {area:x?}"));
        }
        for area in other.areas.iter().filter(|a| !self.areas.contains(a)) {
            found.push(format!("after only:  {area:x?}"));
        }
        for page in different(&self.pages, &other.pages) {
            found.push(format!(
                "page {page:x}{}",
                differing(self.pages.get(page), other.pages.get(page))
            ));
        }
        for key in different(&self.facts, &other.facts) {
            found.push(format!(
                "{key}:\n  {:?}\n  {:?}",
                self.facts.get(key),
                other.facts.get(key)
            ));
        }
        found
    }

    /// Takes places out of the comparison that became known later.
    pub fn blank(&mut self, places: &[(u64, u64)]) {
        for (&at, page) in self.pages.iter_mut().filter(|(_, page)| !page.is_empty()) {
            for &(start, end) in places {
                let within = |x: u64| (x.clamp(at, at + PAGE) - at) as usize;
                page[within(start)..within(end)].fill(0);
            }
        }
        self.pages
            .retain(|_, page| page.is_empty() || page.iter().any(|b| *b != 0));
    }

    /// Fails the test with everything in which the restored program differs.
    pub fn must_equal(&self, other: &Self) {
        let found = self.differences(other);
        let shown: Vec<&str> = found.iter().take(40).map(String::as_str).collect();
        assert!(
            found.is_empty(),
            "{} differences:\n{}",
            found.len(),
            shown.join("\n")
        );
    }

    /// How much was compared: areas, pages with contents, facts.
    pub fn extent(&self) -> (usize, usize, usize) {
        (self.areas.len(), self.pages.len(), self.facts.len())
    }
}

/// Where two pages differ, and the words there.
fn differing(a: Option<&Vec<u8>>, b: Option<&Vec<u8>>) -> String {
    let zero = vec![0; PAGE as usize];
    let (a, b) = (a.unwrap_or(&zero), b.unwrap_or(&zero));
    if a.is_empty() || b.is_empty() {
        return " can be read once only".into();
    }
    let words = a
        .chunks(8)
        .zip(b.chunks(8))
        .enumerate()
        .filter(|(_, (a, b))| a != b);
    words
        .take(8)
        .map(|(i, (a, b))| format!(" +{:x}: {a:02x?} then {b:02x?}", i * 8))
        .collect()
}

fn different<'a, K: Ord, V: PartialEq>(a: &'a BTreeMap<K, V>, b: &'a BTreeMap<K, V>) -> Vec<&'a K> {
    let mut keys: Vec<&K> = a
        .keys()
        .chain(b.keys())
        .filter(|k| a.get(k) != b.get(k))
        .collect();
    keys.sort();
    keys.dedup();
    keys
}

fn text(path: impl AsRef<Path>) -> String {
    std::fs::read(path).map_or_else(
        |e| e.to_string(),
        |b| String::from_utf8_lossy(&b).into_owned(),
    )
}

fn areas(pid: u32) -> Vec<Area> {
    let mut list: Vec<Area> = Vec::new();
    for line in text(format!("/proc/{pid}/smaps")).lines() {
        if let Some(codes) = line.strip_prefix("VmFlags:") {
            let kept = codes
                .split_whitespace()
                .filter(|c| !matches!(*c, "um" | "uw" | "ac" | "gu" | "sd"));
            list.last_mut().expect("flags follow a mapping").flags =
                kept.map(str::to_owned).collect();
        } else if line
            .as_bytes()
            .first()
            .is_some_and(|b| !b.is_ascii_uppercase())
        {
            list.push(area(line));
        }
    }
    without_working_memory(pid, &mut list);
    name_nameless(&mut list);
    list.retain(|a| !a.what.contains("[vsyscall]"));
    list
}

/// A file without a name has a new inode after a restore: it is named after the first area that
/// has it.
fn name_nameless(list: &mut [Area]) {
    let mut first: BTreeMap<String, u64> = BTreeMap::new();
    for area in list.iter_mut().filter(|a| a.what.ends_with("(deleted)")) {
        let words: Vec<&str> = area.what.splitn(4, ' ').collect();
        let file = words[1..3].join(" ");
        let known = *first.entry(file).or_insert(area.start);
        area.what = format!("{} nameless of {known:x} {}", words[0], words[3]);
    }
}

/// Working memory is one page of code with a stamp at its end, and the data behind it.
fn without_working_memory(pid: u32, list: &mut Vec<Area>) {
    use std::os::unix::fs::FileExt;
    let mem = std::fs::File::open(format!("/proc/{pid}/mem")).expect("memory");
    let code = list.iter().position(|a| {
        let mut stamp = [0u8; 16];
        a.end - a.start == 4096
            && a.what.starts_with("r-x")
            && mem.read_exact_at(&mut stamp, a.end - 16).is_ok()
            && &stamp == b"outlive-arena-v1"
    });
    if let Some(code) = code {
        list.drain(code..=code + 1);
    }
}

fn area(line: &str) -> Area {
    let words: Vec<&str> = line.split_whitespace().collect();
    let (start, end) = words[0].split_once('-').expect("a range");
    let hex = |digits| u64::from_str_radix(digits, 16).expect("hexadecimal digits");
    let shared = ["/dev/zero (deleted)", "/memfd:outlive-shared (deleted)"];
    let mut name = words[5..].join(" ");
    let mut inode = words[4];
    if words[1].ends_with('s') && shared.contains(&name.as_str()) {
        (name, inode) = ("shared memory".into(), "");
    }
    Area {
        start: hex(start),
        end: hex(end),
        what: format!("{} {} {inode} {name}", words[1], words[3]),
        file: words[4] != "0",
        offset: hex(words[2]),
        flags: Vec::new(),
    }
}

fn joined(areas: Vec<Area>) -> Vec<Area> {
    let mut list: Vec<Area> = Vec::new();
    for area in areas {
        match list.last_mut() {
            Some(last)
                if last.end == area.start
                    && last.what == area.what
                    && last.flags == area.flags
                    && (!area.file || last.offset + (last.end - last.start) == area.offset) =>
            {
                last.end = area.end;
            }
            _ => list.push(area),
        }
    }
    list
}

/// Where a thread that this one traces has its restartable-sequences area.
fn rseq_of(tid: u32) -> Option<u64> {
    const GET_RSEQ_CONFIGURATION: libc::c_uint = 0x420f;
    let mut answer = [0u64; 3];
    let at = answer.as_mut_ptr();
    // SAFETY: answer is live and as long as is said.
    let r = unsafe { libc::ptrace(GET_RSEQ_CONFIGURATION, tid as i32, size_of_val(&answer), at) };
    (r > 0 && answer[0] != 0).then_some(answer[0])
}

/// Blanks out what may differ.
fn blank(address: u64, page: &mut [u8], blanks: &[(u64, u64)]) {
    let end = address + PAGE;
    for &(from, to) in blanks.iter().filter(|b| b.0 < end && b.1 > address) {
        page[(from.max(address) - address) as usize..(to.min(end) - address) as usize].fill(0);
    }
}

fn pages(pid: u32, areas: &[Area], blanks: &[(u64, u64)]) -> BTreeMap<u64, Vec<u8>> {
    let open = |name| File::open(format!("/proc/{pid}/{name}")).expect("its memory");
    let (mem, map) = (open("mem"), open("pagemap"));
    let mut pages = BTreeMap::new();
    let mut bytes = vec![0u8; PIECE as usize];
    let mut entries = vec![0u8; (PIECE / PAGE * 8) as usize];
    // In memory or in swap. Where nothing is swapped, an entry that looks so marks a hole.
    let kept = if text("/proc/swaps").lines().count() > 1 {
        0xc0
    } else {
        0x80
    };
    for area in areas.iter().filter(|a| !a.what.contains("[vvar")) {
        let mut at = area.start;
        while at < area.end {
            let len = (area.end - at).min(PIECE);
            let entries = &mut entries[..(len / PAGE * 8) as usize];
            map.read_exact_at(entries, at / PAGE * 8)
                .expect("its page map");
            for i in (0..entries.len() / 8).filter(|i| entries[i * 8 + 7] & GUARD != 0) {
                pages.insert(at + i as u64 * PAGE, b"a guard ".repeat(PAGE as usize / 8));
            }
            // What is neither is zero, unless a file lies below, or the kernel's own code.
            let below = area.file || area.what.contains("[vdso]");
            let exists = |i: usize| below || entries[i * 8 + 7] & kept != 0;
            if (0..entries.len() / 8).any(exists) {
                read_piece(
                    &mem,
                    at,
                    &mut bytes[..len as usize],
                    &exists,
                    blanks,
                    &mut pages,
                );
            }
            at += len;
        }
    }
    pages
}

fn read_piece(
    mem: &File,
    at: u64,
    bytes: &mut [u8],
    exists: &dyn Fn(usize) -> bool,
    blanks: &[(u64, u64)],
    pages: &mut BTreeMap<u64, Vec<u8>>,
) {
    let (list, _) = bytes.as_chunks_mut::<{ PAGE as usize }>();
    for (i, page) in list.iter_mut().enumerate().filter(|(i, _)| exists(*i)) {
        let address = at + i as u64 * PAGE;
        let read = mem.read_exact_at(page, address);
        blank(address, page, blanks);
        match read {
            Ok(()) if *page == [0; PAGE as usize] => {}
            Ok(()) => drop(pages.insert(address, page.to_vec())),
            // Behind the end of a file, or a guard.
            Err(_) => drop(pages.insert(address, Vec::new())),
        }
    }
}

fn process_facts(pid: u32, facts: &mut BTreeMap<String, String>) {
    let here = format!("/proc/{pid}");
    for name in [
        "cmdline",
        "environ",
        "comm",
        "limits",
        "personality",
        "oom_score_adj",
        "coredump_filter",
        "cgroup",
        "uid_map",
        "loginuid",
    ] {
        facts.insert(name.into(), text(format!("{here}/{name}")));
    }
    let mut timers = text(format!("{here}/timers"));
    for tid in tids(pid) {
        for sort in ["pid", "tid"] {
            let from = format!("/{sort}.{tid}\n");
            timers = timers.replace(&from, &format!("/{sort}.inside {}\n", inside(tid)));
        }
    }
    let mut timers: Vec<&str> = timers.split("ID: ").collect();
    timers.sort_unstable();
    facts.insert("timers".into(), format!("{timers:?}"));
    let auxv = std::fs::read(format!("{here}/auxv")).expect("its auxiliary vector");
    facts.insert("auxv".into(), format!("{auxv:x?}"));
    for link in ["cwd", "root", "exe"] {
        let target = std::fs::read_link(format!("{here}/{link}")).expect("a link");
        facts.insert(link.into(), target.display().to_string());
    }
    for name in ["cgroup", "ipc", "mnt", "net", "pid", "user", "uts"] {
        let target = std::fs::read_link(format!("{here}/ns/{name}")).expect("a namespace");
        facts.insert(format!("namespace {name}"), target.display().to_string());
    }
    let stat = text(format!("{here}/stat"));
    let fields: Vec<&str> = stat
        .rsplit(')')
        .next()
        .unwrap_or_default()
        .split_whitespace()
        .collect();
    let names = [
        (5, "group"),
        (6, "session"),
        (7, "terminal"),
        (18, "priority"),
        (19, "nice"),
        (20, "threads"),
        (26, "start_code"),
        (27, "end_code"),
        (28, "start_stack"),
        (38, "exit_signal"),
        (40, "rt_priority"),
        (41, "policy"),
        (45, "start_data"),
        (46, "end_data"),
        (47, "start_brk"),
        (48, "arg_start"),
        (49, "arg_end"),
        (50, "env_start"),
        (51, "env_end"),
    ];
    for (number, name) in names {
        facts.insert(format!("stat {name}"), fields[number - 3].into());
    }
}

/// Of the status of a thread: what belongs to it and not to the moment.
const STATUS: [&str; 19] = [
    "Name",
    "Umask",
    "Uid",
    "Gid",
    "Groups",
    "NStgid",
    "NSpgid",
    "NSsid",
    "CoreDumping",
    "SigPnd",
    "ShdPnd",
    "SigIgn",
    "SigCgt",
    "CapInh",
    "CapPrm",
    "CapEff",
    "CapBnd",
    "CapAmb",
    "NoNewPrivs",
];
const STATUS_TOO: [&str; 6] = [
    "Seccomp",
    "Speculation_Store_Bypass",
    "Cpus_allowed",
    "Mems_allowed",
    "THP_enabled",
    "Threads",
];

/// The number that a thread sees itself.
fn inside(tid: u32) -> String {
    let status = text(format!("/proc/{tid}/status"));
    let line = status.lines().find_map(|l| l.strip_prefix("NSpid:"));
    let last = line.and_then(|l| l.split_whitespace().next_back());
    last.expect("its numbers").into()
}

fn thread_facts(pid: u32, tid: u32, facts: &mut BTreeMap<String, String>) {
    let inside = inside(tid);
    for line in text(format!("/proc/{pid}/task/{tid}/status")).lines() {
        let Some((key, value)) = line.split_once(':') else {
            continue;
        };
        if STATUS.contains(&key) || STATUS_TOO.contains(&key) {
            let value = match key {
                "SigPnd" | "ShdPnd" => without_alarm(value.trim()),
                // From outside inwards. Groups and sessions are not moved.
                "NStgid" => value.split_whitespace().next_back().unwrap_or("").into(),
                "NSpgid" | "NSsid" => value.split_whitespace().next().unwrap_or("").into(),
                _ => value.trim().into(),
            };
            facts.insert(format!("thread {inside} {key}"), value);
        }
    }
    let slack = text(format!("/proc/{tid}/timerslack_ns"));
    facts.insert(format!("thread {inside} timer slack"), slack);
    let mut attributes = [0u64; 7];
    let (mut head, mut length) = (0usize, 0usize);
    // SAFETY: attributes has 56 bytes; head and length are live.
    let answers = unsafe {
        let size = size_of_val(&attributes);
        [
            libc::syscall(
                libc::SYS_sched_getattr,
                tid,
                attributes.as_mut_ptr(),
                size,
                0,
            ),
            libc::syscall(libc::SYS_ioprio_get, 1, tid),
            libc::syscall(
                libc::SYS_get_robust_list,
                tid,
                &raw mut head,
                &raw mut length,
            ),
        ]
    };
    facts.insert(
        format!("thread {inside} asked"),
        format!("{answers:?} scheduling {attributes:x?} robust list {head:x} {length}"),
    );
}

/// A set of signals without those of timers.
fn without_alarm(set: &str) -> String {
    let set = u64::from_str_radix(set, 16).expect("a set of signals");
    format!("{:x}", set & !(1 << (libc::SIGALRM - 1)) & !(1 << 47))
}

pub fn tids(pid: u32) -> Vec<u32> {
    let dir = std::fs::read_dir(format!("/proc/{pid}/task")).expect("its threads");
    let mut tids: Vec<u32> = dir
        .flatten()
        .filter_map(|e| e.file_name().to_str()?.parse().ok())
        .collect();
    tids.sort_unstable();
    tids
}

fn descriptor_facts(pid: u32, facts: &mut BTreeMap<String, String>) {
    let dir = std::fs::read_dir(format!("/proc/{pid}/fd")).expect("its descriptors");
    let mut numbers: Vec<u32> = dir
        .flatten()
        .filter_map(|e| e.file_name().to_str()?.parse().ok())
        .collect();
    numbers.sort_unstable();
    let mut first: BTreeMap<String, u32> = BTreeMap::new();
    for &number in &numbers {
        let link = std::fs::read_link(format!("/proc/{pid}/fd/{number}")).expect("a link");
        let link = link.display().to_string();
        let link = match link.split_once(":[") {
            Some((kind, _)) => {
                let first = first.entry(link.clone()).or_insert(number);
                format!("{kind} of {first}")
            }
            None => link,
        };
        let same: Vec<u32> = numbers
            .iter()
            .copied()
            .filter(|&n| same_file(pid, number, n))
            .collect();
        let info = text(format!("/proc/{pid}/fdinfo/{number}"));
        facts.insert(
            format!("fd {number}"),
            format!("{link} same as {same:?}\n{}", stable(&info)),
        );
        if link.starts_with("socket") {
            facts.insert(format!("names of fd {number}"), unix_names(pid, number));
        }
    }
}

/// What a unix socket is called, and what it is connected to; nothing of other sockets.
fn unix_names(pid: u32, number: u32) -> String {
    use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};
    let process = Pid::from_raw(pid.cast_signed()).expect("a process");
    let process = pidfd_open(process, PidfdFlags::empty()).expect("a process");
    let number = number.cast_signed();
    let socket = pidfd_getfd(process, number, PidfdGetfdFlags::empty()).expect("a socket");
    if rustix::net::sockopt::socket_domain(&socket) != Ok(rustix::net::AddressFamily::UNIX) {
        return String::new();
    }
    let shown = |name| rustix::net::SocketAddrUnix::try_from(name).expect("a name");
    let own = rustix::net::getsockname(&socket).map(shown);
    let peer = rustix::net::getpeername(&socket).map(|name| name.map(shown));
    format!("{own:?} connected to {peer:?}")
}

/// The lines of an `fdinfo` that outlast a restore.
fn stable(info: &str) -> String {
    let mut lines: Vec<String> = info
        .lines()
        .filter(|l| {
            ![
                "ino:",
                "mnt_id:",
                "eventfd-id:",
                "it_value:",
                "ticks:",
                "inotify wd:",
            ]
            .iter()
            .any(|p| l.starts_with(p))
        })
        .map(|l| match l.strip_prefix("tfd:") {
            // tfd: N events: E data: D pos:P ino:I sdev:S
            Some(rest) => {
                let line = rest.split(" pos:").next().unwrap_or_default();
                line.replace("events: 40000018", "events: 40000000")
            }
            None if l.contains(": FLOCK ") => without_taker(l),
            None if l.starts_with("flags:") => without_tmpfile(l),
            None => l.to_owned(),
        })
        .collect();
    lines.sort();
    lines.join("\n")
}

/// `flags: …` in octal digits without `O_TMPFILE`.
fn without_tmpfile(line: &str) -> String {
    let flags = line.split_whitespace().nth(1).unwrap_or_default();
    let mut flags = i32::from_str_radix(flags, 8).expect("flags");
    if flags & libc::O_TMPFILE == libc::O_TMPFILE {
        flags &= !libc::O_TMPFILE;
    }
    format!("flags: {flags:o}")
}

/// `lock: N: FLOCK ADVISORY WRITE pid …` without the process.
fn without_taker(line: &str) -> String {
    let words: Vec<&str> = line.split_whitespace().collect();
    let kept = words.iter().enumerate().filter(|(i, _)| *i != 5);
    kept.map(|(_, word)| *word).collect::<Vec<_>>().join(" ")
}

fn same_file(pid: u32, a: u32, b: u32) -> bool {
    // SAFETY: only numbers are passed (KCMP_FILE is 0).
    unsafe { libc::syscall(libc::SYS_kcmp, pid, pid, 0, a, b) == 0 }
}
