//! `cargo xtask demo`: a real Redis is killed at random moments and comes back.
//!
//! 1. Redis, its own persistence off, runs under `outlive run` and is filled.
//! 2. *Kill*, several times: a client writes as fast as it can; at a random moment Redis **and**
//!    its keeper get SIGKILL; `outlive restore` brings both back; every key is compared. This is a
//!    kill, not a power cut: the machine and its caches live on.
//! 3. *Planned event*: the same with `outlive power simulate`, and no acknowledged write may be
//!    missing.
//!
//! What must hold after each restore is said in [`crate::model`] and in `check`. The first
//! difference ends the demo with exit code 1. The same `--seed` draws the same moments, keys and
//! values; what the machine does between them is its own.

mod acts;
mod check;
mod report;
pub mod writer;

use crate::{
    cleanup,
    model::Journal,
    outlive::{Outlive, Output},
    redis::{Identity, Place},
    stats, tools, workspace,
};
use anyhow::{Context, Result, bail};
use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};
use report::Report;
use std::{
    env,
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant, SystemTime},
};

/// How often epochs are taken.
const EVERY: &str = "200ms";

/// What the demo can be asked for.
#[derive(Args, Clone, Debug)]
pub struct Options {
    /// A quick form: 50,000 keys, 2 kills, shorter phases.
    #[arg(long)]
    short: bool,
    /// How many keys to fill Redis with [default: 1000000].
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=100_000_000))]
    keys: Option<u32>,
    /// How many times to kill [default: 3].
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    rounds: Option<u32>,
    /// Decides the random moments, keys and values [default: another one each time].
    #[arg(long)]
    seed: Option<u64>,
    /// An `outlive` binary to use instead of building one.
    #[arg(long, value_name = "PATH")]
    outlive: Option<PathBuf>,
}

impl Options {
    fn keys(&self) -> u32 {
        self.keys
            .unwrap_or(if self.short { 50_000 } else { 1_000_000 })
    }

    fn rounds(&self) -> u32 {
        self.rounds.unwrap_or(if self.short { 2 } else { 3 })
    }

    /// The shortest and the longest time from the first write of a round to its end.
    fn writing(&self) -> (Duration, Duration) {
        let (least, most) = if self.short {
            (600, 2_500)
        } else {
            (2_000, 8_000)
        };
        (Duration::from_millis(least), Duration::from_millis(most))
    }
}

/// Runs the command.
pub fn run(options: &Options) -> Result<()> {
    let seed = options
        .seed
        .unwrap_or_else(|| fastrand::u64(..1_000_000_000));
    tools::ensure(&["redis-server"])?;
    let binary = match &options.outlive {
        Some(path) => path
            .canonicalize()
            .with_context(|| format!("no {}", path.display()))?,
        None => workspace::build_outlive()?,
    };
    if !tools::is_root() {
        return again_as_root(options, seed, &binary);
    }
    let mut demo = Demo::prepare(options.clone(), seed, binary)?;
    let (keys, rounds) = (options.keys(), options.rounds());
    demo.play().map_err(|error| {
        let said = demo.said.text();
        let said = if said.is_empty() {
            String::new()
        } else {
            format!("\nthe keeper said:\n{said}")
        };
        let short = if options.short { " --short" } else { "" };
        let repeat = format!(
            "repeat with: cargo xtask demo{short} --seed {seed} --keys {keys} --rounds {rounds}"
        );
        error.context(format!("THE DEMO FAILED; {repeat}{said}\nwhat failed"))
    })
}

/// Restoring a process under its old number is a privilege: the same command again, through sudo.
fn again_as_root(options: &Options, seed: u64, binary: &Path) -> Result<()> {
    if tools::find("sudo").is_none() {
        bail!("a process gets its old PID back only by a privileged restorer: run this as root");
    }
    println!("restoring a process under its old PID needs root: going on through sudo");
    let mut command = Command::new("sudo");
    command.arg("env");
    for name in ["PATH", "OUTLIVE_TMP"] {
        if let Some(value) = env::var_os(name) {
            let mut pair = std::ffi::OsString::from(format!("{name}="));
            pair.push(value);
            command.arg(pair);
        }
    }
    command.arg(env::current_exe().context("cannot find our own binary")?);
    command.args([
        "demo",
        "--keys",
        &options.keys().to_string(),
        "--seed",
        &seed.to_string(),
    ]);
    command
        .args(["--rounds", &options.rounds().to_string(), "--outlive"])
        .arg(binary);
    if options.short {
        command.arg("--short");
    }
    Err(command.exec()).context("cannot start sudo")
}

/// Everything that the demo holds.
struct Demo {
    options: Options,
    seed: u64,
    random: fastrand::Rng,
    outlive: Outlive,
    name: String,
    place: Place,
    /// Who answers, as it said when it was last asked.
    identity: Identity,
    /// The process that keeps it.
    keeper: u32,
    /// What the keeper says.
    said: Output,
    journal: Journal,
    report: Report,
}

impl Demo {
    fn prepare(options: Options, seed: u64, binary: PathBuf) -> Result<Self> {
        let scratch = workspace::scratch()?;
        workspace::need_space(&scratch, 2_000_000_000 + 4_000 * u64::from(options.keys()))?;
        let folder = cleanup::folder(&scratch)?;
        let place = Place::new(&folder, "redis")?;
        let outlive = Outlive {
            binary,
            store: folder.join("store"),
        };
        std::fs::create_dir(&outlive.store).context("cannot make the store's folder")?;
        let name = format!("demo-{}", std::process::id());
        println!(
            "seed {seed}; {} keys of {} bytes; everything temporary is in {}",
            stats::count(options.keys().into()),
            crate::model::VALUE_LENGTH,
            folder.display()
        );
        let mut running = outlive.run(&name, EVERY, &place.command_line())?;
        let (_, identity) = place.wait(|| running.must_live())?;
        println!(
            "redis {} runs under outlive: PID {}, port {}, an epoch every {EVERY}",
            identity.version, identity.pid, identity.port
        );
        Ok(Self {
            random: fastrand::Rng::with_seed(seed),
            journal: Journal::new(seed),
            report: Report::default(),
            keeper: running.keeper.id(),
            said: running.said,
            options,
            seed,
            outlive,
            name,
            place,
            identity,
        })
    }

    fn play(&mut self) -> Result<()> {
        self.fill()?;
        self.await_epoch_of_everything()?;
        for round in 1..=self.options.rounds() {
            self.kill(round)?;
        }
        self.planned_event()?;
        self.note_epochs()?;
        self.report.keys = self.client()?.ask_number(&["DBSIZE"])?;
        self.outlive.stop(&self.name)?;
        self.await_gone(self.keeper)?;
        self.outlive.forget(&self.name)?;
        if !self.place.is_silent() {
            bail!("redis still answers after `outlive stop`");
        }
        self.report.print(self.seed);
        Ok(())
    }

    fn fill(&mut self) -> Result<()> {
        let keys = self.options.keys();
        let bar = bar(keys.into(), "filling");
        let mut client = self.client()?;
        let begun = Instant::now();
        writer::fill(&mut self.journal, &mut client, keys, &bar)?;
        let seconds = begun.elapsed().as_secs_f64();
        bar.finish_and_clear();
        self.report.fill_rate = f64::from(keys) / seconds;
        println!("filled in {seconds:.1} s, tracked all the while");
        Ok(())
    }

    /// Waits for the first epoch that began after everything was filled in.
    fn await_epoch_of_everything(&mut self) -> Result<()> {
        let spinner = spinner("waiting for the first epoch that holds everything");
        self.outlive.await_epoch_since(&self.name, now_nanos())?;
        spinner.finish_and_clear();
        self.note_epochs()
    }

    /// Takes the epochs so far into the report.
    fn note_epochs(&mut self) -> Result<()> {
        let history = self.outlive.history(&self.name)?;
        self.report.note_epochs(history);
        Ok(())
    }

    fn client(&self) -> Result<crate::resp::Client> {
        crate::resp::Client::connect(self.place.port, crate::redis::PATIENCE)
    }
}

/// CLOCK_REALTIME, nanoseconds since the Unix epoch.
pub fn now_nanos() -> u64 {
    let since = SystemTime::now()
        .duration_since(SystemTime::UNIX_EPOCH)
        .unwrap_or_default();
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}

pub fn bar(length: u64, what: &'static str) -> ProgressBar {
    let bar = ProgressBar::new(length);
    if let Ok(style) = ProgressStyle::with_template(
        "{msg:>10} [{bar:40}] {human_pos}/{human_len} {per_sec} {eta} left",
    ) {
        bar.set_style(style.progress_chars("=> "));
    }
    bar.set_message(what);
    bar
}

fn spinner(what: &'static str) -> ProgressBar {
    let spinner = ProgressBar::new_spinner();
    spinner.set_message(what);
    spinner.enable_steady_tick(Duration::from_millis(100));
    spinner
}
