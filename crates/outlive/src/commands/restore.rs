//! `restore`: a program continues from an epoch.
//!
//! The program becomes a child of the process that restores it, and that process must have one
//! thread until then: so the epochs are read before the log is opened for writing.
//!
//! With `--detach` this command starts itself once more in a session of its own, with a socket as
//! standard input. The process in the background restores, reports over the socket, and stays as
//! the keeper (or ends, for an image); this one passes the report on.

use super::medium;
use super::run::{UNTIMED, adopt_strays, claim, defaults, finish, introduce, queue};
use crate::cli::{Files, Promise, RestoreArgs};
use crate::out;
use crate::progress::Watched;
use crate::terminal::{self, Lent, Modes};
use outlive_epoch::EpochReader;
use outlive_epoch_store::Secret;
use outlive_keeper::KeeperError;
use outlive_keeper::control::Control;
use outlive_keeper::epoch::EpochLog;
use outlive_keeper::images::{Image, Log};
use outlive_keeper::keep::{Companion, Keeper, Settings};
use outlive_keeper::keys;
use outlive_keeper::ownership::Own;
use outlive_keeper::procfs::{self, Pids};
use outlive_keeper::subject::{Capture, Card, Root, Subject};
use outlive_keeper::table::Table;
use outlive_linux::signals::SignalQueue;
use outlive_process::{
    FilesPolicy, Launched, Lazy, ProcessError, Ready, RestoreOptions, Restored, Served, Source,
    Strategy, TrackOptions, Tracked,
};
use rustix::fd::{AsFd, OwnedFd};
use rustix::process::Signal;
use serde::{Deserialize, Serialize};
use serde_json::json;
use std::cell::Cell;
use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How long a thread may take to stop in an epoch after a restore.
const STOP_TIMEOUT: Duration = Duration::from_secs(1);

/// How long a program that was just killed may take to be gone.
const DYING: Duration = Duration::from_millis(300);

/// How long a program that has ended may take to be reaped.
const REAPING: Duration = Duration::from_secs(5);

/// Signals that end a restore.
const ENDS: [i32; 4] = [
    Signal::HUP.as_raw(),
    Signal::INT.as_raw(),
    Signal::QUIT.as_raw(),
    Signal::TERM.as_raw(),
];

/// What a restore tells, also across the socket of a process in the background.
#[derive(Debug, Serialize, Deserialize)]
enum Report {
    Done {
        pids: Pids,
        restore_us: u64,
        first_run_us: u64,
        later_bytes: u64,
        epoch: u64,
        notices: Vec<String>,
    },
    Failed {
        error: String,
        exit: u8,
    },
}

/// Where the report goes.
enum Teller {
    User { json: bool },
    Parent(UnixStream),
}

/// `outlive restore`
pub fn restore(root: &Root, args: &RestoreArgs, json: bool) -> Result<u8, KeeperError> {
    if args.background {
        return in_background(root, args);
    }
    if args.image.is_some() && args.promise != Promise::default() {
        let what = "--hold-up, --strict, --max-wear and --max-stop need a NAME: nobody keeps a \
                    program that was restored from an image";
        return Err(KeeperError::Usage(what.into()));
    }
    if args.detach {
        return detach(root, args, json);
    }
    here(root, args, &mut Teller::User { json })
}

fn here(root: &Root, args: &RestoreArgs, teller: &mut Teller) -> Result<u8, KeeperError> {
    match (&args.name, &args.image) {
        (Some(name), _) => subject(root, name, args, teller),
        (None, Some(image)) => from_image(image, args, teller),
        (None, None) => Err(KeeperError::Usage("give a NAME or --image DIR".into())),
    }
}

fn from_image(dir: &Path, args: &RestoreArgs, teller: &mut Teller) -> Result<u8, KeeperError> {
    // A command for it runs with the signals as they are.
    let secret = args.key.source()?.map(|source| source.read()).transpose()?;
    let mut signals = queue()?;
    let (ready, found) = prepare(dir, args, secret.as_ref(), None)?;
    not_interrupted(&mut signals)?;
    if let Teller::Parent(_) = teller {
        let Launched { restored, lazy, .. } = ready.launch()?;
        teller.tell(restored, found);
        // Whoever serves its memory stays until it is all there.
        lazy.map_or(Ok(()), |mut lazy| lazy.finish().map(drop))?;
        return Ok(0);
    }
    let modes = Modes::note();
    let _lent = Lent::to(ready.pid());
    let Launched { restored, lazy, .. } = ready.launch()?;
    let pid = restored.pid;
    terminal::redraw(pid);
    teller.tell(restored, found);
    let rest = Rest::follow(lazy, teller);
    let ending = Companion::of(pid, true)?.run(&mut signals)?;
    if let Some(modes) = modes {
        modes.after(&ending);
    }
    rest.wait()?;
    Ok(ending.code())
}

/// The memory of a program that comes after it; a thread tells when all of it is there.
#[derive(Default)]
struct Rest {
    thread: Cell<Option<JoinHandle<Result<(), ProcessError>>>>,
    ready: Option<OwnedFd>,
}

impl Rest {
    fn follow(lazy: Option<Lazy>, teller: &Teller) -> Self {
        let json = matches!(teller, Teller::User { json: true });
        let Some(mut lazy) = lazy else {
            return Self::default();
        };
        // Without it, epochs that are due wait for the thread.
        let ready = lazy.as_fd().try_clone_to_owned().ok();
        let thread = std::thread::spawn(move || {
            let served = lazy.finish()?;
            tell_rest(&served, json);
            Ok(())
        });
        Self {
            thread: Cell::new(Some(thread)),
            ready,
        }
    }

    /// Waits until all is there. Fails where the program had to be ended.
    fn wait(&self) -> Result<(), ProcessError> {
        match self.thread.take().map(JoinHandle::join) {
            Some(Ok(done)) => done,
            _ => Ok(()),
        }
    }
}

fn tell_rest(served: &Served, json: bool) {
    if json {
        out::json(&json!({
            "resident_us": served.resident_us,
            "waits": served.waits,
            "on_demand_bytes": served.on_demand,
            "bytes": served.bytes,
        }));
        return;
    }
    out::say(&format!(
        "all memory is there after {}; the program waited for a page {} times",
        out::time_us(served.resident_us),
        served.waits,
    ));
}

fn subject(
    root: &Root,
    name: &str,
    args: &RestoreArgs,
    teller: &mut Teller,
) -> Result<u8, KeeperError> {
    let subject = root.existing(name)?;
    Own::check(subject.dir())?;
    let lock = claim(&subject)?;
    let mut known = subject.card()?;
    let (mut strategy, granularity) = known.capture.read()?;
    must_not_run(&subject, &known)?;
    let asked = args.promise.hold_up();
    let source = args.key.source()?;
    let encrypted = source.is_some() || known.key.is_some();
    if encrypted && (asked.is_some() || known.hold_up.is_some()) {
        return Err(KeeperError::Refused(UNTIMED.into()));
    }
    let model = match asked {
        Some(_) => medium::model(root, asked, 0)?,
        None => medium::model_again(root, known.hold_up, name),
    };
    let max_stop = args.promise.max_stop_us();
    if args.promise != Promise::default() {
        known.max_stop_us = max_stop.or(known.max_stop_us);
        known.hold_up = asked.or(known.hold_up);
        if known.hold_up.is_some_and(|h| h.strict) {
            strategy = Strategy::Cow;
            known.capture = Capture::of(strategy, granularity);
        }
        known.max_wear = args.promise.max_wear.or(known.max_wear);
        known.keep = args.promise.keep.or(known.keep);
        known.max_size = args.promise.max_size.or(known.max_size);
        if let Some(codec) = args.promise.codec() {
            if codec.is_some() && known.hold_up.is_some() {
                let what = "is kept with a hold-up budget, and an event must not wait for compression: \
                            leave --compress out";
                return Err(KeeperError::Refused(format!("{name} {what}")));
            }
            known.compress = codec.map(|codec| codec.to_string());
        }
        subject.write_card(&lock, &known)?;
    }
    let secret = keys::of_subject(source.as_ref(), &subject, &known)?;
    let mut signals = queue()?;
    adopt_strays()?;
    let options = TrackOptions {
        stop_timeout: STOP_TIMEOUT,
        strategy,
        granularity,
        files_limit: known.files_limit(),
        strays: true,
        strict: known.hold_up.is_some_and(|h| h.strict),
        ..defaults()
    };
    let secret = secret.as_ref();
    let (ready, found) = prepare(&subject.epochs_dir(), args, secret, Some(options.clone()))?;
    let epoch = found.epoch;
    if source.is_some() && source != known.key {
        // It was the right key, and is there from now on.
        known.key = source;
        subject.write_card(&lock, &known)?;
    }
    // Until `go`, an early return drops `ready`, which removes every trace of the program.
    not_interrupted(&mut signals)?;
    let mut control = Control::open(subject.dir())?;
    let modes = Modes::note();
    let _lent = Lent::to(ready.pid());
    let Launched {
        mut restored,
        tracked,
        lazy,
    } = ready.launch()?;
    let pid = restored.pid;
    terminal::redraw(pid);
    // The program runs: what fails now costs its epochs, not its life.
    let opened =
        introduce(&subject, &lock, pid).and_then(|()| Log::open(&subject.epochs_dir(), secret));
    let mut log = match opened {
        Ok(log) => log,
        Err(error) => {
            restored
                .notices
                .push(format!("{name} runs, but no epochs are taken: {error}"));
            drop(control);
            teller.tell(restored, found);
            return Ok(Companion::of(pid, true)?.run(&mut signals)?.code());
        }
    };
    teller.tell(restored, found);
    let settings = Settings {
        pid,
        every: Duration::from_nanos(known.every_ns),
        max_stop: known.max_stop(),
        policy: known.policy(),
        pack: known.codec()?,
        capture: known.capture,
        child: true,
        hold_up: known.hold_up,
        max_wear: known.max_wear,
        model,
    };
    let newest = log.newest();
    // After an older one comes a full epoch: that waits until everything is there.
    let tracked = tracked.filter(|_| lazy.is_none() || epoch == newest);
    let mut rest = Rest::follow(lazy, teller);
    let ready = rest.ready.take();
    let mut attach = || {
        rest.wait()?;
        Tracked::attach(pid, options.clone())
    };
    let mut tell = |text: &str| out::say(&format!("{name}: {text}"));
    let mut keeper = Keeper::new(settings, &mut log, &mut attach, &mut tell)?
        .with_table(Table::open(&subject, &lock));
    keeper = match ready {
        Some(ready) if tracked.is_some() => keeper.filling(ready),
        Some(ready) => keeper.not_before(ready),
        None => keeper,
    };
    keeper = match tracked {
        Some(program) if epoch == newest => keeper.going_on(program),
        Some(program) => keeper.with_program(program),
        None => keeper,
    };
    let ending = keeper.run(&mut signals, &mut control)?;
    medium::remember(root, keeper.model());
    drop(keeper);
    if let Some(modes) = modes {
        modes.after(&ending);
    }
    rest.wait()?;
    finish(&subject, &lock, &log, &ending, false)
}

/// A signal that came during the restore was meant to end it: there was no program to pass it to.
fn not_interrupted(signals: &mut SignalQueue) -> Result<(), KeeperError> {
    while let Some(received) = signals
        .take()
        .map_err(KeeperError::io("read the signal queue"))?
    {
        if ENDS.contains(&received.signal) {
            return Err(KeeperError::Told {
                message: "interrupted; nothing was restored".into(),
                exit: u8::try_from(received.signal).map_or(1, |n| n.saturating_add(128)),
            });
        }
    }
    Ok(())
}

fn must_not_run(subject: &Subject, card: &Card) -> Result<(), KeeperError> {
    // A program that was just killed may take a moment to be gone.
    let patience = Instant::now();
    while patience.elapsed() < DYING {
        if !card.runs() {
            return Ok(());
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    let (name, pid) = (subject.name(), card.pid);
    Err(KeeperError::Refused(format!(
        "{name} still runs as pid {pid}, without a keeper: `outlive attach {name}` keeps it again; to restore an epoch instead, end it first (kill {pid})"
    )))
}

/// What a program comes from.
struct Found {
    epoch: u64,
    /// Damage that was made up for.
    warnings: Vec<String>,
}

/// Everything up to the first instruction.
fn prepare(
    dir: &Path,
    args: &RestoreArgs,
    secret: Option<&Secret>,
    track: Option<TrackOptions>,
) -> Result<(Ready, Found), KeeperError> {
    let image = Image::open_own(dir, secret)?;
    let (ready, epoch) = put_in_place(&image, args, track).map_err(|error| image.explain(error))?;
    let what = args
        .name
        .clone()
        .unwrap_or_else(|| dir.display().to_string());
    let warnings = super::image::warnings_of(&image.met(), &what);
    Ok((ready, Found { epoch, warnings }))
}

fn put_in_place(
    image: &Image,
    args: &RestoreArgs,
    track: Option<TrackOptions>,
) -> Result<(Ready, u64), KeeperError> {
    let reader = image.epoch_for_all(args.epoch)?;
    let files = match args.files {
        Files::Reconcile => FilesPolicy::Reconcile,
        Files::Keep => FilesPolicy::Keep,
    };
    let epoch = EpochReader::id(&*reader).0;
    if let (false, Ok(saved)) = (args.new_pid_ns, outlive_process::image::describe(&*reader)) {
        // The number of a program that was just killed is free once its new parent has reaped it.
        let patience = Instant::now();
        while procfs::lingers(saved.root_process) && patience.elapsed() < REAPING {
            std::thread::sleep(Duration::from_millis(2));
        }
    }
    let options = RestoreOptions {
        files,
        new_pid_ns: args.new_pid_ns,
        track,
        lazy: args.lazy.then(|| Source(reader.clone())),
    };
    let reader = Watched::new(Box::new(reader));
    let ready = outlive_process::restore(&reader, &options)?;
    Ok((ready, epoch))
}

impl Teller {
    fn tell(&mut self, restored: Restored, found: Found) {
        let Found { epoch, warnings } = found;
        let Restored {
            pid,
            ns_pid,
            restore_us,
            first_run_us,
            later_bytes,
            mut notices,
        } = restored;
        notices.splice(0..0, warnings);
        let report = Report::Done {
            pids: Pids { pid, ns_pid },
            restore_us,
            first_run_us,
            later_bytes,
            epoch,
            notices,
        };
        match self {
            Self::User { json } => {
                // The program runs: nothing about showing this may stop us from keeping it.
                let _ = report.show(*json);
            }
            Self::Parent(stream) => report.send(stream),
        }
    }
}

impl Report {
    fn send(&self, stream: &mut UnixStream) {
        let Ok(mut text) = serde_json::to_vec(self) else {
            return;
        };
        text.push(b'\n');
        let _ = stream.write_all(&text).and_then(|()| stream.flush());
    }

    fn show(self, json: bool) -> Result<u8, KeeperError> {
        let (pids, restore_us, first_run_us, later_bytes, epoch, notices) = match self {
            Self::Failed { error, exit } => {
                return Err(KeeperError::Told {
                    message: error,
                    exit,
                });
            }
            Self::Done {
                pids,
                restore_us,
                first_run_us,
                later_bytes,
                epoch,
                notices,
            } => (pids, restore_us, first_run_us, later_bytes, epoch, notices),
        };
        for notice in &notices {
            out::say(notice);
        }
        if json {
            out::json(&json!({
                "pid": pids.pid,
                "ns_pid": pids.ns_pid,
                "restore_us": restore_us,
                "first_run_us": first_run_us,
                "later_bytes": later_bytes,
                "epoch": epoch,
                "notices": notices,
            }));
        } else {
            let place = match later_bytes {
                0 => "all in place",
                _ => "in place but for memory that comes later",
            };
            out::say(&format!(
                "pid {pids} runs again from epoch {epoch}: {place} after {}, first run after {}",
                out::time_us(restore_us),
                out::time_us(first_run_us),
            ));
        }
        Ok(0)
    }
}

/// Starts this command again in the background and passes its report on.
fn detach(root: &Root, args: &RestoreArgs, json: bool) -> Result<u8, KeeperError> {
    let (ours, theirs) = UnixStream::pair().map_err(KeeperError::io("make a socket"))?;
    let itself = std::env::current_exe().map_err(KeeperError::io("find this program"))?;
    let (output, errors) = outputs(root, args)?;
    let mut child = Command::new(itself)
        .args(std::env::args_os().skip(1))
        .arg("--background")
        .stdin(Stdio::from(OwnedFd::from(theirs)))
        .stdout(output)
        .stderr(errors)
        .spawn()
        .map_err(KeeperError::io("start the process in the background"))?;
    let mut text = String::new();
    let heard = BufReader::new(ours).read_line(&mut text);
    if heard.is_err() || text.is_empty() {
        let status = child
            .wait()
            .map_err(KeeperError::io("wait for the background"))?;
        return Err(KeeperError::Other(format!(
            "the process in the background ended without a report ({status})"
        )));
    }
    let report: Report = serde_json::from_str(&text).map_err(|e| {
        KeeperError::Other(format!("the process in the background said rubbish: {e}"))
    })?;
    report.show(json)
}

/// Standard output and error of a program in the background: the subject's log; an image has no
/// place of its own for one.
fn outputs(root: &Root, args: &RestoreArgs) -> Result<(Stdio, Stdio), KeeperError> {
    let Some(name) = &args.name else {
        return Ok((Stdio::null(), Stdio::null()));
    };
    let path = root.existing(name)?.log_path();
    let wrap = |error| KeeperError::io::<std::io::Error>(format!("open {}", path.display()))(error);
    let file: File = OpenOptions::new()
        .append(true)
        .create(true)
        .mode(0o600)
        .open(&path)
        .map_err(wrap)?;
    let other = file.try_clone().map_err(wrap)?;
    Ok((file.into(), other.into()))
}

/// The process in the background: standard input is the socket for the report.
fn in_background(root: &Root, args: &RestoreArgs) -> Result<u8, KeeperError> {
    let socket = rustix::io::fcntl_dupfd_cloexec(rustix::stdio::stdin(), 3)
        .map_err(KeeperError::io("take the socket for the report"))?;
    let null = File::open("/dev/null").map_err(KeeperError::io("open /dev/null"))?;
    rustix::stdio::dup2_stdin(&null).map_err(KeeperError::io("replace standard input"))?;
    rustix::process::setsid().map_err(KeeperError::io("begin a session"))?;
    let socket = UnixStream::from(socket);
    let again = socket
        .try_clone()
        .map_err(KeeperError::io("keep the socket"))?;
    let mut teller = Teller::Parent(socket);
    let done = here(root, args, &mut teller);
    if let Err(error) = &done {
        // After a report that all is well nobody listens any more; this is then lost.
        let (error, exit) = (error.to_string(), error.exit_code());
        Report::Failed { error, exit }.send(&mut { again });
    }
    done
}
