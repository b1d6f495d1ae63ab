//! `stop`, `power simulate`, `forget`: planned ends.

use super::run::claim;
use crate::out;
use outlive_keeper::KeeperError;
use outlive_keeper::control::{Reply, Request, ask};
use outlive_keeper::epoch::{Taken, micros};
use outlive_keeper::procfs::Pids;
use outlive_keeper::subject::{Root, Subject};
use serde_json::{Value, json};
use std::time::{Duration, Instant};

/// How long the keeper may take to be gone after it answered.
const GOODBYE: Duration = Duration::from_secs(5);

/// A planned end, as the keeper told of it.
struct End {
    pids: Pids,
    taken: Taken,
    /// From the request, as it was sent, until the program had ended, microseconds.
    event_us: u64,
}

/// `outlive stop`
pub fn stop(root: &Root, name: &str, json: bool) -> Result<u8, KeeperError> {
    let subject = root.existing(name)?;
    let Some(end) = end(&subject, Request::Stop)? else {
        not_kept(&subject)?;
        if json {
            out::json(&json!({ "name": name, "state": "stopped" }));
        } else {
            out::say(&format!("{name} does not run"));
        }
        return Ok(0);
    };
    if json {
        out::json(&figures(name, &end));
    } else {
        out::line(&format!(
            "{name} stopped at epoch {}, durable after {}; `outlive restore {name}` continues it",
            end.taken.epoch,
            out::time_us(end.taken.durable_us),
        ));
    }
    Ok(0)
}

/// `outlive power simulate`
pub fn simulate(root: &Root, name: &str, json: bool) -> Result<u8, KeeperError> {
    let subject = root.existing(name)?;
    let Some(end) = end(&subject, Request::Power)? else {
        not_kept(&subject)?;
        return Err(KeeperError::Refused(format!("{name} does not run")));
    };
    if json {
        out::json(&figures(name, &end));
        return Ok(0);
    }
    let rows = [
        ("final epoch", end.taken.epoch.to_string()),
        ("stop to durable", out::time_us(end.taken.durable_us)),
        ("event to program ended", out::time_us(end.event_us)),
        ("pages", out::count(end.taken.pages)),
        ("written", out::bytes(end.taken.bytes_written)),
    ];
    out::line(&format!("{name}: the power fails (simulated)"));
    for (what, figure) in rows {
        out::line(&format!("  {what:<24}{figure:>12}"));
    }
    Ok(0)
}

/// `outlive forget`
pub fn forget(root: &Root, name: &str, json: bool) -> Result<u8, KeeperError> {
    let subject = root.existing(name)?;
    let lock = claim(&subject)?;
    if subject.card().is_ok_and(|card| card.runs()) {
        not_kept(&subject)?;
    }
    subject.remove(&lock)?;
    if json {
        out::json(&json!({ "name": name, "state": "forgotten" }));
    }
    Ok(0)
}

/// Refuses where the program runs although nobody keeps it.
fn not_kept(subject: &Subject) -> Result<(), KeeperError> {
    let name = subject.name();
    match subject.card() {
        Ok(card) if card.runs() => Err(KeeperError::Refused(format!(
            "{name} runs as pid {pid}, without a keeper: `outlive attach --pid {pid} --name {name}` \
             keeps it again; or end it yourself (kill {pid})",
            pid = card.pid
        ))),
        _ => Ok(()),
    }
}

/// Asks the keeper for a planned end and waits until the keeper is gone; `None` without one.
fn end(subject: &Subject, request: Request) -> Result<Option<End>, KeeperError> {
    let started = Instant::now();
    let (taken, pids) = match ask(subject.dir(), request, None)? {
        None => return Ok(None),
        Some(Reply::Taken { epoch, pids }) => (epoch, pids),
        Some(Reply::Failed { error, exit }) => {
            return Err(KeeperError::Told {
                message: error,
                exit,
            });
        }
        Some(Reply::Status(_)) => {
            return Err(KeeperError::Other("the keeper answered rubbish".into()));
        }
    };
    let event_us = micros(started.elapsed());
    let socket = subject.dir().join("control");
    let patience = Instant::now();
    while socket.exists() && patience.elapsed() < GOODBYE {
        std::thread::sleep(Duration::from_millis(1));
    }
    Ok(Some(End {
        pids,
        taken,
        event_us,
    }))
}

fn figures(name: &str, end: &End) -> Value {
    json!({
        "name": name,
        "state": "stopped",
        "pid": end.pids.pid,
        "ns_pid": end.pids.ns_pid,
        "epoch": end.taken.epoch,
        "time": out::moment(end.taken.time_ns),
        "stop_us": end.taken.stop_us,
        "durable_us": end.taken.durable_us,
        "event_us": end.event_us,
        "pages": end.taken.pages,
        "bytes_written": end.taken.bytes_written,
    })
}
