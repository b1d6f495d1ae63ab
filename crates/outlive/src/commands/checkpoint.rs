//! `checkpoint`: one epoch now.

use crate::cli::CheckpointArgs;
use crate::out;
use outlive_keeper::control::{Reply, Request, ask};
use outlive_keeper::epoch::{EpochLog, Program, Taken, micros, take, take_and_end};
use outlive_keeper::images::Log;
use outlive_keeper::subject::Root;
use outlive_keeper::{KeeperError, procfs};
use outlive_process::{TrackOptions, Tracked};
use serde_json::json;
use std::path::Path;
use std::time::{Duration, Instant};

/// How long a thread may take to stop, where nothing else is asked for.
const STOP_TIMEOUT: Duration = Duration::from_secs(5);

/// `outlive checkpoint`
pub fn checkpoint(root: &Root, args: &CheckpointArgs, json: bool) -> Result<u8, KeeperError> {
    let (what, pid, taken) = match (&args.name, args.pid, &args.image) {
        (Some(name), _, _) => {
            let (pid, taken) = through_keeper(root, name, args.timeout)?;
            (name.clone(), pid, taken)
        }
        (None, Some(pid), Some(image)) => (
            image.display().to_string(),
            pid,
            to_image(args, pid, image)?,
        ),
        _ => {
            return Err(KeeperError::Usage(
                "give a NAME, or --pid PID and --image DIR".into(),
            ));
        }
    };
    show(&what, pid, &taken, json);
    Ok(0)
}

fn through_keeper(
    root: &Root,
    name: &str,
    patience: Option<Duration>,
) -> Result<(u32, Taken), KeeperError> {
    let subject = root.existing(name)?;
    match ask(subject.dir(), Request::Checkpoint, patience)? {
        Some(Reply::Taken { epoch, pid, .. }) => Ok((pid, epoch)),
        Some(Reply::Failed { error, exit }) => Err(KeeperError::Told {
            message: error,
            exit,
        }),
        Some(Reply::Status(_)) => Err(KeeperError::Other(format!(
            "the keeper of {name} answered rubbish"
        ))),
        None => Err(KeeperError::Refused(format!(
            "{name} is not kept by anybody now; `outlive restore {name}` continues it"
        ))),
    }
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
    let stop_timeout = args.timeout.unwrap_or(STOP_TIMEOUT);
    // Tracked also for one epoch: most of it is then copied while the program runs, and flows to
    // the medium at the same time.
    let options = TrackOptions {
        stop_timeout,
        incremental: true,
    };
    let began = Instant::now();
    let mut program = Tracked::attach(pid, options)?;
    let existed = image.exists();
    let done = Log::create(image).and_then(|mut log| {
        let writer = log.begin()?;
        let taken = if args.leave_running {
            take(&mut program, writer)
        } else {
            take_and_end(&mut program, writer)
        };
        Ok(taken?)
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

fn show(what: &str, pid: u32, taken: &Taken, json: bool) {
    if json {
        out::json(&json!({
            "pid": pid,
            "processes": taken.processes,
            "threads": taken.threads,
            "stop_us": taken.stop_us,
            "durable_us": taken.durable_us,
            "pages": taken.pages,
            "bytes_written": taken.bytes_written,
            "epoch": taken.epoch,
            "time": out::moment(taken.time_ns),
        }));
        return;
    }
    out::line(&format!(
        "{what}: epoch {} of pid {pid} ({}, {})",
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
