//! `cargo xtask bench power`: how long power events take for a Redis under write load, against its
//! hold-up budget.
//!
//! # How it is measured
//! - A freshly filled Redis is kept with `--hold-up`, and `redis-benchmark -t set` writes to it all
//!   the time. Events come at random moments; each freezes the Redis, makes everything durable, and
//!   lets it go on (`power simulate --mains-back-after`).
//! - The time of an event counts from before the request is sent, with all waiting for an epoch that
//!   is under way.

use crate::{
    cleanup,
    demo::{self, writer},
    model::{Journal, VALUE_LENGTH},
    outlive::Outlive,
    redis::Place,
    stats, tools, workspace,
};
use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;
use std::{
    fs,
    path::PathBuf,
    process::{Command, Stdio},
    thread,
    time::Duration,
};

/// What can be chosen.
#[derive(clap::Args, Clone, Debug)]
pub struct Options {
    /// How many keys of 400 bytes.
    #[arg(long, default_value_t = 200_000, value_parser = clap::value_parser!(u32).range(1..))]
    keys: u32,
    /// How many events.
    #[arg(long, default_value_t = 50, value_parser = clap::value_parser!(u32).range(1..))]
    events: u32,
    /// The budget.
    #[arg(long, default_value = "100ms")]
    hold_up: String,
    /// Keep it strictly.
    #[arg(long)]
    strict: bool,
    /// Connections that write; fewer write less.
    #[arg(long, default_value_t = 50, value_parser = clap::value_parser!(u32).range(1..))]
    clients: u32,
    /// Draws the same moments again.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// An `outlive` binary to use instead of building one.
    #[arg(long, value_name = "PATH")]
    outlive: Option<PathBuf>,
}

/// Runs the command.
pub fn run(options: &Options) -> Result<()> {
    if !tools::is_root() {
        bail!("run this as root");
    }
    tools::ensure(&["redis-server", "redis-benchmark"])?;
    let binary = match &options.outlive {
        Some(path) => path
            .canonicalize()
            .with_context(|| format!("no {}", path.display()))?,
        None => workspace::build_outlive()?,
    };
    let scratch = workspace::scratch()?;
    workspace::need_space(&scratch, 8_000_000_000)?;
    let folder = cleanup::folder(&scratch)?;
    let store = folder.join("store");
    fs::create_dir(&store).context("cannot make the store's folder")?;
    let outlive = Outlive { binary, store };
    let place = Place::new(&folder, "power")?;
    let name = format!("power-{}", std::process::id());
    let mut flags = vec!["--hold-up", &options.hold_up];
    flags.extend(options.strict.then_some("--strict"));
    let mut running = outlive.run_with(&name, "100ms", &flags, &place.command_line())?;
    let (mut client, identity) = place.wait(|| running.must_live())?;
    let bar = demo::bar(options.keys.into(), "filling");
    let filled = writer::fill(&mut Journal::new(1), &mut client, options.keys, &bar);
    bar.finish_and_clear();
    filled?;
    outlive.await_epoch_since(&name, demo::now_nanos())?;
    let before = outlive.status(&name)?;
    let mut load = load(options, &place)?;
    let events = events(options, &outlive, &name);
    let after = outlive.status(&name);
    load.kill().context("cannot end redis-benchmark")?;
    load.wait()?;
    let (events, after) = (events?, after?);
    running.must_live()?;
    let (_, now) = place.wait(|| running.must_live())?;
    ensure!(now.pid == identity.pid, "it is another Redis");
    outlive.stop(&name)?;
    running
        .keeper
        .wait()
        .context("cannot wait for the keeper")?;
    outlive.forget(&name)?;
    print(options, &events, &before, &after);
    Ok(())
}

fn load(options: &Options, place: &Place) -> Result<std::process::Child> {
    let (port, keys) = (place.port.to_string(), options.keys.to_string());
    let (length, clients) = (VALUE_LENGTH.to_string(), options.clients.to_string());
    Command::new("redis-benchmark")
        .args([
            "-h",
            "127.0.0.1",
            "-p",
            &port,
            "-t",
            "set",
            "-n",
            "1000000",
            "-l",
            "-q",
        ])
        .args(["-r", &keys, "-d", &length, "-c", &clients])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .context("cannot start redis-benchmark")
}

fn events(options: &Options, outlive: &Outlive, name: &str) -> Result<Vec<Value>> {
    let mut random = fastrand::Rng::with_seed(options.seed);
    let bar = demo::bar(options.events.into(), "events");
    let mut events = Vec::new();
    // The keeper gets to know the load first.
    thread::sleep(Duration::from_secs(5));
    for _ in 0..options.events {
        thread::sleep(Duration::from_micros(random.u64(200_000..900_000)));
        events.push(outlive.simulate_outage(name)?);
        bar.inc(1);
    }
    bar.finish_and_clear();
    Ok(events)
}

fn print(options: &Options, events: &[Value], before: &Value, after: &Value) {
    let of = |value: &Value, path: &str| value.pointer(path).and_then(Value::as_u64).unwrap_or(0);
    let all =
        |path: &str| -> Vec<f64> { events.iter().map(|event| of(event, path) as f64).collect() };
    let budget = of(after, "/hold_up/budget_us");
    let within = events
        .iter()
        .filter(|event| of(event, "/power/event_us") <= budget)
        .count();
    let grown = |path: &str| of(after, path).saturating_sub(of(before, path));
    let strict = if options.strict { ", strictly" } else { "" };
    println!("{}\n", super::machine());
    println!(
        "{} events, a hold-up budget of {}{strict}:\n",
        events.len(),
        options.hold_up
    );
    let rows = [
        (
            "event until durable: median / p99 / max",
            stats::times(&all("/power/event_us")),
        ),
        (
            "of that, from the stop on",
            stats::times(&all("/durable_us")),
        ),
        ("  threads stopped", stats::times(&all("/steps/freeze_us"))),
        (
            "  state read, pages found",
            stats::times(&all("/steps/scan_us")),
        ),
        ("  pages copied", stats::times(&all("/steps/copy_us"))),
        (
            "  handed to the medium",
            stats::times(&all("/steps/write_us")),
        ),
        (
            "  the program's own files",
            stats::times(&all("/steps/files_us")),
        ),
        ("  on the medium", stats::times(&all("/steps/flush_us"))),
        ("  committed", stats::times(&all("/steps/record_us"))),
        ("within the budget", format!("{within} of {}", events.len())),
        (
            "violations counted meanwhile",
            stats::count(grown("/hold_up/violations")),
        ),
        (
            "the program was held by epochs for",
            stats::time(Some(grown("/hold_up/throttled_us") as f64)),
        ),
        (
            "floor at the end",
            stats::time(Some(of(after, "/hold_up/floor_us") as f64)),
        ),
        (
            "may be unsaved at the end",
            stats::bytes(of(after, "/hold_up/allowed_bytes")),
        ),
        ("written meanwhile", stats::bytes(grown("/bytes_written"))),
    ];
    for (what, figure) in rows {
        println!("  {what:<42}{figure}");
    }
}
