//! The programs that are measured: this binary itself, started again with a hidden sub-command.
//!
//! A load listens on a TCP port of the loopback interface and does what it is told, one line at a
//! time. It holds memory of known size, writes to it when and as fast as it is asked to, and has as
//! many threads, mappings and descriptors as it is asked for.
//!
//! # Rules
//! - It has one thread (but for those asked for), no open file, and no connection while an epoch is
//!   taken: each request is a connection of its own, and what takes long is answered by a file.
//! - Its memory cannot be compressed and no page is equal to another.
//! - It ends when the process that measures is gone, also after a restore.

use outlive_keeper::KeeperError;
use outlive_linux::area::Area;
use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::fd::OwnedFd;
use rustix::process::{Pid, setsid, test_kill_process};
use rustix::time::Timespec;
use std::io::{BufRead, BufReader, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::thread::{Builder, JoinHandle};
use std::time::{Duration, Instant};

const PAGE: usize = 4096;
/// Pages of noise from which all others are made.
const NOISE: usize = 256;
/// How often it looks whether it is still wanted.
const LOOK: Duration = Duration::from_millis(500);
/// How often it writes its share while it writes at a rate.
const TURN: Duration = Duration::from_millis(2);
/// Bytes that it maps at a time while it allocates at a rate.
const PIECE: usize = 1 << 20;
/// Stacks of its threads, bytes.
const STACK: usize = 64 * 1024;

/// `outlive bench load`: hidden.
#[derive(Debug, clap::Args)]
pub struct LoadArgs {
    /// Where to write the port, and afterwards the results.
    #[arg(long)]
    place: PathBuf,
    /// The process that measures.
    #[arg(long)]
    wanted_by: i32,
    /// Say that it runs, and end.
    #[arg(long)]
    hello: bool,
}

/// What the load does by itself, without being asked again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Steady {
    /// Nothing.
    Idle,
    /// Writes so many pages a second.
    Writes(u64),
    /// Maps and fills so many bytes a second, up to a most, and then gives all back.
    Allocates(u64, usize),
}

struct Load {
    place: PathBuf,
    noise: Vec<u8>,
    areas: Vec<Area>,
    /// Mappings that are only there.
    others: Vec<Area>,
    allocated: Vec<Area>,
    descriptors: Vec<OwnedFd>,
    threads: Vec<JoinHandle<()>>,
    /// Where the next page is written.
    next: usize,
    stamp: u64,
    steady: Steady,
    since: Instant,
    done: u64,
}

/// Runs the load until it is told to end.
///
/// # Errors
/// What the operating system says.
pub fn run(args: &LoadArgs) -> Result<u8, KeeperError> {
    if args.hello {
        write_whole(&args.place, "hello")?;
        return Ok(0);
    }
    // A session of its own: no terminal, and no Ctrl-C but through the process that measures.
    let _ = setsid();
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))
        .map_err(KeeperError::io("listen on the loopback interface"))?;
    let port = listener
        .local_addr()
        .map_err(KeeperError::io("ask for the port"))?
        .port();
    let mut load = Load::new(args.place.clone());
    write_whole(&args.place, &port.to_string())?;
    let wanted_by = Pid::from_raw(args.wanted_by);
    let mut looked = Instant::now();
    loop {
        let wait = if load.steady == Steady::Idle {
            LOOK
        } else {
            TURN
        };
        if looked.elapsed() >= LOOK {
            looked = Instant::now();
            if wanted_by.is_some_and(|pid| test_kill_process(pid).is_err()) {
                return Ok(0);
            }
        }
        if arrived(&listener, wait)? {
            let answered = listener.accept().and_then(|(stream, _)| load.hear(stream));
            if answered.is_ok_and(|goes_on| !goes_on) {
                return Ok(0);
            }
        }
        load.turn().map_err(KeeperError::io("map memory"))?;
    }
}

/// Whether somebody connects within this time.
fn arrived(listener: &TcpListener, wait: Duration) -> Result<bool, KeeperError> {
    let timeout = Timespec {
        tv_sec: 0,
        tv_nsec: i64::from(wait.subsec_nanos()),
    };
    let mut set = [PollFd::new(listener, PollFlags::IN)];
    match poll(&mut set, Some(&timeout)) {
        Ok(n) => Ok(n > 0),
        Err(rustix::io::Errno::INTR) => Ok(false),
        Err(error) => Err(KeeperError::io("poll")(error)),
    }
}

/// Writes a file that is there whole or not at all.
fn write_whole(path: &Path, text: &str) -> Result<(), KeeperError> {
    let new = path.with_extension("new");
    std::fs::write(&new, text)
        .and_then(|()| std::fs::rename(&new, path))
        .map_err(KeeperError::io(format!("write {}", path.display())))
}

impl Load {
    fn new(place: PathBuf) -> Self {
        let mut state = 0x9e37_79b9_7f4a_7c15_u64 ^ u64::from(std::process::id());
        let mut noise = vec![0u8; NOISE * PAGE];
        for word in noise.chunks_exact_mut(8) {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            word.copy_from_slice(&state.to_ne_bytes());
        }
        Self {
            place,
            noise,
            areas: Vec::new(),
            others: Vec::new(),
            allocated: Vec::new(),
            descriptors: Vec::new(),
            threads: Vec::new(),
            next: 0,
            stamp: 0,
            steady: Steady::Idle,
            since: Instant::now(),
            done: 0,
        }
    }

    /// Does one request; whether the load goes on.
    fn hear(&mut self, mut stream: TcpStream) -> std::io::Result<bool> {
        let mut line = String::new();
        BufReader::new(stream.try_clone()?).read_line(&mut line)?;
        let words: Vec<&str> = line.split_whitespace().collect();
        let Some((&verb, rest)) = words.split_first() else {
            return Ok(true);
        };
        let numbers: Vec<u64> = rest.iter().filter_map(|w| w.parse().ok()).collect();
        let number = |at: usize| numbers.get(at).copied().unwrap_or(0);
        if verb == "cycle" {
            writeln!(stream, "0")?;
            drop(stream);
            let text = self.cycle(size(number(0)), number(1), number(2))?;
            write_whole(&self.place, &text).map_err(std::io::Error::other)?;
            return Ok(true);
        }
        let answer = match verb {
            "hold" => self.hold(size(number(0)), size(number(1)))?,
            "dirty" => self.dirty(number(0)),
            "fragment" => self.fragment(number(0)),
            "sum" => self.sum(),
            "writes" => self.begin(Steady::Writes(number(0))),
            "allocates" => self.begin(Steady::Allocates(number(0), size(number(1)))),
            "idle" => self.begin(Steady::Idle),
            "threads" => self.threads(number(0))?,
            "mappings" => self.mappings(number(0))?,
            "descriptors" => self.descriptors(number(0))?,
            "hello" => 1,
            "end" => 0,
            _ => return Err(std::io::Error::other("an unknown request")),
        };
        writeln!(stream, "{answer}")?;
        Ok(verb != "end")
    }

    /// Adds so many areas of so many bytes; gives all pages held.
    fn hold(&mut self, areas: usize, bytes: usize) -> std::io::Result<u64> {
        for _ in 0..areas {
            let mut area = Area::new(bytes)?;
            self.fill(area.bytes());
            self.areas.push(area);
        }
        Ok(pages(&self.areas))
    }

    fn fill(&mut self, bytes: &mut [u8]) {
        for page in bytes.chunks_mut(PAGE) {
            self.write(page);
        }
    }

    /// Gives a page new contents.
    fn write(&mut self, page: &mut [u8]) {
        self.stamp += 1;
        let at = usize::try_from(self.stamp).unwrap_or(0).wrapping_mul(7) % NOISE;
        page.copy_from_slice(&self.noise[at * PAGE..][..page.len()]);
        if let Some(word) = page.first_chunk_mut::<8>() {
            *word = self.stamp.to_ne_bytes();
        }
    }

    /// Writes so many pages, spread over all memory with even gaps.
    fn dirty(&mut self, count: u64) -> u64 {
        let all = size(pages(&self.areas));
        let count = size(count).min(all);
        let mut areas = std::mem::take(&mut self.areas);
        self.next = (self.next + 1) % all.max(1);
        let (mut at, mut before) = (0, 0);
        for nth in 0..count {
            // In order of addresses, so that the areas are walked through once.
            let page = nth * all / count + self.next * usize::from(count < all) % (all / count);
            while page >= before + areas[at].len() / PAGE {
                before += areas[at].len() / PAGE;
                at += 1;
            }
            let bytes = &mut areas[at].bytes()[(page - before) * PAGE..][..PAGE];
            self.write(bytes);
        }
        self.areas = areas;
        count as u64
    }

    /// Reads every page.
    fn sum(&mut self) -> u64 {
        let words = |area: &mut Area| {
            let pages = area.bytes().chunks(PAGE);
            let first = pages.filter_map(|page| page.first_chunk::<8>().copied());
            first.fold(0u64, |sum, word| sum.wrapping_add(u64::from_ne_bytes(word)))
        };
        let sums = self.areas.iter_mut().map(words);
        sums.fold(0, u64::wrapping_add)
    }

    fn begin(&mut self, steady: Steady) -> u64 {
        self.steady = steady;
        self.since = Instant::now();
        self.done = 0;
        0
    }

    /// Does what is due of what it does steadily.
    fn turn(&mut self) -> Result<(), outlive_linux::Errno> {
        let due = |rate: u64| {
            let due = self.since.elapsed().as_micros() * u128::from(rate) / 1_000_000;
            u64::try_from(due).unwrap_or(u64::MAX)
        };
        match self.steady {
            Steady::Idle => {}
            Steady::Writes(rate) => {
                // What was missed is not caught up at once.
                let share = due(rate).saturating_sub(self.done);
                self.done += share;
                self.dirty_next(share.min(rate / 20 + 1));
            }
            Steady::Allocates(rate, most) => {
                let due = due(rate);
                while self.done < due {
                    self.done += PIECE as u64;
                    if self.allocated.len() * PIECE >= most {
                        self.allocated.clear();
                    }
                    let mut area = Area::new(PIECE)?;
                    self.fill(area.bytes());
                    self.allocated.push(area);
                }
            }
        }
        Ok(())
    }

    /// Writes the next so many pages, in order of addresses.
    fn dirty_next(&mut self, count: u64) -> u64 {
        self.in_steps(count, 1)
    }

    /// Writes every second page of a zone that is twice as many pages long.
    fn fragment(&mut self, count: u64) -> u64 {
        self.in_steps(count, 2)
    }

    fn in_steps(&mut self, count: u64, step: usize) -> u64 {
        let mut areas = std::mem::take(&mut self.areas);
        let all = size(pages(&areas));
        let count = size(count).min(all / step);
        for _ in 0..count {
            let mut page = self.next % all;
            self.next = (page + step) % all;
            for area in &mut areas {
                let own = area.len() / PAGE;
                if page < own {
                    let bytes = &mut area.bytes()[page * PAGE..][..PAGE];
                    self.write(bytes);
                    break;
                }
                page -= own;
            }
        }
        self.areas = areas;
        count as u64
    }

    /// Maps, fills and unmaps so many bytes so many times, in so many passes; gives the time of
    /// each pass, microseconds.
    fn cycle(&mut self, bytes: usize, times: u64, passes: u64) -> std::io::Result<String> {
        let mut took = Vec::new();
        for _ in 0..passes {
            let began = Instant::now();
            for _ in 0..times {
                let mut area = Area::new(bytes)?;
                self.fill(area.bytes());
            }
            took.push(began.elapsed().as_micros().to_string());
        }
        Ok(took.join(" "))
    }

    fn threads(&mut self, count: u64) -> std::io::Result<u64> {
        for _ in 0..count {
            let sleeper = || loop {
                std::thread::park();
            };
            self.threads
                .push(Builder::new().stack_size(STACK).spawn(sleeper)?);
        }
        Ok(self.threads.len() as u64)
    }

    fn mappings(&mut self, count: u64) -> std::io::Result<u64> {
        for _ in 0..count {
            let mut area = Area::new(PAGE)?;
            self.fill(area.bytes());
            self.others.push(area);
        }
        Ok(self.others.len() as u64)
    }

    fn descriptors(&mut self, count: u64) -> std::io::Result<u64> {
        raise_limit();
        for nth in 0..count {
            if nth % 2 == 0 {
                let start = u32::try_from(nth).unwrap_or(0);
                self.descriptors
                    .push(eventfd(start, EventfdFlags::CLOEXEC)?);
            } else if let Some(last) = self.descriptors.last() {
                self.descriptors
                    .push(rustix::io::fcntl_dupfd_cloexec(last, 3)?);
            }
        }
        Ok(self.descriptors.len() as u64)
    }
}

/// Raises the number of descriptors that may be open as far as it goes.
fn raise_limit() {
    use rustix::process::{Resource, getrlimit, setrlimit};
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    let _ = setrlimit(Resource::Nofile, limit);
}

fn pages(areas: &[Area]) -> u64 {
    areas.iter().map(|area| (area.len() / PAGE) as u64).sum()
}

fn size(number: u64) -> usize {
    usize::try_from(number).unwrap_or(usize::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load(areas: usize, pages: usize) -> Load {
        let mut load = Load::new(PathBuf::from("/nowhere"));
        load.hold(areas, pages * PAGE).unwrap();
        load
    }

    /// Number of pages with new contents.
    fn changed(load: &mut Load, work: impl FnOnce(&mut Load)) -> usize {
        let words = |load: &mut Load| -> Vec<Vec<u8>> {
            let areas = load.areas.iter_mut();
            areas
                .flat_map(|a| {
                    a.bytes()
                        .chunks(PAGE)
                        .map(<[u8]>::to_vec)
                        .collect::<Vec<_>>()
                })
                .collect()
        };
        let before = words(load);
        work(load);
        let after = words(load);
        before.iter().zip(&after).filter(|(a, b)| a != b).count()
    }

    #[test]
    fn exactly_as_many_pages_are_written_as_asked_for() {
        for (areas, each) in [(1, 64), (7, 9), (64, 1)] {
            for count in [0, 1, 5, 63, 64, 1000] {
                let mut load = load(areas, each);
                let expected = count.min(areas * each);
                for _ in 0..3 {
                    let found = changed(&mut load, |l| {
                        assert_eq!(l.dirty(count as u64), expected as u64)
                    });
                    assert_eq!(found, expected, "{areas} areas of {each}, {count}");
                    let found = changed(&mut load, |l| {
                        l.dirty_next(count as u64);
                    });
                    assert_eq!(
                        found, expected,
                        "in a row: {areas} areas of {each}, {count}"
                    );
                }
            }
        }
    }

    #[test]
    fn no_page_is_like_another() {
        let mut load = load(3, 300);
        let mut seen = std::collections::BTreeSet::new();
        for area in &mut load.areas {
            for page in area.bytes().chunks(PAGE) {
                assert!(seen.insert(page.to_vec()));
            }
        }
        assert_eq!(seen.len(), 900);
    }

    #[test]
    fn a_cycle_tells_the_time_of_each_pass() {
        let text = load(0, 0).cycle(3 * PAGE, 2, 4).unwrap();
        assert_eq!(text.split(' ').count(), 4);
    }
}
