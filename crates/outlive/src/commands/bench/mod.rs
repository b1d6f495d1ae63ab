//! `bench`: the measurements of the work that Outlive builds on, made again, on this machine.
//!
//! - `rtcr`: areas of memory by size and number, strategies, granularity.
//! - `wpp`: a program that maps and unmaps, Redis, a neighbour, time to persist.
//! - `stop`: what the stop time depends on.
//! - `restore`: what a restore takes.
//! - `overhead`: what keeping costs in memory and in bytes written.
//!
//! # Rules
//! - What is compared is measured in alternation within one run; what the machine itself varies by
//!   is measured along with it and shown.
//! - What this version, machine or peer does not do is a row that says so. Nothing is filled in.
//! - Programs under measurement are this binary itself (`loads`) and installed ones; they are
//!   captured through the ordinary commands.

mod args;
mod cache;
mod figures;
pub mod loads;
mod noise;
mod overhead;
mod peer;
mod plot;
mod redis;
mod restore;
mod rtcr;
mod session;
mod stop;
mod wpp;

pub use args::BenchArgs;

use crate::out;
use args::{Effort, What};
use figures::{Report, machine};
use outlive_keeper::KeeperError;
use serde_json::Value;
use session::Session;

/// `outlive bench`
pub fn bench(args: &BenchArgs, json: bool) -> Result<u8, KeeperError> {
    if let What::Load(load) = &args.what {
        return loads::run(load);
    }
    let names: &[&str] = match &args.what {
        What::Rtcr(_) => &["rtcr"],
        What::Wpp(_) => &["wpp"],
        What::Stop(_) => &["stop"],
        What::Restore(_) => &["restore"],
        What::Overhead(_) => &["overhead"],
        What::All(_) => &["rtcr", "wpp", "stop", "restore", "overhead"],
        What::Load(_) => &[],
    };
    let effort = args.effort();
    let mut reports = Vec::new();
    for name in names {
        let report = one(name, &effort)?;
        if let Some(dir) = &effort.out {
            report.write(dir)?;
        }
        if !json {
            out::line(&report.markdown(false));
        }
        reports.push(report.json());
    }
    if json {
        out::json(&match reports.as_slice() {
            [only] => only.clone(),
            all => Value::Array(all.to_vec()),
        });
    }
    Ok(0)
}

fn one(name: &str, effort: &Effort) -> Result<Report, KeeperError> {
    let session = Session::begin(&effort.dir)?;
    let machine = machine();
    let pieces = if effort.short { 20 } else { 1000 };
    let before = noise::noise(pieces);
    let mut report = match name {
        "rtcr" => rtcr::measure(&session, effort)?,
        "wpp" => wpp::measure(&session, effort)?,
        "stop" => stop::measure(&session, effort)?,
        "restore" => restore::measure(&session, effort)?,
        _ => overhead::measure(&session, effort)?,
    };
    report.command = effort.command(name);
    let after = noise::noise(pieces);
    let mut notes = vec![
        format!("{machine}."),
        format!(
            "Noise of the machine: a fixed piece of work of 1 ms took {} times its least before the \
             run, and {} times after it (median / 99th percentile / most, of {pieces}).",
            noise::told(&before),
            noise::told(&after),
        ),
        "Two values with a slash are median and 99th percentile, with the number of samples in \
         brackets."
            .into(),
    ];
    notes.extend(session.in_memory().then(|| {
        "The directory of this run lies in memory: what is called durable here is not.".to_owned()
    }));
    if cfg!(debug_assertions) {
        notes.push("This is a debug build: its times mean nothing.".into());
    }
    report.notes.splice(0..0, notes);
    Ok(report)
}
