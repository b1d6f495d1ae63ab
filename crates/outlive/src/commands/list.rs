//! `ps` and `history`.

use crate::out::{self, Column};
use outlive_epoch::StoreError;
use outlive_epoch_store::{Fingerprint, GenerationSummary};
use outlive_keeper::arrival::{Unsettled, unsettled};
use outlive_keeper::control::{Reply, Request, Status, ask};
use outlive_keeper::images::{Image, Summary};
use outlive_keeper::procfs::Pids;
use outlive_keeper::subject::{Capture, Card, Root, Subject};
use outlive_keeper::table::{self, Totals};
use outlive_keeper::{KeeperError, stats};
use serde_json::{Value, json};
use std::time::Duration;

/// How long a keeper may take to say how things stand.
const PATIENCE: Duration = Duration::from_secs(3);

/// A subject as `ps` shows it.
struct Entry {
    name: String,
    state: String,
    /// What came so far of one that is no subject yet, bytes.
    arrived: Option<u64>,
    live: Option<Status>,
    /// What all its keepers counted.
    totals: Option<Totals>,
    card: Option<Card>,
    epochs: Vec<Summary>,
    files: Vec<GenerationSummary>,
    /// The key that its epochs are encrypted with.
    key: Option<Fingerprint>,
}

/// `outlive ps`
pub fn ps(root: &Root, json: bool) -> Result<u8, KeeperError> {
    let names = root.names()?;
    let entries: Result<Vec<Entry>, _> = names
        .iter()
        .map(|name| root.subject(name).map(|subject| look(&subject)))
        .collect();
    let mut entries = entries?;
    entries.extend(unsettled(root)?.into_iter().map(Entry::arriving));
    if json {
        out::json(&Value::Array(entries.iter().map(Entry::json).collect()));
    } else if entries.is_empty() {
        let place = root.path().display();
        let nothing = if root.path().exists() {
            format!("no subjects in {place}")
        } else {
            format!("no subjects: there is no store at {place} yet")
        };
        out::say(&nothing);
    } else {
        out::line(&table(&entries));
    }
    Ok(0)
}

fn look(subject: &Subject) -> Entry {
    let card = subject.card();
    let (live, state) = match ask(subject.dir(), Request::Status, Some(PATIENCE)) {
        Ok(Some(Reply::Status(status))) => {
            let state = match &*status {
                Status { frozen: true, .. } => "frozen",
                Status { full: true, .. } => "medium full",
                _ => "running",
            };
            (Some(*status), state.into())
        }
        Ok(None) => (
            None,
            match &card {
                Err(KeeperError::Io { source, .. }) => source.kind().to_string(),
                Err(error) => error.to_string(),
                Ok(card) if card.runs() => "not kept".into(),
                Ok(card) => card.ended.clone().unwrap_or_else(|| "dead".into()),
            },
        ),
        Err(error) if error.exit_code() == 5 => (None, "permission denied".into()),
        Ok(Some(_)) | Err(_) => (None, "no answer".into()),
    };
    let totals = match &live {
        Some(live) => live.totals.clone(),
        None => table::read(subject.dir()),
    };
    let image = Image::open(&subject.epochs_dir());
    let key = image.as_ref().ok().and_then(|image| image.store().key());
    let files = image.as_ref().map(|image| image.store().generations());
    let files = files.unwrap_or_default();
    let epochs = image.map(|image| image.epochs());
    Entry {
        name: subject.name().into(),
        state,
        arrived: None,
        totals,
        live,
        card: card.ok(),
        epochs: epochs.unwrap_or_default(),
        files,
        key,
    }
}

impl Entry {
    /// What is no subject yet, and may never be one.
    fn arriving(arrival: Unsettled) -> Self {
        let state = match arrival.at_it {
            true => "arriving",
            false => "arrival interrupted",
        };
        Self {
            name: arrival.name,
            state: state.into(),
            arrived: Some(arrival.bytes),
            live: None,
            totals: None,
            card: None,
            epochs: Vec::new(),
            files: Vec::new(),
            key: None,
        }
    }

    fn pids(&self) -> Option<Pids> {
        let runs = self.live.is_some() || self.state == "not kept";
        let card = self.card.as_ref().filter(|_| runs);
        let live = self.live.as_ref().map(|live| live.pids);
        live.or_else(|| card.map(|card| Pids::of(card.pid)))
    }

    fn capture(&self) -> Option<&Capture> {
        let live = self.live.as_ref().map(|live| &live.capture);
        live.or(self.card.as_ref().map(|card| &card.capture))
    }

    fn newest(&self) -> Option<u64> {
        let live = self.live.as_ref().map(|live| live.epoch).filter(|n| *n > 0);
        live.or(self.epochs.last().map(|last| last.epoch))
    }

    fn last_time(&self) -> Option<u64> {
        let live = self.live.as_ref().and_then(|live| live.last_time_ns);
        live.or(self.epochs.last().map(|last| last.time_ns))
    }

    /// Since when nobody keeps it although it runs: since its newest epoch, or else its beginning.
    fn untracked_since(&self) -> Option<u64> {
        let card = self.card.as_ref().filter(|_| self.state == "not kept");
        card.map(|card| self.last_time().unwrap_or(card.since_ns))
    }

    fn budget(&self) -> Option<Value> {
        let live = self.live.as_ref();
        let Some(live) = live else {
            let hold_up = self.card.as_ref()?.hold_up?;
            return Some(json!({
                "budget_us": hold_up.budget_ns / 1000,
                "strict": hold_up.strict,
            }));
        };
        let budget = live.budget.as_ref()?;
        Some(json!({
            "budget_us": budget.hold_up.budget_ns / 1000,
            "strict": budget.hold_up.strict,
            "floor_us": live.model.floor().div_ceil(1000),
            "expected_us": budget.expected_ns.div_ceil(1000),
            "expected_bytes": budget.expected_bytes,
            "allowed_bytes": budget.allowed_bytes,
            "dirty_bytes": budget.dirty_bytes,
            "limit_bytes": budget.limit_bytes,
            "exposed_bytes": budget.exposed_bytes,
            "violations": budget.violations,
            "violated_us": budget.violated_ns / 1000,
            "holding": budget.holding,
            "throttled_us": budget.held_ns / 1000,
            "model": live.model,
        }))
    }

    /// Budget, expected time and violations, in a word.
    fn promise(&self) -> Option<String> {
        let live = self.live.as_ref()?;
        let budget = live.budget.as_ref()?;
        let time = |ns: u64| out::time_us(ns.div_ceil(1000));
        let mut text = format!(
            "{} of {}",
            time(budget.expected_ns),
            time(budget.hold_up.budget_ns)
        );
        if budget.violations > 0 {
            let often = out::count(budget.violations);
            text += &format!(", {often} over ({})", time(budget.violated_ns));
        }
        if budget.held_ns > 0 {
            text += &format!(", held {}", time(budget.held_ns));
        }
        Some(text)
    }

    fn state(&self) -> String {
        match (self.untracked_since(), self.arrived) {
            (Some(since), _) => format!("{} since {}", self.state, out::short_moment(since)),
            (None, Some(bytes)) => format!("{}, {}", self.state, out::bytes(bytes)),
            (None, None) => self.state.clone(),
        }
    }

    fn json(&self) -> Value {
        let live = self.live.as_ref();
        json!({
            "name": self.name,
            "state": self.state,
            "arrived_bytes": self.arrived,
            "pid": self.pids().map(|pids| pids.pid),
            "ns_pid": self.pids().map(|pids| pids.ns_pid),
            "keeper_pid": live.map(|l| l.keeper_pid),
            "epoch": self.newest(),
            "epochs": self.epochs.len(),
            "time": self.last_time().map(out::moment),
            "since": live.map(|l| out::moment(l.since_ns)),
            "every_us": self.card.as_ref().map(|card| card.every_ns / 1000),
            "last_stop_us": live.and_then(|l| l.last_stop_us),
            "median_stop_us": live.and_then(|l| l.median_stop_us),
            "p99_stop_us": live.and_then(|l| l.p99_stop_us),
            "failures": live.map(|l| l.failures),
            "abandoned": live.map(|l| l.abandoned),
            "max_stop_us": self.card.as_ref().and_then(|card| card.max_stop_us),
            "last_failure": live.and_then(|l| l.last_failure.clone()),
            "strategy": self.capture().map(|c| c.strategy.clone()),
            "granularity": self.capture().map(|c| c.granularity),
            "tracking": live.map(|l| l.tracking.clone()),
            "log_bytes": live.map(|l| l.log_bytes),
            "live_bytes": live.map(|l| l.live_bytes),
            "store_bytes": self.files.iter().map(|file| file.bytes).sum::<u64>(),
            "generations": self.files.len(),
            "keep": self.card.as_ref().and_then(|card| card.keep).map(|keep| keep.to_string()),
            "max_size": self.card.as_ref().and_then(|card| card.max_size),
            "compress": self.card.as_ref().and_then(|card| card.compress.clone()),
            "key": self.key.map(|key| key.to_string()),
            "saved_bytes": self.saved_bytes(),
            "untracked_since": self.untracked_since().map(out::moment),
            "hold_up": self.budget(),
            "bytes_written": live.map(|l| l.bytes_written),
            "bytes_per_day": live.and_then(|l| l.bytes_per_day),
            "max_wear": self.card.as_ref().and_then(|card| card.max_wear),
            "power_events": live.map(|l| l.events),
            "totals": self.totals.as_ref().map(totals),
            "command": self.card.as_ref().map(|card| card.command.clone()),
        })
    }
}

impl Entry {
    /// Bytes that compression saved in all files.
    fn saved_bytes(&self) -> u64 {
        let epochs = self.files.iter().flat_map(|file| &file.epochs);
        epochs.fold(0, |sum, epoch| sum.saturating_add(epoch.saved_bytes))
    }
}

fn totals(totals: &Totals) -> Value {
    let counts = &totals.counts;
    json!({
        "since": out::moment(totals.since_ns),
        "time": out::moment(totals.time_ns),
        "keepers": totals.keepers,
        "epochs": counts.epochs,
        "bytes_written": counts.bytes_written,
        "failures": counts.failures,
        "abandoned": counts.abandoned,
        "last_failure": totals.last_failure,
        "violations": counts.violations,
        "violated_us": counts.violated_ns / 1000,
        "throttled_us": counts.held_ns / 1000,
        "power_events": {
            "count": counts.events,
            "late": counts.events_late,
            "longest_ns": counts.event_longest_ns,
        },
    })
}

fn table(entries: &[Entry]) -> String {
    use Column::{Left, Right};
    let columns = [
        ("NAME", Left),
        ("STATE", Left),
        ("PID", Right),
        ("EPOCH", Right),
        ("LAST EPOCH (UTC)", Left),
        ("STRATEGY", Left),
        ("STOP", Right),
        ("MEDIAN", Right),
        ("P99", Right),
        ("FAILED", Right),
        ("HOLD-UP", Left),
        ("COMMAND", Left),
    ];
    let dash = || "-".to_owned();
    let failed = |live: &Status| match live.abandoned {
        0 => live.failures.to_string(),
        n => format!("{}, {n} abandoned", live.failures),
    };
    let rows: Vec<Vec<String>> = entries
        .iter()
        .map(|entry| {
            let live = entry.live.as_ref();
            let stop = |us: Option<u64>| us.map_or_else(dash, out::time_us);
            let command = entry
                .card
                .as_ref()
                .map(|card| out::tame(&card.command.join(" ")));
            vec![
                entry.name.clone(),
                out::tame(&entry.state()),
                entry.pids().map_or_else(dash, |pids| pids.to_string()),
                entry.newest().map_or_else(dash, |n| n.to_string()),
                entry.last_time().map_or_else(dash, out::short_moment),
                entry.capture().map_or_else(dash, Capture::to_string),
                stop(live.and_then(|l| l.last_stop_us)),
                stop(live.and_then(|l| l.median_stop_us)),
                stop(live.and_then(|l| l.p99_stop_us)),
                live.map_or_else(dash, failed),
                entry.promise().unwrap_or_else(dash),
                command.unwrap_or_else(dash),
            ]
        })
        .collect();
    out::table(&columns, &rows)
}

/// `outlive history`
pub fn history(root: &Root, name: &str, json: bool) -> Result<u8, KeeperError> {
    let subject = root.existing(name)?;
    let (epochs, files) = match Image::open(&subject.epochs_dir()) {
        Err(StoreError::Missing { .. }) => (Vec::new(), Vec::new()),
        other => {
            let image = other?;
            (image.epochs(), image.store().generations())
        }
    };
    if json {
        let list = epochs.iter().map(|epoch| {
            // The newest file that has it.
            let has = |file: &&GenerationSummary| file.epochs.iter().any(|e| e.id.0 == epoch.epoch);
            let file = files.iter().rev().find(has);
            json!({
                "epoch": epoch.epoch,
                "time": out::moment(epoch.time_ns),
                "stop_us": epoch.stop_us,
                "durable_us": epoch.durable_us,
                "pages": epoch.pages,
                "bytes_written": epoch.bytes_written,
                "saved_bytes": epoch.saved_bytes,
                "generation": file.map(|file| file.number),
                "generation_bytes": file.map(|file| file.bytes),
            })
        });
        out::json(&Value::Array(list.collect()));
    } else if epochs.is_empty() {
        out::say(&format!("{name} has no epoch yet"));
    } else {
        print_history(&epochs, &files);
    }
    Ok(0)
}

fn print_history(epochs: &[Summary], files: &[GenerationSummary]) {
    use Column::{Left, Right};
    let columns = [
        ("EPOCH", Right),
        ("TIME (UTC)", Left),
        ("STOP", Right),
        ("DURABLE", Right),
        ("PAGES", Right),
        ("WRITTEN", Right),
    ];
    let rows: Vec<Vec<String>> = epochs
        .iter()
        .map(|epoch| {
            vec![
                epoch.epoch.to_string(),
                out::short_moment(epoch.time_ns),
                out::time_us(epoch.stop_us),
                epoch.durable_us.map_or_else(|| "-".into(), out::time_us),
                out::count(epoch.pages),
                out::bytes(epoch.bytes_written),
            ]
        })
        .collect();
    out::line(&out::table(&columns, &rows));
    let stops: Vec<u64> = epochs.iter().map(|epoch| epoch.stop_us).collect();
    let at = |percent| out::time_us(stats::percentile(&stops, percent).unwrap_or(0));
    out::line(&format!(
        "{} in {} ({}); stop: median {}, p99 {}, longest {}",
        out::plural(epochs.len() as u64, "epoch", "epochs"),
        out::plural(files.len() as u64, "generation", "generations"),
        out::bytes(files.iter().map(|file| file.bytes).sum()),
        at(50),
        at(99),
        at(100),
    ));
}
