//! `power budget` and `power back`.

use super::medium::enough;
use crate::out;
use outlive_keeper::KeeperError;
use outlive_keeper::budget::calibration;
use outlive_keeper::budget::model::{Figures, MIB};
use outlive_keeper::control::{Reply, Request, Status, ask};
use outlive_keeper::subject::Root;
use serde_json::json;
use std::time::Duration;

/// How long a keeper may take to answer.
const PATIENCE: Duration = Duration::from_secs(10);

/// Budgets that are shown without one to judge, milliseconds.
const USUAL: [u64; 4] = [10, 20, 100, 1000];

/// `outlive power back`
pub fn back(root: &Root, name: &str, json: bool) -> Result<u8, KeeperError> {
    let subject = root.existing(name)?;
    match ask(subject.dir(), Request::PowerBack, Some(PATIENCE))? {
        Some(Reply::Heard) => {
            if json {
                out::json(&json!({ "name": name, "state": "running" }));
            }
            Ok(0)
        }
        Some(other) => Err(other.into_error()),
        None => Err(KeeperError::Refused(format!("{name} is not kept"))),
    }
}

/// `outlive power budget`
pub fn budget(
    root: &Root,
    name: Option<&str>,
    hold_up: Option<Duration>,
    json: bool,
) -> Result<u8, KeeperError> {
    let live = match name {
        Some(name) => live(root, name)?,
        None => None,
    };
    let figures = match &live {
        Some(status) => status.model,
        None => calibration::refresh(root.path())?.model(0).figures(),
    };
    let own = live.as_ref().and_then(|status| status.budget.as_ref());
    let asked = hold_up.map(|t| u64::try_from(t.as_nanos()).unwrap_or(u64::MAX));
    if let Some(budget) = asked {
        enough(&figures, budget)?;
    }
    let asked = asked.or(own.map(|own| own.hold_up.budget_ns));
    let budgets: Vec<u64> = match asked {
        Some(budget) => vec![budget],
        None => USUAL.iter().map(|ms| ms * 1_000_000).collect(),
    };
    if json {
        let allowed = budgets
            .iter()
            .map(|ns| json!({ "hold_up_us": ns / 1000, "allowed_bytes": figures.allowed(*ns) }));
        let allowed: Vec<_> = allowed.collect();
        out::json(&json!({
            "name": name,
            "kept": live.is_some(),
            "model": figures,
            "floor_us": figures.floor().div_ceil(1000),
            "bytes_per_second": per_second(&figures),
            "budgets": allowed,
        }));
        return Ok(0);
    }
    show(name, live.is_some(), &figures, &budgets);
    Ok(0)
}

fn live(root: &Root, name: &str) -> Result<Option<Box<Status>>, KeeperError> {
    let subject = root.existing(name)?;
    Ok(match ask(subject.dir(), Request::Status, Some(PATIENCE))? {
        Some(Reply::Status(status)) => Some(status),
        _ => None,
    })
}

fn per_second(figures: &Figures) -> u64 {
    let bytes = u128::from(MIB) * 1_000_000_000 / u128::from(figures.mib_ns.max(1));
    u64::try_from(bytes).unwrap_or(u64::MAX)
}

fn show(name: Option<&str>, kept: bool, figures: &Figures, budgets: &[u64]) {
    let time = |ns: u64| out::time_us(ns.div_ceil(1000));
    let whose = match name {
        Some(name) if kept => format!("{name}, by its own epochs"),
        Some(name) => {
            format!("{name} is not kept: the medium alone, and a program of average size")
        }
        None => "the medium alone, and a program of average size".into(),
    };
    out::line(&format!("a power event ({whose}; 99.9th percentiles)"));
    let rate = format!("{}/s", out::bytes(per_second(figures)));
    let all = figures.fixed().saturating_sub(figures.commit());
    let rows = [
        ("threads stopped", time(figures.freeze_ns)),
        ("state read, pages found", time(figures.scan_ns)),
        ("the program's own files", time(figures.files_ns)),
        ("all three in one event", time(all)),
        ("one flush", time(figures.flush_ns)),
        ("flushes", figures.flushes.to_string()),
        ("copying and writing", rate),
        ("trees and tables", out::bytes(figures.tables)),
        ("floor: nothing to save", time(figures.floor())),
    ];
    for (what, figure) in rows {
        out::line(&format!("  {what:<26}{figure:>14}"));
    }
    for budget in budgets {
        let allowed = figures.allowed(*budget);
        let allowed = allowed.map_or_else(
            || "not possible".into(),
            |b| format!("{} unsaved", out::bytes(b)),
        );
        out::line(&format!("  within {:<19}{allowed:>14}", time(*budget)));
    }
}
