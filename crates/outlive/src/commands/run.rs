//! `run` and `attach`: a keeper in the foreground.

use crate::cli::{AttachArgs, Pace, RunArgs};
use crate::out;
use outlive_epoch::StoreError;
use outlive_keeper::KeeperError;
use outlive_keeper::control::Control;
use outlive_keeper::images::{Image, Log};
use outlive_keeper::keep::{Ending, Keeper, SIGNALS, Settings, now_ns};
use outlive_keeper::procfs;
use outlive_keeper::subject::{CARD_VERSION, Card, Lock, Root, Subject};
use outlive_linux::signals::SignalQueue;
use outlive_process::{ProcessError, TrackOptions, Tracked};
use std::io::ErrorKind;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

/// `outlive run`
pub fn run(root: &Root, args: &RunArgs) -> Result<u8, KeeperError> {
    let Some((program, words)) = args.command.split_first() else {
        return Err(KeeperError::Usage("no program is given".into()));
    };
    let name = match &args.name {
        Some(name) => name.clone(),
        None => root.free_name(&PathBuf::from(program)),
    };
    let subject = root.subject(&name)?;
    let new = !subject.dir().exists();
    let lock = claim(&subject)?;
    let mut log = fresh_log(&subject)?;
    let mut signals = queue()?;
    let mut child = match Command::new(program).args(words).spawn() {
        Ok(child) => child,
        Err(error) => {
            if new {
                drop(log);
                subject.remove(&lock)?;
            }
            return Err(not_started(&program.to_string_lossy(), &error));
        }
    };
    let pid = child.id();
    let command = args
        .command
        .iter()
        .map(|word| word.to_string_lossy().into_owned())
        .collect();
    let kept = card(pid, command, args.pace.every)
        .and_then(|card| subject.write_card(&lock, &card))
        .and_then(|()| Control::open(subject.dir()));
    let mut control = match kept {
        Ok(control) => control,
        Err(error) => {
            // A program that cannot be kept is not left behind unkept.
            let _ = child.kill();
            let _ = child.wait();
            return Err(error);
        }
    };
    let settings = Settings {
        pid,
        every: args.pace.every,
        child: true,
    };
    let options = options(&args.pace);
    let mut attach = || Tracked::attach(pid, options.clone());
    let mut tell = |text: &str| out::say(&format!("{name}: {text}"));
    let ending =
        Keeper::new(settings, &mut log, &mut attach, &mut tell)?.run(&mut signals, &mut control)?;
    finish(&subject, &lock, &ending)
}

/// `outlive attach`
pub fn attach(root: &Root, args: &AttachArgs) -> Result<u8, KeeperError> {
    let pid = args.pid;
    let command = procfs::command(pid)
        .ok_or_else(|| KeeperError::Other(format!("there is no program with pid {pid}")))?;
    let name = match &args.name {
        Some(name) => name.clone(),
        None => root.free_name(&PathBuf::from(command.first().map_or("", String::as_str))),
    };
    let subject = root.subject(&name)?;
    let mut signals = queue()?;
    let options = options(&args.pace);
    let mut attach = || Tracked::attach(pid, options.clone());
    let program = attach()?;
    let lock = claim(&subject)?;
    let mut log = match subject.card() {
        Ok(card) if card.pid == pid && card.runs() => reopened_log(&subject)?,
        _ => fresh_log(&subject)?,
    };
    subject.write_card(&lock, &card(pid, command, args.pace.every)?)?;
    let mut control = Control::open(subject.dir())?;
    out::say(&format!(
        "{name}: keeping pid {pid}; Ctrl-C leaves it running"
    ));
    let settings = Settings {
        pid,
        every: args.pace.every,
        child: false,
    };
    let mut tell = |text: &str| out::say(&format!("{name}: {text}"));
    let ending = Keeper::new(settings, &mut log, &mut attach, &mut tell)?
        .with_program(program)
        .run(&mut signals, &mut control)?;
    finish(&subject, &lock, &ending)
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

fn options(pace: &Pace) -> TrackOptions {
    TrackOptions {
        stop_timeout: pace.timeout,
        incremental: true,
    }
}

/// Makes the subject's directory and becomes its keeper.
pub fn claim(subject: &Subject) -> Result<Lock, KeeperError> {
    subject.make()?;
    subject.lock()
}

/// A new log for a subject that must not have epochs.
fn fresh_log(subject: &Subject) -> Result<Log, KeeperError> {
    let (name, dir) = (subject.name(), subject.epochs_dir());
    match Image::open(&dir) {
        Ok(image) => {
            if let Some(last) = image.epochs().last() {
                return Err(KeeperError::Refused(format!(
                    "{name} has epochs up to {} of an earlier run: `outlive restore {name}` \
                     continues it, `outlive forget {name}` removes it, --name makes another",
                    last.epoch
                )));
            }
        }
        Err(StoreError::Missing { .. }) => {}
        Err(error) => return Err(error.into()),
    }
    Log::create(&dir)
}

/// The log of a program whose keeper died: its epochs are continued.
fn reopened_log(subject: &Subject) -> Result<Log, KeeperError> {
    match Log::open(&subject.epochs_dir()) {
        Err(KeeperError::Store(StoreError::Missing { .. })) => fresh_log(subject),
        other => other,
    }
}

/// What is to be known of a running process.
pub fn card(pid: u32, command: Vec<String>, every: Duration) -> Result<Card, KeeperError> {
    let gone = || ProcessError::Gone {
        pid,
        what: "ended before it could be kept".into(),
    };
    Ok(Card {
        version: CARD_VERSION,
        command,
        every_ns: u64::try_from(every.as_nanos()).unwrap_or(u64::MAX),
        pid,
        // A child that has ended already is still there to be waited for, without a start time.
        started: procfs::start_time(pid)
            .or_else(|| procfs::exists(pid).then_some(0))
            .ok_or_else(gone)?,
        boot: procfs::boot_id(),
        since_ns: now_ns(),
        ended: None,
    })
}

/// Records how the program ended and passes its status on.
pub fn finish(subject: &Subject, lock: &Lock, ending: &Ending) -> Result<u8, KeeperError> {
    let name = subject.name();
    let (ended, code) = match ending {
        Ending::Exited(code) => (Some(format!("exit status {code}")), *code),
        Ending::Killed(signal) => (Some(format!("signal {signal}")), signal.saturating_add(128)),
        Ending::Gone => (Some("ended".into()), 0),
        Ending::Planned(taken) => {
            out::say(&format!(
                "{name}: stopped at epoch {}; `outlive restore {name}` continues it",
                taken.epoch
            ));
            (Some("stopped".into()), 0)
        }
        Ending::Detached => {
            out::say(&format!("{name}: no longer kept; the program runs on"));
            (None, 0)
        }
    };
    if let Ok(card) = subject.card() {
        subject.write_card(lock, &Card { ended, ..card })?;
    }
    Ok(code)
}
