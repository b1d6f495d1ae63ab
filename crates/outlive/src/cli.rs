//! The command line: words, flags and their help. A contract that scripts rely on.
//!
//! Flags that the contract names and that are not offered yet are known here, so that using them
//! is a usage error that says so, and never silently something else.

use crate::commands::{BenchArgs, PoolCommand};
pub use crate::key_args::KeyArgs;
use clap::{Args, Parser, Subcommand, ValueEnum};
use outlive_epoch_store::Codec;
use outlive_keeper::KeeperError;
use outlive_keeper::budget::keeping::HoldUp;
use outlive_keeper::retention::{Keep, Policy};
use outlive_keeper::subject::Capture;
use outlive_process::Granularity;
use outlive_process::resources::shared::MAX_FILE;
use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

const AFTER_HELP: &str = "\
Exit codes: 0 done; 1 anything else; 2 usage; 3 refused (the message says what and what to do);
4 image damaged beyond repair; 5 not permitted. `run` and `restore` in the foreground pass on the
program's own exit status, 128 + N where signal N ended it.

The store is --store DIR, else $OUTLIVE_STORE, else /var/lib/outlive for root and
$XDG_STATE_HOME/outlive (~/.local/state/outlive) for everybody else.";

/// Keeps unmodified Linux programs alive across power cuts, crashes and moves.
#[derive(Debug, Parser)]
#[command(name = "outlive", version, about, after_help = AFTER_HELP, max_term_width = 100)]
pub struct Cli {
    /// Print the result (and errors) as JSON on standard output
    #[arg(long, global = true)]
    pub json: bool,
    /// Directory of the store
    #[arg(long, global = true, value_name = "DIR")]
    pub store: Option<PathBuf>,
    /// What to do
    #[command(subcommand)]
    pub command: Command,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Show what this host offers: kernel features, privileges, space; with remedies
    Check,
    /// Run a program and keep it: an epoch every so often, until it ends
    ///
    /// Signals, Ctrl-C and the exit status pass through. If the machine or the program dies,
    /// `outlive restore NAME` continues it from the newest epoch.
    Run(RunArgs),
    /// Keep a program that runs already; Ctrl-C ends the keeping and leaves it running
    Attach(AttachArgs),
    /// Take an epoch now
    ///
    /// With a NAME alone, its keeper takes an epoch and the program runs on. With --image, one
    /// self-contained image of a program is written, and the program is ended, unless
    /// --leave-running is given. A subject that does not run is copied as it is.
    Checkpoint(CheckpointArgs),
    /// Continue a program from an epoch
    ///
    /// In the foreground, the program becomes a child of this command, which passes on signals and
    /// the exit status and, with a NAME, goes on taking epochs at the recorded interval.
    Restore(RestoreArgs),
    /// List the subjects of the store
    Ps,
    /// List the epochs of a subject that can be restored
    History {
        /// The subject
        name: String,
    },
    /// Take a final epoch of a subject and end its program
    Stop {
        /// The subject
        name: String,
    },
    /// Remove a subject that does not run, with all its epochs
    Forget {
        /// The subject
        name: String,
    },
    /// Remove epochs of a subject that are not to be kept, whether it runs or not
    ///
    /// The newest epoch always stays. What stays is what was there before, under the same numbers;
    /// the space of the others is given back when this returns.
    Prune(PruneArgs),
    /// Show what an image or a subject holds
    Inspect(InspectArgs),
    /// Read every byte of an image or a subject and check it; exit code 4 names the damage
    ///
    /// Checksums need no key. With the key of an encrypted image, its authentication tags are checked too;
    /// where the key of a subject cannot be had, nothing is checked, unless --checksums-only says so.
    Verify(VerifyArgs),
    /// Check every byte, and write again what is damaged and can be made good
    Repair {
        /// Directory of an image (with a slash in it), or the name of a subject that nobody keeps
        #[arg(value_name = "IMAGE|NAME")]
        what: String,
        /// The key
        #[command(flatten)]
        key: KeyArgs,
    },
    /// Write the epochs of a subject or an image into one file, or a pipe
    ///
    /// All epochs that are there, or with --epoch one of them, whole. The program may go on running.
    /// The file is not encrypted: it holds the program's memory.
    Export(ExportArgs),
    /// Make a subject of what `export` wrote; `outlive restore NAME` continues it
    ///
    /// Everything is checked; where anything is missing or damaged, nothing stays. A program does at
    /// its restore what its epochs say, with your rights: import only what you trust.
    Import(ImportArgs),
    /// Put an epoch of a subject on a shelf that other hosts can pull it from
    ///
    /// Only what is not there yet is written; a push that was interrupted goes on when it is repeated.
    /// What others put there is never replaced. What is pushed is not encrypted: it holds the
    /// program's memory.
    Push(PushArgs),
    /// Make a subject of an epoch that was pushed; `outlive restore NAME` continues it
    ///
    /// Every piece is checked; where anything is missing or damaged, there is no subject. A pull that
    /// was interrupted goes on when it is repeated. A program does at its restore what its epoch
    /// says, with your rights: pull only what you trust.
    Pull(PullArgs),
    /// Power events
    #[command(subcommand)]
    Power(PowerCommand),
    /// Resilient heaps (files in which Rust programs keep data), without their programs
    #[command(subcommand)]
    Heap(HeapCommand),
    /// One pool of memory that survives (a file, a block device, DAX), divided among many owners
    #[command(subcommand)]
    Pool(PoolCommand),
    /// Watch a counter be killed together with its keeper, and count on
    Demo,
    /// Measure, on this machine, what keeping and restoring costs
    Bench(BenchArgs),
}

/// Power events.
#[derive(Debug, Subcommand)]
pub enum PowerCommand {
    /// Act as if the power failed now: an epoch at once; then the program stands still for the rest of
    /// its hold-up budget, and is ended; times
    Simulate {
        /// The subject
        name: String,
        /// The mains are back after this time: the program stands still until then, and goes on. A
        /// time beyond the hold-up budget comes too late
        #[arg(long, value_name = "TIME", value_parser = parse_duration)]
        mains_back_after: Option<Duration>,
    },
    /// Say that the mains are back: a program that stands still because of a power event goes on
    Back {
        /// The subject
        name: String,
    },
    /// Show how long a power event takes, by what was measured, and how much may be unsaved then
    ///
    /// With a NAME that is kept, by its own epochs; else the medium of the store is measured, which
    /// takes a second.
    Budget {
        /// The subject
        name: Option<String>,
        /// A hold-up budget to judge; one that cannot be kept is refused with the least that can
        #[arg(long, value_name = "TIME", value_parser = parse_duration)]
        hold_up: Option<Duration>,
    },
}

/// Resilient heaps.
#[derive(Debug, Subcommand)]
pub enum HeapCommand {
    /// Show size, state and types of a heap; the file stays as it is
    Inspect {
        /// The heap
        file: PathBuf,
    },
    /// Read every line of a heap and check it; the file stays as it is; exit code 4 if data is lost
    Verify {
        /// The heap
        file: PathBuf,
    },
    /// Bring unfinished commits home and repair what can be repaired; exit code 4 if data is lost
    Repair {
        /// The heap
        file: PathBuf,
    },
}

/// `outlive run`
#[derive(Debug, Args)]
pub struct RunArgs {
    /// Name of the subject; made from the program's name where it is not given
    #[arg(long, value_name = "N")]
    pub name: Option<String>,
    /// Where epochs are kept
    #[command(flatten)]
    pub device: Device,
    /// How each epoch is taken
    #[command(flatten)]
    pub pace: Pace,
    /// The key
    #[command(flatten)]
    pub key: KeyArgs,
    /// Pass on inherited pipes and sockets, too; without this, the program gets the standard
    /// streams and inherited files only, since others could not be restored
    #[arg(long)]
    pub pass_fds: bool,
    /// The program and its arguments
    #[arg(
        required = true,
        trailing_var_arg = true,
        allow_hyphen_values = true,
        value_name = "CMD"
    )]
    pub command: Vec<OsString>,
}

/// `outlive verify`
#[derive(Debug, Args)]
pub struct VerifyArgs {
    /// Directory of an image (with a slash in it), or the name of a subject
    #[arg(value_name = "IMAGE|NAME")]
    pub what: String,
    /// Check what needs no key, also where there is one: accidents are found, forgeries are not
    #[arg(long, conflicts_with = "KeyArgs")]
    pub checksums_only: bool,
    /// The key
    #[command(flatten)]
    pub key: KeyArgs,
}

/// `outlive attach`
#[derive(Debug, Args)]
pub struct AttachArgs {
    /// A subject that still runs although its keeper died: it is kept again, as it was
    #[arg(required_unless_present = "pid", conflicts_with_all = ["pid", "name"])]
    pub subject: Option<String>,
    /// The process
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
    pub pid: Option<u32>,
    /// Name of the subject; made from the program's name where it is not given
    #[arg(long, value_name = "N")]
    pub name: Option<String>,
    /// Where epochs are kept
    #[command(flatten)]
    pub device: Device,
    /// How each epoch is taken
    #[command(flatten)]
    pub pace: Pace,
    /// The key
    #[command(flatten)]
    pub key: KeyArgs,
}

/// A device for the epochs of a new subject.
#[derive(Debug, Args)]
pub struct Device {
    /// Block device that holds nothing but the epochs of this subject, instead of files in the store:
    /// best a name of it that stays, as those in /dev/disk/by-id. Or a file that has all of its space,
    /// which is mapped: for persistent memory, on a file system mounted with -o dax
    #[arg(long, value_name = "DEVICE", conflicts_with = "hold_up")]
    pub medium: Option<PathBuf>,
    /// Use the device although it holds something else, all of which is lost
    #[arg(long, requires = "medium")]
    pub format: bool,
}

/// When and how epochs are taken.
#[derive(Debug, Args)]
pub struct Pace {
    /// Time between epochs, with its unit: 100ms, 2s, 1m
    #[arg(long, default_value = "100ms", value_parser = parse_interval, value_name = "TIME")]
    pub every: Duration,
    /// How long a thread may take to stop before an epoch is given up
    #[arg(long, default_value = "1s", value_parser = parse_duration, value_name = "TIME")]
    pub timeout: Duration,
    /// How memory is captured
    #[arg(long, default_value = "redundant", value_name = "S")]
    pub strategy: Strategy,
    /// Unit in which written memory is taken, in pages: a power of two, 1 to 1024. Larger units make
    /// fewer and longer ranges, and more bytes
    #[arg(long, default_value = "1", value_parser = parse_granularity, value_name = "PAGES")]
    pub granularity: Granularity,
    /// How many threads of the keeper read the state of a program that has much of it, while it
    /// stands [default: one for each processor, at most 4]
    #[arg(long, value_parser = parse_threads, value_name = "N")]
    pub threads: Option<usize>,
    /// Largest file open for writing whose contents are kept in the epochs, at most 256MiB; 0: none.
    /// One that changed is read while the program is stopped
    #[arg(long, default_value = "16MiB", value_parser = parse_files_limit, value_name = "BYTES")]
    pub files_limit: u64,
    /// What the program can count on
    #[command(flatten)]
    pub promise: Promise,
}

/// Limits that the keeper holds.
#[derive(Clone, Debug, Default, PartialEq, Eq, Args)]
pub struct Promise {
    /// Hold-up budget: what is not on the medium is kept so small that all of it is durable within
    /// this time after the mains failed. Refused where the medium cannot do that
    #[arg(long, value_name = "TIME", value_parser = parse_duration)]
    pub hold_up: Option<Duration>,
    /// Hold whoever would write more than the budget allows, also after an epoch that failed. Private
    /// mappings of files and shared memory count as written, whole. First writes to pages are slower.
    /// The strategy is then cow
    #[arg(long, requires = "hold_up")]
    pub strict: bool,
    /// Most bytes written to the medium a day, such as 200GB; epochs are then further apart. A
    /// hold-up budget comes first
    #[arg(long, value_name = "BYTES", value_parser = parse_bytes)]
    pub max_wear: Option<u64>,
    /// Longest time for which the program is stopped for an epoch, with its unit: 500us, 2ms. An
    /// epoch that would take longer is abandoned, and the next one copies more before its stop
    #[arg(long, value_name = "TIME", value_parser = parse_duration)]
    pub max_stop: Option<Duration>,
    /// Which epochs stay when newer ones make the log long: the newest N, and the last one of each of
    /// the latest N hours, days, weeks (UTC): last=N,hourly=N,daily=N,weekly=N. Without it the log
    /// since its last flattening stays
    #[arg(long, value_name = "RULES")]
    pub keep: Option<Keep>,
    /// Most bytes of all epochs that are kept: beyond that the oldest go, also those that --keep wants.
    /// What the newest ones need stays
    #[arg(long, value_name = "BYTES", value_parser = parse_bytes)]
    pub max_size: Option<u64>,
    /// Compress what epochs store, where that saves space, while the program runs: lz4 is quicker
    /// to read back, zstd saves more. Not with a hold-up budget, and not what the program waits for
    /// [default: none]
    #[arg(long, value_name = "HOW", conflicts_with = "hold_up")]
    pub compress: Option<Compress>,
}

/// How epochs are compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Compress {
    /// Not at all
    None,
    /// LZ4
    Lz4,
    /// Zstandard
    Zstd,
}

impl Promise {
    /// What is to become of earlier epochs.
    pub fn policy(&self) -> Policy {
        Policy {
            keep: self.keep,
            max_size: self.max_size,
            thorough: false,
        }
    }

    /// How pages are packed; `None` where nothing was said of it.
    pub fn codec(&self) -> Option<Option<Codec>> {
        self.compress.map(|how| match how {
            Compress::None => None,
            Compress::Lz4 => Some(Codec::Lz4),
            Compress::Zstd => Some(Codec::Zstd),
        })
    }

    /// The longest stop as it is written down, microseconds.
    pub fn max_stop_us(&self) -> Option<u64> {
        self.max_stop
            .map(|t| u64::try_from(t.as_micros()).unwrap_or(u64::MAX))
    }

    /// The budget as the keeper has it.
    pub fn hold_up(&self) -> Option<HoldUp> {
        self.hold_up.map(|budget| HoldUp {
            budget_ns: u64::try_from(budget.as_nanos()).unwrap_or(u64::MAX),
            strict: self.strict,
        })
    }
}

/// How memory is captured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Strategy {
    /// Everything, at every stop; writes are not tracked
    Copy,
    /// What was written since the last epoch, at the stop
    Incremental,
    /// What was written, in passes while the program runs; the stop takes the rest
    Redundant,
    /// What was written, behind the program when it runs again; writes to what is not copied yet
    /// wait. Takes CAP_SYS_PTRACE of the program
    Cow,
}

impl From<Strategy> for outlive_process::Strategy {
    fn from(strategy: Strategy) -> Self {
        match strategy {
            Strategy::Copy => Self::Copy,
            Strategy::Incremental => Self::Incremental,
            Strategy::Redundant => Self::Redundant,
            Strategy::Cow => Self::Cow,
        }
    }
}

/// `outlive checkpoint`
#[derive(Debug, Args)]
pub struct CheckpointArgs {
    /// The subject
    #[arg(required_unless_present = "pid", conflicts_with = "pid")]
    pub name: Option<String>,
    /// The process
    #[arg(long, requires = "image", value_parser = clap::value_parser!(u32).range(1..))]
    pub pid: Option<u32>,
    /// Directory to write the image to; must be empty or not exist
    #[arg(long, value_name = "DIR")]
    pub image: Option<PathBuf>,
    /// Let the program run on
    #[arg(long)]
    pub leave_running: bool,
    /// How long a thread may take to stop before it is given up (5s); with a NAME, how long to wait
    /// for its keeper's answer
    #[arg(long, value_parser = parse_duration, value_name = "TIME")]
    pub timeout: Option<Duration>,
    /// The key of the image; that of a subject is known
    #[command(flatten)]
    pub key: KeyArgs,
}

/// `outlive restore`
#[derive(Debug, Args)]
pub struct RestoreArgs {
    /// The subject
    #[arg(required_unless_present = "image", conflicts_with = "image")]
    pub name: Option<String>,
    /// Directory of an image
    #[arg(long, value_name = "DIR")]
    pub image: Option<PathBuf>,
    /// Number of the epoch; the newest where it is not given
    #[arg(long, value_name = "K")]
    pub epoch: Option<u64>,
    /// Return once the program runs; a keeper (NAME) or init (--image) becomes its parent
    #[arg(long)]
    pub detach: bool,
    /// Files that are not as they were: `reconcile` truncates those that grew and refuses all
    /// others, `keep` takes them as they are
    #[arg(long, default_value = "reconcile", value_name = "HOW")]
    pub files: Files,
    /// Let the program run at once, and bring its memory in when it is touched, the rest behind it
    #[arg(long)]
    pub lazy: bool,
    /// Make a PID namespace for the program, in which its process IDs are free; it has others
    /// outside
    #[arg(long)]
    pub new_pid_ns: bool,
    /// Connections to outside peers: they are reset (keeping them is not offered yet)
    #[arg(long, default_value = "reset", value_name = "HOW", hide = true)]
    pub tcp: Tcp,
    /// With a NAME: what the program can count on from now on, instead of what it was kept with before
    #[command(flatten)]
    pub promise: Promise,
    /// The key, where it is not at the place that is known. With it, what is not encrypted is refused
    #[command(flatten)]
    pub key: KeyArgs,
    /// Set by `--detach` for the process in the background.
    #[arg(long, hide = true)]
    pub background: bool,
}

/// What to do with files that are not as they were.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Files {
    /// Truncate those that grew, refuse all others
    Reconcile,
    /// Take them as they are
    Keep,
}

/// What to do with connections to outside peers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Tcp {
    /// They are reset
    Reset,
    /// Not offered yet
    Keep,
}

/// `outlive inspect`
#[derive(Debug, Args)]
pub struct InspectArgs {
    /// Directory of an image (with a slash in it), or the name of a subject
    #[arg(value_name = "IMAGE|NAME")]
    pub what: String,
    /// Print the state trees as one device tree source, each group a node below the root
    #[arg(long)]
    pub dts: bool,
    /// Check the state trees' form; exit code 4 where one is wrong
    #[arg(long)]
    pub check: bool,
    /// Number of the epoch; the newest where it is not given
    #[arg(long, value_name = "K")]
    pub epoch: Option<u64>,
    /// The key
    #[command(flatten)]
    pub key: KeyArgs,
}

/// `outlive prune`
#[derive(Debug, Args)]
pub struct PruneArgs {
    /// The subject
    pub name: String,
    /// What stays, this once: last=N,hourly=N,daily=N,weekly=N; else what it is kept with
    #[arg(long, value_name = "RULES")]
    pub keep: Option<Keep>,
    /// Only list what would go and what would stay
    #[arg(long)]
    pub dry_run: bool,
    /// The key
    #[command(flatten)]
    pub key: KeyArgs,
}

/// `outlive export`
#[derive(Debug, Args)]
pub struct ExportArgs {
    /// The name of a subject, or the directory of an image (with a slash in it)
    #[arg(value_name = "NAME|IMAGE")]
    pub what: String,
    /// Only this epoch, whole; else all that are there
    #[arg(long, value_name = "K")]
    pub epoch: Option<u64>,
    /// Where to; `-`, or nothing, is standard output
    #[arg(short, long, value_name = "FILE|-")]
    pub output: Option<PathBuf>,
}

/// `outlive import`
#[derive(Debug, Args)]
pub struct ImportArgs {
    /// Where from; `-` is standard input
    #[arg(value_name = "FILE|-")]
    pub file: PathBuf,
    /// Name of the subject; the one that it had where it comes from, if this is not given
    #[arg(long, value_name = "N")]
    pub name: Option<String>,
}

/// `outlive push`
#[derive(Debug, Args)]
pub struct PushArgs {
    /// The subject
    pub name: String,
    /// Where to: a directory, as a path or file:///PATH; or s3://BUCKET/PREFIX, gs://BUCKET/PREFIX,
    /// az://CONTAINER/PREFIX, with keys and endpoint in the environment (AWS_…, GOOGLE_…, AZURE_…)
    #[arg(value_name = "URL")]
    pub url: String,
    /// Number of the epoch; the newest where it is not given
    #[arg(long, value_name = "K")]
    pub epoch: Option<u64>,
    /// Name that it has there; its own where it is not given
    #[arg(long = "as", value_name = "N")]
    pub there: Option<String>,
}

/// `outlive pull`
#[derive(Debug, Args)]
pub struct PullArgs {
    /// The name that it has there
    pub name: String,
    /// Where from, as for push
    #[arg(value_name = "URL")]
    pub url: String,
    /// Number of the epoch; the newest where it is not given
    #[arg(long, value_name = "K")]
    pub epoch: Option<u64>,
    /// First digits of its hash, where hosts went different ways
    #[arg(long, value_name = "HASH")]
    pub hash: Option<String>,
    /// Name of the subject here; the same where it is not given
    #[arg(long = "name", value_name = "N")]
    pub here: Option<String>,
}

impl Cli {
    /// Refuses what the contract names and this version does not do.
    ///
    /// # Errors
    /// Usage, naming the flag.
    pub fn offered(&self) -> Result<(), KeeperError> {
        let missing = match &self.command {
            Command::Restore(args) => args.missing(),
            _ => None,
        };
        match missing {
            Some(flag) => Err(KeeperError::Usage(format!("{flag} is not offered yet"))),
            None => Ok(()),
        }
    }
}

impl Pace {
    /// How memory is captured, as it is written down.
    #[must_use]
    pub fn capture(&self) -> Capture {
        Capture::of(self.strategy(), self.granularity)
    }

    /// The strategy that was asked for, or the one that strictness needs.
    pub fn strategy(&self) -> outlive_process::Strategy {
        let strategy = if self.promise.strict {
            Strategy::Cow
        } else {
            self.strategy
        };
        strategy.into()
    }
}

impl RestoreArgs {
    fn missing(&self) -> Option<&'static str> {
        let flags = [(self.tcp == Tcp::Keep, "--tcp keep")];
        flags.iter().find_map(|(used, flag)| used.then_some(*flag))
    }
}

/// A time with its unit: `250us`, `100ms`, `1.5s`, `2m`, `1h`.
fn parse_duration(text: &str) -> Result<Duration, String> {
    let wrong = || format!("{text:?} is no time; write it with its unit, such as 100ms, 2s or 1m");
    let at = text
        .find(|c: char| !c.is_ascii_digit() && c != '.')
        .ok_or_else(wrong)?;
    let (number, unit) = text.split_at(at);
    let number: f64 = number.parse().map_err(|_| wrong())?;
    let unit = match unit {
        "us" | "µs" => 1e-6,
        "ms" => 1e-3,
        "s" => 1.0,
        "m" | "min" => 60.0,
        "h" => 3600.0,
        _ => return Err(wrong()),
    };
    let seconds = number * unit;
    if seconds > 0.0 && seconds <= 366.0 * 86400.0 {
        return Ok(Duration::from_secs_f64(seconds));
    }
    Err(format!(
        "{text:?} is out of range: more than nothing and at most a year"
    ))
}

fn parse_threads(text: &str) -> Result<usize, String> {
    const MOST: usize = 64;
    let threads = text.parse().ok().filter(|n| (1..=MOST).contains(n));
    threads.ok_or_else(|| format!("{text:?} is no number from 1 to {MOST}"))
}

fn parse_granularity(text: &str) -> Result<Granularity, String> {
    let pages = text.parse().ok().and_then(Granularity::new);
    pages.ok_or_else(|| {
        format!(
            "{text:?} is no power of two from 1 to {}",
            Granularity::LARGEST
        )
    })
}

/// Bytes, with or without a unit: `5`, `200GB`, `1.5TB/day`.
pub fn parse_bytes(text: &str) -> Result<u64, String> {
    let wrong = || format!("{text:?} is no number of bytes; write it as 200GB or 1.5TB");
    let plain = text.strip_suffix("/day").unwrap_or(text);
    let at = plain.find(|c: char| !c.is_ascii_digit() && c != '.');
    let (number, unit) = plain.split_at(at.unwrap_or(plain.len()));
    let number: f64 = number.parse().map_err(|_| wrong())?;
    let unit = match unit.trim() {
        "" | "B" => 1.0,
        "KB" | "kB" => 1e3,
        "MB" => 1e6,
        "GB" => 1e9,
        "KiB" => 1024.0,
        "MiB" => 1_048_576.0,
        "GiB" => 1_073_741_824.0,
        "TB" => 1e12,
        "PB" => 1e15,
        _ => return Err(wrong()),
    };
    let bytes = number * unit;
    if (1.0..9e18).contains(&bytes) {
        return Ok(bytes as u64);
    }
    Err(wrong())
}

/// The largest file whose contents are kept: bytes up to what a restore takes.
fn parse_files_limit(text: &str) -> Result<u64, String> {
    let bytes = if text == "0" { 0 } else { parse_bytes(text)? };
    if bytes > MAX_FILE {
        return Err(format!("{text:?} is too much: at most 256MiB"));
    }
    Ok(bytes)
}

fn parse_interval(text: &str) -> Result<Duration, String> {
    let every = parse_duration(text)?;
    if every < Duration::from_millis(1) {
        return Err(format!(
            "{text:?} is too short: epochs are at least 1ms apart"
        ));
    }
    Ok(every)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<Cli, clap::Error> {
        Cli::try_parse_from(std::iter::once("outlive").chain(line.split_whitespace()))
    }

    #[test]
    fn the_grammar_is_sound() {
        use clap::CommandFactory;
        Cli::command().debug_assert();
    }

    #[test]
    fn the_program_keeps_its_own_flags() {
        for line in [
            "run --name a -- prog --json -x",
            "run --name a prog --json -x",
        ] {
            let cli = parse(line).unwrap();
            assert!(!cli.json);
            let Command::Run(args) = cli.command else {
                panic!("{line}")
            };
            assert_eq!(args.command, ["prog", "--json", "-x"]);
            assert_eq!(args.name.as_deref(), Some("a"));
            assert_eq!(args.pace.every, Duration::from_millis(100));
        }
        assert!(parse("ps --json").unwrap().json);
        assert!(parse("--json history x").unwrap().json);
    }

    #[test]
    fn what_is_not_offered_yet_is_a_usage_error() {
        let error = parse("restore a --tcp keep").unwrap().offered();
        let error = error.unwrap_err();
        assert_eq!(error.exit_code(), 2);
        assert!(error.to_string().contains("not offered yet"));
        for line in [
            "run -- a",
            "run --strategy copy -- a",
            "run --strategy cow -- a",
            "attach --pid 1 --strategy incremental --granularity 1024",
            "run --strategy redundant -- a",
            "run --threads 64 -- a",
            "restore a --tcp reset --files keep --new-pid-ns",
            "checkpoint a",
            "checkpoint a --image d --leave-running",
            "run --keep last=5,hourly=24,daily=7,weekly=4 --max-size 20GB -- a",
            "restore a --keep last=1",
            "prune a --dry-run",
            "prune a --keep daily=7",
            "run --key-file k -- a",
            "restore a --key-credential outlive",
            "checkpoint --pid 5 --image d --key-command tool",
            "verify a --key-file k",
        ] {
            parse(line).unwrap().offered().unwrap();
        }
    }

    #[test]
    fn wrong_lines_are_usage_errors() {
        for line in [
            "",
            "run",
            "fly",
            "attach",
            "attach --pid 0",
            "checkpoint",
            "checkpoint --pid 5",
            "checkpoint a --pid 5 --image d",
            "restore",
            "restore a --image d",
            "run --every 100 -- a",
            "run --every 0ms -- a",
            "run --every 10us -- a",
            "run --threads 0 -- a",
            "run --threads 65 -- a",
            "run --granularity 0 -- a",
            "run --granularity 3 -- a",
            "run --granularity 2048 -- a",
            "power",
            "run --strict -- a",
            "run --hold-up 10 -- a",
            "run --max-wear 5TB/week -- a",
            "run --keep 5 -- a",
            "run --key-file k --key-command tool -- a",
            "run --keep last=0 -- a",
            "run --keep yearly=1 -- a",
            "prune",
            "prune a --keep last=1,last=2",
            "attach a --pid 5",
            "attach a --name b",
        ] {
            assert_eq!(parse(line).unwrap_err().exit_code(), 2, "{line}");
        }
    }

    #[test]
    fn bytes_may_carry_a_unit() {
        assert_eq!(parse_bytes("5"), Ok(5));
        assert_eq!(parse_bytes("200GB"), Ok(200_000_000_000));
        assert_eq!(parse_bytes("1.5 TB/day"), Ok(1_500_000_000_000));
        for bad in ["", "GB", "0", "-1GB", "5XB", "1e30TB", "5GB/week"] {
            assert!(parse_bytes(bad).is_err(), "{bad}");
        }
        assert_eq!(parse_files_limit("0"), Ok(0));
        assert_eq!(parse_files_limit("256MiB"), Ok(256 << 20));
        assert!(parse_files_limit("257MiB").is_err());
    }

    #[test]
    fn times_carry_their_unit() {
        assert_eq!(parse_duration("100ms"), Ok(Duration::from_millis(100)));
        assert_eq!(parse_duration("1.5s"), Ok(Duration::from_millis(1500)));
        assert_eq!(parse_duration("2m"), Ok(Duration::from_secs(120)));
        for bad in [
            "", "5", "ms", "-1s", "1e9s", "0s", "999999h", "1..2s", "1 s",
        ] {
            assert!(parse_duration(bad).is_err(), "{bad}");
        }
    }
}
