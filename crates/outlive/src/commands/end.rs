//! `stop`, `power simulate`, `forget`: planned ends.

use super::run::claim;
use crate::out;
use outlive_keeper::KeeperError;
use outlive_keeper::arrival::abandon;
use outlive_keeper::control::{Reply, Request, ask};
use outlive_keeper::epoch::{Taken, micros};
use outlive_keeper::power::{PowerReport, monotonic_ns};
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
    power: Option<PowerReport>,
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
pub fn simulate(
    root: &Root,
    name: &str,
    mains_back_after: Option<Duration>,
    json: bool,
) -> Result<u8, KeeperError> {
    let subject = root.existing(name)?;
    let request = Request::Power {
        mains_back_after_us: mains_back_after.map(micros),
        at_ns: Some(monotonic_ns()),
    };
    let Some(end) = end(&subject, request)? else {
        not_kept(&subject)?;
        return Err(KeeperError::Refused(format!("{name} does not run")));
    };
    let went_on = end.power.is_some_and(|power| power.went_on);
    if json {
        let mut figures = figures(name, &end);
        if went_on {
            figures["state"] = json!("running");
        }
        out::json(&figures);
        return Ok(0);
    }
    let steps = &end.taken.steps;
    let power = end.power.as_ref();
    let time = |us: u64| out::time_us(us);
    let mut rows = vec![
        ("final epoch", end.taken.epoch.to_string()),
        ("stop to durable", time(end.taken.durable_us)),
        ("  threads stopped", time(steps.freeze_us)),
        ("  state read, pages found", time(steps.scan_us)),
        ("  pages copied", time(steps.copy_us)),
        ("  handed to the medium", time(steps.write_us)),
        ("  the program's own files", time(steps.files_us)),
        ("  on the medium", time(steps.flush_us)),
        ("  committed", time(steps.record_us)),
    ];
    if let Some(power) = power {
        rows.push(("event to durable", time(power.event_us)));
        let budget = power.budget_us.map(time);
        rows.extend(budget.map(|budget| ("hold-up budget", budget)));
    }
    let last = if went_on {
        "event to program going on"
    } else {
        "event to program ended"
    };
    rows.push((last, time(end.event_us)));
    rows.push(("pages", out::count(end.taken.pages)));
    rows.push(("written", out::bytes(end.taken.bytes_written)));
    out::line(&format!("{name}: the power fails (simulated)"));
    for (what, figure) in rows {
        out::line(&format!("  {what:<26}{figure:>12}"));
    }
    if let Some(PowerReport {
        event_us,
        budget_us: Some(budget),
        ..
    }) = power
        && event_us > budget
    {
        out::say(&format!("{name}: this took longer than the hold-up budget"));
    }
    Ok(0)
}

/// `outlive forget`
pub fn forget(root: &Root, name: &str, json: bool) -> Result<u8, KeeperError> {
    match root.existing(name) {
        Ok(subject) => {
            let lock = claim(&subject)?;
            if subject.card().is_ok_and(|card| card.runs()) {
                not_kept(&subject)?;
            }
            super::device::clear(&subject)?;
            subject.remove(&lock)?;
            abandon(root, name)?;
        }
        // What an interrupted import or pull left is forgotten by the same name.
        Err(error) => {
            if !abandon(root, name)? {
                return Err(error);
            }
        }
    }
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
            "{name} runs as pid {pid}, without a keeper: `outlive attach {name}` keeps it again; or \
             end it yourself (kill {pid})",
            pid = card.pid
        ))),
        _ => Ok(()),
    }
}

/// Asks the keeper for a planned end and waits until the keeper is gone; `None` without one.
fn end(subject: &Subject, request: Request) -> Result<Option<End>, KeeperError> {
    let started = Instant::now();
    let (taken, pids, power) = match ask(subject.dir(), request, None)? {
        None => return Ok(None),
        Some(Reply::Taken { epoch, pids, power }) => (epoch, pids, power),
        Some(other) => return Err(other.into_error()),
    };
    let event_us = micros(started.elapsed());
    let socket = subject.dir().join("control");
    let patience = Instant::now();
    let went_on = power.is_some_and(|power| power.went_on);
    while !went_on && socket.exists() && patience.elapsed() < GOODBYE {
        std::thread::sleep(Duration::from_millis(1));
    }
    Ok(Some(End {
        pids,
        taken,
        power,
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
        "steps": end.taken.steps,
        "power": end.power,
    })
}
