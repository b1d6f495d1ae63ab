//! `run` and `attach`: a keeper in the foreground.

use super::{device, medium};
use crate::cli::{AttachArgs, Device, KeyArgs, Pace, RunArgs};
use crate::out;
use crate::terminal::Modes;
use outlive_epoch::{PAGE_SIZE, StoreError};
use outlive_epoch_store::Secret;
use outlive_keeper::KeeperError;
use outlive_keeper::budget::keeping::HoldUp;
use outlive_keeper::budget::model::Figures;
use outlive_keeper::budget::strict;
use outlive_keeper::control::Control;
use outlive_keeper::epoch::EpochLog;
use outlive_keeper::images::{Image, Log};
use outlive_keeper::keep::{Ending, Keeper, SIGNALS, Settings, now_ns};
use outlive_keeper::keys::{self, KeySource};
use outlive_keeper::procfs;
use outlive_keeper::subject::{CARD_VERSION, Card, Lock, Root, Subject};
use outlive_keeper::table::{self, Table};
use outlive_linux::signals::SignalQueue;
use outlive_process::{ProcessError, TrackOptions, Tracked};
use serde_json::json;
use std::io::ErrorKind;
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

/// How long `attach` waits for a program that an earlier keeper left in the middle of a stop.
const HELPING_ITSELF: Duration = Duration::from_secs(10);

/// `outlive run`
pub fn run(root: &Root, args: &RunArgs, json: bool) -> Result<u8, KeeperError> {
    let Some((program, words)) = args.command.split_first() else {
        return Err(KeeperError::Usage("no program is given".into()));
    };
    let name = match &args.name {
        Some(name) => name.clone(),
        None => root.free_name(&PathBuf::from(program)),
    };
    if !args.pass_fds {
        withhold()?;
    }
    let subject = root.subject(&name)?;
    let hold_up = args.pace.promise.hold_up();
    let model = medium::model(root, hold_up, 0)?;
    let key = key(&args.key, hold_up)?;
    let secret = key.as_ref().map(KeySource::read).transpose()?;
    let new = !subject.dir().exists();
    let lock = claim(&subject)?;
    let mut log = fresh_log(&subject, &lock, &args.device, secret.as_ref())?;
    let mut signals = queue()?;
    let command: Vec<String> = args
        .command
        .iter()
        .map(|w| w.to_string_lossy().into())
        .collect();
    // Whoever sees the program sees that it is kept: the socket and the card are there first.
    subject.write_card(&lock, &blank_card(command, &args.pace, key))?;
    let mut control = Control::open(subject.dir())?;
    let modes = Modes::note();
    adopt_strays()?;
    let mut child = match signals
        .release_in(Command::new(program).args(words))
        .spawn()
    {
        Ok(child) => child,
        Err(error) => {
            if new {
                subject.remove(&lock)?;
            }
            return Err(not_started(&program.to_string_lossy(), &error));
        }
    };
    let pid = child.id();
    if let Err(error) = introduce(&subject, &lock, pid) {
        // A program that cannot be kept is not left behind unkept.
        let _ = child.kill();
        let _ = child.wait();
        return Err(error);
    }
    let child = true;
    let settings = Settings {
        pid,
        every: args.pace.every,
        capture: args.pace.capture(),
        child,
        hold_up,
        max_wear: args.pace.promise.max_wear,
        max_stop: args.pace.promise.max_stop,
        policy: args.pace.promise.policy(),
        pack: args.pace.promise.codec().flatten(),
        model,
    };
    let options = options(&args.pace, true);
    let mut attach = || Tracked::attach(pid, options.clone());
    let mut tell = |text: &str| out::say(&format!("{name}: {text}"));
    let keeper = Keeper::new(settings, &mut log, &mut attach, &mut tell)?;
    let mut keeper = keeper.with_table(Table::open(&subject, &lock));
    let ending = keeper.run(&mut signals, &mut control)?;
    medium::remember(root, keeper.model());
    drop(keeper);
    if let Some(modes) = modes {
        modes.after(&ending);
    }
    finish(&subject, &lock, &log, &ending, json)
}

/// `outlive attach`
pub fn attach(root: &Root, args: &AttachArgs, json: bool) -> Result<u8, KeeperError> {
    let (pid, name, known) = whom(root, args)?;
    let command = procfs::command(pid)
        .ok_or_else(|| KeeperError::Other(format!("there is no program with pid {pid}")))?;
    let subject = root.subject(&name)?;
    let key = key(&args.key, args.pace.promise.hold_up())?;
    let mut card = blank_card(command, &args.pace, key.clone());
    let secret = match &known {
        Some(known) => keys::of_subject(key.as_ref(), &subject, known)?,
        None => key.as_ref().map(KeySource::read).transpose()?,
    };
    if let Some(known) = known {
        card = Card {
            ended: None,
            key: key.or_else(|| known.key.clone()),
            ..known
        };
    }
    let (strategy, granularity) = card.capture.read()?;
    let hold_up = card.hold_up;
    let model = medium::model(root, hold_up, procfs::resident_pages(pid).unwrap_or(0))?;
    let mut signals = queue()?;
    let options = TrackOptions {
        strategy,
        granularity,
        files_limit: card.files_limit(),
        strict: hold_up.is_some_and(|h| h.strict),
        ..options(&args.pace, false)
    };
    let mut attach = || Tracked::attach(pid, options.clone());
    let program = patiently(&mut attach)?;
    if let Some(hold_up) = hold_up.filter(|h| h.strict) {
        must_be_bounded(&program, &model.figures(), hold_up)?;
    }
    let lock = claim(&subject)?;
    let mut log = match subject.card() {
        Ok(card) if card.pid == pid && card.runs() => {
            reopened_log(&subject, &lock, &args.device, secret.as_ref())?
        }
        _ => fresh_log(&subject, &lock, &args.device, secret.as_ref())?,
    };
    subject.write_card(&lock, &card)?;
    introduce(&subject, &lock, pid)?;
    let mut control = Control::open(subject.dir())?;
    out::say(&format!(
        "{name}: keeping pid {pid}; Ctrl-C leaves it running"
    ));
    let settings = Settings {
        pid,
        every: Duration::from_nanos(card.every_ns),
        max_stop: card.max_stop(),
        policy: card.policy(),
        pack: card.codec()?,
        capture: card.capture,
        child: false,
        hold_up,
        max_wear: card.max_wear,
        model,
    };
    let mut tell = |text: &str| out::say(&format!("{name}: {text}"));
    let keeper = Keeper::new(settings, &mut log, &mut attach, &mut tell)?;
    let keeper = keeper.with_program(program);
    let mut keeper = keeper.with_table(Table::open(&subject, &lock));
    let ending = keeper.run(&mut signals, &mut control)?;
    medium::remember(root, keeper.model());
    drop(keeper);
    finish(&subject, &lock, &log, &ending, json)
}

/// Refuses a program of which more can be guarded by nobody than the budget has room for.
fn must_be_bounded(
    program: &Tracked,
    figures: &Figures,
    hold_up: HoldUp,
) -> Result<(), KeeperError> {
    program.expose();
    let exposed = program.exposed_pages().saturating_mul(PAGE_SIZE as u64);
    let Err(least) = strict::bound(figures, hold_up.budget_ns, exposed) else {
        return Ok(());
    };
    Err(KeeperError::Refused(format!(
        "pid {}: --strict cannot be kept with this --hold-up: {} KiB of its memory can be guarded by \
         nobody (private mappings of files, memory that is shared) and count as written all the time; \
         with that it takes --hold-up {}ms here, or leave out --strict",
        program.pid(),
        exposed >> 10,
        least.div_ceil(1_000_000),
    )))
}

/// Who is to be kept, under which name, and how, where it is a subject whose keeper died.
fn whom(root: &Root, args: &AttachArgs) -> Result<(u32, String, Option<Card>), KeeperError> {
    if let Some(name) = &args.subject {
        let card = root.existing(name)?.card()?;
        if !card.runs() {
            return Err(KeeperError::Refused(format!(
                "{name} does not run; `outlive restore {name}` continues it"
            )));
        }
        return Ok((card.pid, name.clone(), Some(card)));
    }
    let pid = args
        .pid
        .ok_or_else(|| KeeperError::Usage("give a NAME or --pid PID".into()))?;
    if let Some(name) = &args.name {
        return Ok((pid, name.clone(), None));
    }
    let card = |name: &String| root.subject(name).and_then(|subject| subject.card());
    let its = |name: &String| card(name).is_ok_and(|card| card.pid == pid && card.runs());
    if let Some(name) = root.names()?.into_iter().find(its) {
        return Ok((pid, name, None));
    }
    let command = procfs::command(pid).unwrap_or_default();
    let program = command.first().map_or("", String::as_str);
    Ok((pid, root.free_name(&PathBuf::from(program)), None))
}

/// Begins to track. A program whose keeper died in the middle of a stop needs a few seconds to
/// help itself, and is refused until then with the advice to try again: which is done here.
fn patiently(
    attach: &mut dyn FnMut() -> Result<Tracked, ProcessError>,
) -> Result<Tracked, ProcessError> {
    let began = Instant::now();
    loop {
        match attach() {
            Err(ProcessError::Refused(all))
                if began.elapsed() < HELPING_ITSELF
                    && all.iter().all(|one| one.remedy.starts_with("try again")) =>
            {
                std::thread::sleep(Duration::from_millis(100));
            }
            other => return other,
        }
    }
}

/// Keeps what could not be restored from programs that this process starts.
pub fn withhold() -> Result<(), KeeperError> {
    outlive_linux::inherited::withhold_pipes_and_sockets()
        .map_err(KeeperError::io("look at inherited descriptors"))
}

fn not_started(program: &str, error: &std::io::Error) -> KeeperError {
    let exit = match error.kind() {
        ErrorKind::NotFound => 127,
        _ => 126,
    };
    KeeperError::Told {
        message: format!("cannot start {program}: {error}"),
        exit,
    }
}

/// The signals of a keeper, from now on in a queue.
pub fn queue() -> Result<SignalQueue, KeeperError> {
    SignalQueue::open(&SIGNALS).map_err(KeeperError::io("open a queue of signals"))
}

/// Processes of the program whose parents have ended become children of this process, and stay with
/// the program.
pub fn adopt_strays() -> Result<(), KeeperError> {
    rustix::process::set_child_subreaper(Some(rustix::process::getpid()))
        .map_err(|e| KeeperError::io("become the parent of strays")(e))
}

fn options(pace: &Pace, strays: bool) -> TrackOptions {
    let usual = TrackOptions::default().threads;
    TrackOptions {
        threads: pace.threads.unwrap_or(usual),
        stop_timeout: pace.timeout,
        strategy: pace.strategy(),
        granularity: pace.granularity,
        files_limit: pace.files_limit,
        strays,
        strict: pace.promise.strict,
        ..defaults()
    }
}

/// What `OUTLIVE_TRACKING=soft-dirty` asks for, which is for tests.
pub fn defaults() -> TrackOptions {
    let soft_dirty = std::env::var_os("OUTLIVE_TRACKING").is_some_and(|v| v == "soft-dirty");
    TrackOptions {
        soft_dirty,
        ..TrackOptions::default()
    }
}

/// Makes the subject's directory and becomes its keeper.
pub fn claim(subject: &Subject) -> Result<Lock, KeeperError> {
    subject.make()?;
    subject.lock()
}

/// The place of the key that was asked for.
fn key(asked: &KeyArgs, hold_up: Option<HoldUp>) -> Result<Option<KeySource>, KeeperError> {
    let source = asked.source()?;
    if source.is_some() && hold_up.is_some() {
        return Err(KeeperError::Usage(UNTIMED.into()));
    }
    Ok(source)
}

/// Why a key and a hold-up budget exclude each other.
pub const UNTIMED: &str = "a hold-up budget counts no time for encryption, which an event would have to wait for: \
                           leave out --hold-up or the key";

/// A new log for a subject that must not have epochs.
fn fresh_log(
    subject: &Subject,
    lock: &Lock,
    chosen: &Device,
    secret: Option<&Secret>,
) -> Result<Log, KeeperError> {
    let dir = subject.epochs_dir();
    match Image::open(&dir) {
        Ok(image) => {
            if let Some(last) = image.epochs().last() {
                return Err(earlier(subject, last.epoch));
            }
        }
        Err(StoreError::Missing { .. }) => {}
        Err(error) => return Err(error.into()),
    }
    table::forget(subject, lock);
    device::choose(subject, chosen)?;
    Log::create_with(&dir, secret)
}

/// Refuses to begin where the epochs of an earlier program would be lost.
fn earlier(subject: &Subject, last: u64) -> KeeperError {
    let name = subject.name();
    let card = subject.card().ok();
    if let Some(pid) = card.as_ref().filter(|card| card.runs()).map(|c| c.pid) {
        return KeeperError::Refused(format!(
            "{name} still runs as pid {pid}, without a keeper: `outlive attach {name}` keeps it \
             again; --name makes another subject"
        ));
    }
    let how = match card.and_then(|card| card.ended) {
        Some(how) if how == "stopped" => "was stopped".into(),
        Some(how) if how == "ended" => "ended by itself".into(),
        Some(how) => format!("ended ({how})"),
        None => "was cut short".into(),
    };
    KeeperError::Refused(format!(
        "{name} {how}, and its epochs up to {last} are still there: `outlive restore {name}` \
         continues it from there, `outlive forget {name}` removes them so that you can begin \
         anew, --name makes another subject"
    ))
}

/// The log of a program whose keeper died: its epochs are continued.
fn reopened_log(
    subject: &Subject,
    lock: &Lock,
    chosen: &Device,
    secret: Option<&Secret>,
) -> Result<Log, KeeperError> {
    match Log::open(&subject.epochs_dir(), secret) {
        Err(KeeperError::Store(StoreError::Missing { .. })) => {
            fresh_log(subject, lock, chosen, secret)
        }
        other => other,
    }
}

/// A card of a program that is not there yet.
fn blank_card(command: Vec<String>, pace: &Pace, key: Option<KeySource>) -> Card {
    Card {
        version: CARD_VERSION,
        command,
        every_ns: u64::try_from(pace.every.as_nanos()).unwrap_or(u64::MAX),
        capture: pace.capture(),
        hold_up: pace.promise.hold_up(),
        max_wear: pace.promise.max_wear,
        max_stop_us: pace.promise.max_stop_us(),
        files_limit: Some(pace.files_limit),
        keep: pace.promise.keep,
        max_size: pace.promise.max_size,
        compress: pace
            .promise
            .codec()
            .flatten()
            .map(|codec| codec.to_string()),
        key,
        pid: 0,
        started: 0,
        boot: procfs::boot_id(),
        since_ns: now_ns(),
        ended: None,
    }
}

/// Writes into the card which process it is about.
pub fn introduce(subject: &Subject, lock: &Lock, pid: u32) -> Result<(), KeeperError> {
    // A child that has ended already waits to be reaped and has no start time any more.
    let started = procfs::start_time(pid).unwrap_or(0);
    let boot = procfs::boot_id();
    let card = Card {
        pid,
        started,
        boot,
        ended: None,
        ..subject.card()?
    };
    subject.write_card(lock, &card)
}

/// Whether standard error is a file.
fn says_to_file() -> bool {
    use rustix::fs::{FileType, fstat};
    let stat = fstat(rustix::stdio::stderr());
    stat.is_ok_and(|stat| FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile)
}

/// Records how the program ended, says what can be done now, and passes its status on.
pub fn finish(
    subject: &Subject,
    lock: &Lock,
    log: &dyn EpochLog,
    ending: &Ending,
    json: bool,
) -> Result<u8, KeeperError> {
    let (name, newest) = (subject.name(), log.newest());
    let code = ending.code();
    let ended = match ending {
        Ending::Exited(code) => Some(format!("exit status {code}")),
        Ending::Killed(signal) => Some(format!("signal {signal}")),
        Ending::Gone => Some("ended".into()),
        Ending::Planned(_) => Some("stopped".into()),
        Ending::Detached => None,
    };
    let remedy = format!("`outlive restore {name}` continues it from epoch {newest}");
    match ending {
        Ending::Killed(signal) if newest > 0 => {
            out::say(&format!("{name}: ended by signal {signal}; {remedy}"));
        }
        // Whoever asked for it is told as well. In a file that the program has, too, these words
        // would count as its own, written after the epoch.
        Ending::Planned(_) if !says_to_file() => {
            out::say(&format!("{name}: stopped; {remedy}"));
        }
        Ending::Detached => out::say(&format!("{name}: no longer kept; the program runs on")),
        _ => {}
    }
    if let Ok(card) = subject.card() {
        let ended = ended.clone();
        // A full store is no reason to lose the program's exit status.
        if let Err(error) = subject.write_card(lock, &Card { ended, ..card }) {
            out::say(&format!("{name}: how it ended could not be noted: {error}"));
        }
    }
    if json {
        let state = ended.unwrap_or_else(|| "not kept".into());
        out::json(&json!({ "name": name, "state": state, "epoch": newest, "exit": code }));
    }
    Ok(code)
}
