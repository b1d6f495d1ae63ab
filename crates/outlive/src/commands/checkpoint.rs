//! `checkpoint`: one epoch now.

use crate::cli::CheckpointArgs;
use crate::out;
use crate::progress::{self, Counted};
use outlive_epoch::{Acked, EpochFacts, StoreError};
use outlive_epoch_store::Secret;
use outlive_keeper::control::{Reply, Request, ask};
use outlive_keeper::epoch::{EpochLog, Manner, Nobody, Program, Steps, Taken, micros, take};
use outlive_keeper::images::{self, Image, Log, Summary};
use outlive_keeper::keys;
use outlive_keeper::procfs::Pids;
use outlive_keeper::subject::{Root, Subject};
use outlive_keeper::{KeeperError, procfs};
use outlive_process::image::SubjectState;
use outlive_process::{TrackOptions, Tracked};
use serde_json::json;
use std::path::Path;
use std::time::{Duration, Instant};

/// How long a thread may take to stop, where nothing else is asked for.
const STOP_TIMEOUT: Duration = Duration::from_secs(5);

/// `outlive checkpoint`
pub fn checkpoint(root: &Root, args: &CheckpointArgs, json: bool) -> Result<u8, KeeperError> {
    let (what, pids, taken) = match (&args.name, args.pid, &args.image) {
        (Some(name), _, Some(image)) => {
            let (pids, taken) = copy(root, name, image, args)?;
            (image.display().to_string(), pids, taken)
        }
        (Some(name), _, None) => {
            let subject = root.existing(name)?;
            let taken = through_keeper(&subject, Request::Checkpoint, args.timeout)?;
            let (pids, taken) = taken.ok_or_else(|| {
                KeeperError::Refused(format!(
                    "{name} is not kept by anybody now; `outlive restore {name}` continues it"
                ))
            })?;
            (name.clone(), pids, taken)
        }
        (None, Some(pid), Some(image)) => (
            image.display().to_string(),
            Pids::of(pid),
            to_image(args, pid, image)?,
        ),
        _ => {
            return Err(KeeperError::Usage(
                "give a NAME, or --pid PID and --image DIR".into(),
            ));
        }
    };
    show(&what, pids, &taken, json);
    Ok(0)
}

/// What the keeper took; `None` without a keeper.
fn through_keeper(
    subject: &Subject,
    request: Request,
    patience: Option<Duration>,
) -> Result<Option<(Pids, Taken)>, KeeperError> {
    match ask(subject.dir(), request, patience)? {
        Some(Reply::Taken { epoch, pids, .. }) => Ok(Some((pids, epoch))),
        Some(other) => Err(other.into_error()),
        None => Ok(None),
    }
}

/// Copies the newest state of a subject into an image of its own. What the keeper takes for it is
/// in the store first, so nothing is lost where the copy fails.
fn copy(
    root: &Root,
    name: &str,
    image: &Path,
    args: &CheckpointArgs,
) -> Result<(Pids, Taken), KeeperError> {
    let began = Instant::now();
    let subject = root.existing(name)?;
    must_be_free(image)?;
    let asked = args.key.source()?;
    let secret = keys::of_subject(asked.as_ref(), &subject, &subject.card()?)?;
    must_be_readable(&subject, secret.as_ref())?;
    let request = if args.leave_running {
        Request::Checkpoint
    } else {
        Request::Stop
    };
    let taken = through_keeper(&subject, request, args.timeout)?;
    let stopped = taken.is_some() && !args.leave_running;
    let existed = image.exists();
    let copied = copy_newest(&subject, image, secret.as_ref());
    let (saved, summary, acked) = copied.inspect_err(|_| {
        discard(image, existed);
        if stopped {
            out::say(&format!(
                "{name} is stopped, and its last epoch is in the store: `outlive restore {name}` \
                 continues it"
            ));
        }
    })?;
    // Where nobody keeps it, nobody knows what it was here.
    let ns_pid = saved.root_process;
    let pids = taken.map_or(
        Pids {
            pid: ns_pid,
            ns_pid,
        },
        |(pids, _)| pids,
    );
    let processes = u32::try_from(saved.processes.len()).unwrap_or(u32::MAX);
    let taken = Taken {
        epoch: acked.epoch.0,
        time_ns: summary.time_ns,
        processes,
        threads: saved.threads,
        stop_us: summary.stop_us,
        durable_us: micros(began.elapsed()),
        pages: acked.pages,
        bytes_written: acked.bytes_written,
        saved_bytes: acked.saved_bytes,
        steps: Steps::default(),
    };
    Ok((pids, taken))
}

/// Another key than that of the epochs is found out before anything is asked of the keeper, which may end the
/// program for it.
fn must_be_readable(subject: &Subject, secret: Option<&Secret>) -> Result<(), KeeperError> {
    match Image::open_with(&subject.epochs_dir(), secret) {
        // The first one is still to come.
        Err(StoreError::Missing { .. }) => Ok(()),
        opened => {
            opened?.epoch(None)?;
            Ok(())
        }
    }
}

fn copy_newest(
    subject: &Subject,
    image: &Path,
    secret: Option<&Secret>,
) -> Result<(SubjectState, Summary, Acked), KeeperError> {
    let source = Image::open_with(&subject.epochs_dir(), secret)?;
    let summary = source
        .epochs()
        .pop()
        .ok_or_else(|| KeeperError::Refused(format!("{} has no epoch yet", subject.name())))?;
    let reader = source.epoch(Some(summary.epoch))?;
    let saved = outlive_process::image::describe(&*reader)?;
    let all = progress::bytes(&reader.runs());
    // The copy is as private as what it is a copy of.
    let mut log = Log::create_with(image, secret)?;
    let writer = Box::new(Counted::new(log.begin()?, all));
    let facts = EpochFacts {
        taken_at_ns: summary.time_ns,
        stop_us: summary.stop_us,
    };
    let acked = images::copy(&*reader, facts, writer)?;
    Ok((saved, summary, acked))
}

fn to_image(args: &CheckpointArgs, pid: u32, image: &Path) -> Result<Taken, KeeperError> {
    if pid == std::process::id() {
        return Err(KeeperError::Usage(
            "outlive cannot take an image of itself".into(),
        ));
    }
    if procfs::start_time(pid).is_none() {
        return Err(KeeperError::Other(format!("there is no process {pid}")));
    }
    must_be_free(image)?;
    let secret = args.key.source()?.map(|source| source.read()).transpose()?;
    let stop_timeout = args.timeout.unwrap_or(STOP_TIMEOUT);
    // Tracked also for one epoch: most of it is then copied while the program runs, and flows to
    // the medium at the same time.
    let options = TrackOptions {
        stop_timeout,
        ..TrackOptions::default()
    };
    let began = Instant::now();
    let mut program = Tracked::attach(pid, options)?;
    let existed = image.exists();
    let done = Log::create_with(image, secret.as_ref()).and_then(|mut log| {
        let writer = Box::new(Counted::new(log.begin()?, resident(pid)));
        let manner = if args.leave_running {
            Manner::Running
        } else {
            Manner::Ending
        };
        let (taken, _) = take(&mut program, writer, manner, &mut Nobody, &mut false)?;
        Ok(taken)
    });
    match done {
        Ok(taken) => {
            // All of it was copied for this image: its time counts from the beginning.
            let durable_us = micros(began.elapsed());
            if args.leave_running {
                Program::detach(program)?;
            }
            Ok(Taken {
                durable_us,
                ..taken
            })
        }
        Err(error) => {
            let _ = Program::detach(program);
            discard(image, existed);
            Err(error)
        }
    }
}

/// Bytes of a process that are in memory, about; 0 where that is not known.
fn resident(pid: u32) -> u64 {
    let pages = procfs::resident_pages(pid).unwrap_or(0);
    pages.saturating_mul(outlive_epoch::PAGE_SIZE as u64)
}

/// An image needs a directory of its own.
fn must_be_free(image: &Path) -> Result<(), KeeperError> {
    let place = image.display();
    match std::fs::read_dir(image).map(|mut entries| entries.next().is_some()) {
        Ok(true) => Err(KeeperError::Refused(format!(
            "{place} is not empty: an image needs a new or empty directory"
        ))),
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(KeeperError::io(format!("read {place}"))(error))
        }
        _ => Ok(()),
    }
}

/// Removes what a failed attempt left, where the directory was ours to make.
fn discard(image: &Path, existed: bool) {
    if !existed {
        let _ = std::fs::remove_dir_all(image);
    }
}

fn show(what: &str, pids: Pids, taken: &Taken, json: bool) {
    if json {
        out::json(&json!({
            "pid": pids.pid,
            "ns_pid": pids.ns_pid,
            "processes": taken.processes,
            "threads": taken.threads,
            "stop_us": taken.stop_us,
            "durable_us": taken.durable_us,
            "pages": taken.pages,
            "bytes_written": taken.bytes_written,
            "saved_bytes": taken.saved_bytes,
            "epoch": taken.epoch,
            "time": out::moment(taken.time_ns),
        }));
        return;
    }
    out::line(&format!(
        "{what}: epoch {} of pid {pids} ({}, {})",
        taken.epoch,
        out::plural(taken.processes.into(), "process", "processes"),
        out::plural(taken.threads.into(), "thread", "threads"),
    ));
    out::line(&format!(
        "stopped {}, durable after {}, {}, {} written",
        out::time_us(taken.stop_us),
        out::time_us(taken.durable_us),
        out::plural(taken.pages, "page", "pages"),
        out::bytes(taken.bytes_written),
    ));
}
