//! `cargo xtask bench strategies`: the strategies side by side, on a writer that checks itself and on
//! a Redis.
//!
//! # How it is measured
//! - One strategy after the other in one run, each with a program of its own, freshly filled; next to
//!   each the same program untracked, which its speed is compared with.
//! - The first epochs, in which everything is new, are counted apart.
//! - A writer that finds anything wrong with its memory ends, which fails the run.

use super::redis::requests_per_second;
use crate::{
    cleanup, demo,
    demo::writer,
    model::Journal,
    outlive::{Epoch, Outlive, Running},
    redis::Place,
    stats, tools, workspace,
};
use anyhow::{Context, Result, bail, ensure};
use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

/// How often epochs are taken.
const EVERY: &str = "100ms";
/// How long anything may take that must happen.
const PATIENCE: Duration = Duration::from_secs(60);
/// How often the history is looked at: old epochs leave it.
const LOOK: Duration = Duration::from_millis(500);

/// What is compared: name, and the flags that give it.
const WAYS: [(&str, &[&str]); 7] = [
    ("copy", &["--strategy", "copy"]),
    ("incremental", &["--strategy", "incremental"]),
    (
        "incremental, units of 16",
        &["--strategy", "incremental", "--granularity", "16"],
    ),
    ("redundant", &["--strategy", "redundant"]),
    (
        "redundant, units of 16",
        &["--strategy", "redundant", "--granularity", "16"],
    ),
    ("cow", &["--strategy", "cow"]),
    (
        "cow, units of 16",
        &["--strategy", "cow", "--granularity", "16"],
    ),
];

/// What can be chosen.
#[derive(clap::Args, Clone, Debug)]
pub struct Options {
    /// Seconds for which the writer is measured.
    #[arg(long, default_value_t = 15, value_parser = clap::value_parser!(u64).range(1..))]
    seconds: u64,
    /// Memory of the writer, MB.
    #[arg(long, default_value_t = 256)]
    memory: u64,
    /// What the writer writes, MB a second.
    #[arg(long, default_value_t = 80)]
    rate: u64,
    /// How many keys of 400 bytes the Redis has; 0 leaves it out.
    #[arg(long, default_value_t = 400_000)]
    keys: u32,
    /// How many SET requests a run makes.
    #[arg(long, default_value_t = 500_000)]
    requests: u32,
    /// An `outlive` binary to use instead of building one.
    #[arg(long, value_name = "PATH")]
    outlive: Option<PathBuf>,
}

/// One way, measured on one program.
struct Measured {
    way: String,
    epochs: Vec<Epoch>,
    committed: u64,
    failed: u64,
    /// What the program did a second, and what it did untracked.
    speed: f64,
    untracked: f64,
    /// Largest memory of the keeper, and the page tables of the program, bytes.
    keeper: u64,
    tables: u64,
}

struct Bench {
    options: Options,
    outlive: Outlive,
    writer: PathBuf,
    folder: PathBuf,
}

/// Runs the command.
pub fn run(options: &Options) -> Result<()> {
    if !tools::is_root() {
        bail!("the strategy cow takes privilege: run this as root");
    }
    tools::ensure(&["redis-server", "redis-benchmark"])?;
    let binary = match &options.outlive {
        Some(path) => path
            .canonicalize()
            .with_context(|| format!("no {}", path.display()))?,
        None => workspace::build_outlive()?,
    };
    let built = workspace::cargo()
        .args(["build", "--release", "-p", "outlive-test-programs"])
        .args(["--bin", "crowd"])
        .status()
        .context("cannot start cargo")?;
    ensure!(built.success(), "the writer does not build: {built}");
    let scratch = workspace::scratch()?;
    workspace::need_space(&scratch, 6_000_000_000)?;
    let folder = cleanup::folder(&scratch)?;
    let store = folder.join("store");
    fs::create_dir(&store).context("cannot make the store's folder")?;
    let bench = Bench {
        options: options.clone(),
        outlive: Outlive { binary, store },
        writer: workspace::target().join("release/crowd"),
        folder,
    };
    let (rate, memory) = (options.rate, options.memory);
    let of_writer = bench.all("writer", Bench::of_writer)?;
    println!("\n### A writer of {rate} MB/s in {memory} MB; speed in pages a second\n");
    print(&of_writer);
    if options.keys > 0 {
        let of_redis = bench.all("redis", Bench::of_redis)?;
        println!("\n### A Redis under SET load; speed in SET a second\n");
        print(&of_redis);
    }
    println!("\nAn epoch every {EVERY}. {}", super::machine());
    Ok(())
}

impl Bench {
    fn all(
        &self,
        what: &str,
        measure: impl Fn(&Self, &str, Option<&[&str]>) -> Result<Measured>,
    ) -> Result<Vec<Measured>> {
        let mut all = Vec::new();
        for (number, (name, flags)) in WAYS.into_iter().enumerate() {
            let one = |how: &str, flags| {
                measure(self, &format!("{what}-{number}-{how}"), flags)
                    .with_context(|| format!("measuring {what}, {name}, {how}"))
            };
            let untracked = one("untracked", None)?.speed;
            let measured = Measured {
                way: name.into(),
                untracked,
                ..one("tracked", Some(flags))?
            };
            let speed = measured.speed;
            println!("{what}, {name}: {speed:.0} a second, {untracked:.0} untracked");
            all.push(measured);
        }
        Ok(all)
    }

    fn start(&self, name: &str, flags: Option<&[&str]>, line: &[String]) -> Result<Subject<'_>> {
        let running = match flags {
            Some(flags) => Started::Kept(self.outlive.run_with(name, EVERY, flags, line)?),
            None => {
                let mut command = Command::new(&line[0]);
                command.args(&line[1..]).stdin(Stdio::null());
                command.stdout(Stdio::null()).stderr(Stdio::null());
                Started::Plain(command.spawn().context("cannot start the program")?)
            }
        };
        Ok(Subject {
            outlive: &self.outlive,
            name: name.into(),
            running,
            seen: BTreeMap::new(),
        })
    }

    fn of_writer(&self, name: &str, flags: Option<&[&str]>) -> Result<Measured> {
        let output = self.folder.join(name);
        let Options { memory, rate, .. } = self.options;
        let (program, out) = (self.writer.display(), output.display());
        let script = format!("exec {program} --memory {memory} --dirty-rate {rate} >{out}");
        let line = ["sh", "-c", &script].map(String::from);
        let mut subject = self.start(name, flags, &line)?;
        let pid = subject.await_word(&output, "ready ")?;
        subject.warm_up()?;
        let begun = Instant::now();
        while begun.elapsed() < Duration::from_secs(self.options.seconds) {
            thread::sleep(LOOK);
            subject.look()?;
        }
        let (keeper, tables) = subject.memory(pid as u32)?;
        let end = rustix::process::Pid::from_raw(pid as i32).context("a process ID")?;
        rustix::process::kill_process(end, rustix::process::Signal::USR1)
            .context("cannot ask the writer for its report")?;
        let pages = subject.await_word(&output, "done ")?;
        let lived = subject.warmth() + begun.elapsed();
        let speed = pages as f64 / lived.as_secs_f64();
        subject.end(speed, keeper, tables)
    }

    fn of_redis(&self, name: &str, flags: Option<&[&str]>) -> Result<Measured> {
        let place = Place::new(&self.folder, name)?;
        let mut subject = self.start(name, flags, &place.command_line())?;
        let (mut client, identity) = place.wait(|| subject.must_live())?;
        let bar = demo::bar(self.options.keys.into(), "filling");
        writer::fill(&mut Journal::new(1), &mut client, self.options.keys, &bar)?;
        bar.finish_and_clear();
        subject.warm_up()?;
        let load = self.load(&place)?;
        let mut load = load;
        while load.try_wait()?.is_none() {
            thread::sleep(LOOK);
            subject.look()?;
        }
        let output = load.wait_with_output().context("redis-benchmark")?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let speed = requests_per_second(&text)
            .with_context(|| format!("redis-benchmark printed no result for SET:\n{text}"))?;
        let (keeper, tables) = subject.memory(identity.pid)?;
        let pid = i32::try_from(identity.pid).context("a process ID")?;
        let pid = rustix::process::Pid::from_raw(pid).context("a process ID")?;
        rustix::process::kill_process(pid, rustix::process::Signal::TERM)?;
        subject.end(speed, keeper, tables)
    }

    fn load(&self, place: &Place) -> Result<Child> {
        let (port, requests) = (place.port.to_string(), self.options.requests.to_string());
        let keys = self.options.keys.to_string();
        Command::new("redis-benchmark")
            .args(["-h", "127.0.0.1", "-p", &port, "-t", "set", "-n", &requests])
            .args(["-r", &keys, "-d", "400", "--csv"])
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .context("cannot start redis-benchmark")
    }
}

enum Started {
    Kept(Running),
    Plain(Child),
}

/// A program that is measured.
struct Subject<'a> {
    outlive: &'a Outlive,
    name: String,
    running: Started,
    seen: BTreeMap<u64, Epoch>,
}

impl Subject<'_> {
    fn must_live(&mut self) -> Result<()> {
        match &mut self.running {
            Started::Kept(running) => running.must_live(),
            Started::Plain(child) => match child.try_wait()? {
                Some(status) => bail!("it ended: {status}"),
                None => Ok(()),
            },
        }
    }

    /// The number behind a word in a file.
    fn await_word(&mut self, file: &Path, word: &str) -> Result<u64> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let text = fs::read_to_string(file).unwrap_or_default();
            let found = text.lines().find_map(|line| line.strip_prefix(word));
            if let Some(number) = found.and_then(|n| n.trim().parse().ok()) {
                return Ok(number);
            }
            ensure!(
                Instant::now() < deadline,
                "it does not say {word:?}: {text}"
            );
            thread::sleep(Duration::from_millis(5));
        }
    }

    /// How long a program runs before it is measured.
    fn warmth(&self) -> Duration {
        Duration::from_secs(2)
    }

    /// The first epochs are not counted.
    fn warm_up(&mut self) -> Result<()> {
        thread::sleep(self.warmth());
        if let Started::Kept(_) = self.running {
            self.outlive.await_epoch_since(&self.name, 0)?;
            self.look()?;
            let last = self.seen.keys().next_back().copied().unwrap_or(0);
            self.seen.retain(|number, _| *number > last);
        }
        Ok(())
    }

    fn look(&mut self) -> Result<()> {
        self.must_live()?;
        if let Started::Kept(_) = self.running {
            let epochs = self.outlive.history(&self.name).unwrap_or_default();
            let first = self.seen.keys().next().copied().unwrap_or(0);
            let new = epochs.into_iter().filter(|e| e.epoch >= first);
            self.seen.extend(new.map(|e| (e.epoch, e)));
        }
        Ok(())
    }

    /// Largest memory of the keeper, and page tables of the program, bytes.
    fn memory(&self, pid: u32) -> Result<(u64, u64)> {
        let keeper = match &self.running {
            Started::Kept(running) => status(running.keeper.id(), "VmHWM:")?,
            Started::Plain(_) => 0,
        };
        Ok((keeper, status(pid, "VmPTE:")?))
    }

    /// After the program was told to end.
    fn end(self, speed: f64, keeper: u64, tables: u64) -> Result<Measured> {
        let mut failed = 0;
        match self.running {
            Started::Kept(mut running) => {
                let ended = running.keeper.wait().context("waiting for the keeper")?;
                ensure!(
                    ended.success(),
                    "it ended: {ended}; {}",
                    running.said.text()
                );
                failed = running.said.text().matches("no epoch").count() as u64;
                self.outlive.forget(&self.name)?;
            }
            Started::Plain(mut child) => {
                let ended = child.wait().context("waiting for the program")?;
                ensure!(ended.success(), "it ended: {ended}");
            }
        }
        let mut numbers = self.seen.keys();
        let first = numbers.next().copied().unwrap_or(0);
        let last = numbers.next_back().copied().unwrap_or(first);
        Ok(Measured {
            way: String::new(),
            committed: if self.seen.is_empty() {
                0
            } else {
                last - first + 1
            },
            epochs: self.seen.into_values().collect(),
            failed,
            untracked: 0.0,
            speed,
            keeper,
            tables,
        })
    }
}

/// A number of kilobytes in the status of a process, in bytes.
fn status(pid: u32, what: &str) -> Result<u64> {
    let path = format!("/proc/{pid}/status");
    let text = fs::read_to_string(&path).with_context(|| format!("cannot read {path}"))?;
    let line = text.lines().find_map(|line| line.strip_prefix(what));
    let number = line.and_then(|l| l.trim().strip_suffix(" kB")?.parse::<u64>().ok());
    Ok(number.with_context(|| format!("{path} has no {what}"))? * 1024)
}

fn print(all: &[Measured]) {
    println!(
        "| strategy | stop: median / p99 / max | durable: median / p99 / max | pages an epoch | \
         bytes an epoch | epochs (kinds of failure) | speed | of untracked | keeper's memory | \
         page tables |\n|---|---|---|---|---|---|---|---|---|---|"
    );
    for m in all {
        let of = |what: fn(&Epoch) -> Option<u64>| -> Vec<f64> {
            let known = m.epochs.iter().filter_map(what);
            known.map(|n| n as f64).collect()
        };
        let middle = |what| stats::median(&of(what)).unwrap_or(0.0) as u64;
        println!(
            "| {} | {} | {} | {} | {} | {} ({}) | {} | {:.2} | {} | {} |",
            m.way,
            stats::times(&of(|e| e.stop_us)),
            stats::times(&of(|e| e.durable_us)),
            stats::count(middle(|e| Some(e.pages))),
            stats::bytes(middle(|e| Some(e.bytes_written))),
            m.committed,
            m.failed,
            stats::count(m.speed as u64),
            m.speed / m.untracked,
            stats::bytes(m.keeper),
            stats::bytes(m.tables),
        );
    }
}
