//! `cargo xtask bench redis`: what keeping a Redis costs.
//!
//! # How it is measured
//! - Everything is compared inside one run on one machine, in turns: a raw O_DIRECT write of as
//!   many bytes next to each image; an untracked run of `redis-benchmark` next to each tracked one
//!   (their order changes from pair to pair), each with a Redis of its own, freshly filled.
//! - Medians, with the smallest and largest value; ratios are taken pair by pair.
//! - An image that does not give back the same PID and the same `DEBUG DIGEST` fails the run: a
//!   fast wrong answer is not measured.

use crate::{
    cleanup,
    demo::{self, writer},
    model::{Journal, VALUE_LENGTH},
    outlive::{Checkpoint, Epoch, Outlive},
    redis::{self, Place},
    resp::Client,
    stats, tools, workspace,
};
use anyhow::{Context, Result, anyhow, bail, ensure};
use serde_json::{Value, json};
use std::{
    collections::BTreeMap,
    fs::{self, OpenOptions},
    io::Write,
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    process::Command,
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

/// Bytes in one raw write.
const RAW_CHUNK: usize = 4 << 20;

/// How often epochs are taken while tracked.
const EVERY: &str = "200ms";

/// How often to look at the history during a tracked run.
const LOOK: Duration = Duration::from_millis(300);

/// What can be chosen.
#[derive(clap::Args, Clone, Debug)]
pub struct Options {
    /// How many keys of 400 bytes.
    #[arg(long, default_value_t = 850_000, value_parser = clap::value_parser!(u32).range(1..))]
    keys: u32,
    /// How many images are written; 0 leaves this part out.
    #[arg(long, default_value_t = 5)]
    images: u32,
    /// How many pairs of untracked and tracked runs; 0 leaves this part out.
    #[arg(long, default_value_t = 5)]
    pairs: u32,
    /// How many SET requests a run makes.
    #[arg(long, default_value_t = 600_000, value_parser = clap::value_parser!(u32).range(1..))]
    requests: u32,
    /// An `outlive` binary to use instead of building one.
    #[arg(long, value_name = "PATH")]
    outlive: Option<PathBuf>,
}

/// Runs the command.
pub fn run(options: &Options) -> Result<()> {
    if !tools::is_root() {
        bail!("a process gets its old PID back only by a privileged restorer: run this as root");
    }
    tools::ensure(&["redis-server", "redis-benchmark"])?;
    let binary = match &options.outlive {
        Some(path) => path
            .canonicalize()
            .with_context(|| format!("no {}", path.display()))?,
        None => workspace::build_outlive()?,
    };
    let scratch = workspace::scratch()?;
    workspace::need_space(&scratch, 3_000_000_000 + 4_000 * u64::from(options.keys))?;
    let folder = cleanup::folder(&scratch)?;
    let store = folder.join("store");
    fs::create_dir(&store).context("cannot make the store's folder")?;
    let bench = Bench {
        options: options.clone(),
        outlive: Outlive { binary, store },
        folder,
    };
    let images = (options.images > 0).then(|| bench.images()).transpose()?;
    let tracking = (options.pairs > 0).then(|| bench.pairs()).transpose()?;
    print(images.as_ref(), tracking.as_ref());
    Ok(())
}

struct Bench {
    options: Options,
    outlive: Outlive,
    folder: PathBuf,
}

/// Part one: images and their restore.
#[derive(Default)]
struct Images {
    resident: u64,
    written: Vec<f64>,
    /// GB/s until durable.
    speeds: Vec<f64>,
    /// GB/s of raw writes.
    raw: Vec<f64>,
    stop_us: Vec<f64>,
    restore_us: f64,
    first_run_us: f64,
    first_answer_us: f64,
}

/// Part two: a Redis while tracked.
#[derive(Default)]
struct Tracking {
    untracked: Vec<f64>,
    tracked: Vec<f64>,
    stop_us: Vec<f64>,
    durable_us: Vec<f64>,
    bytes_written: Vec<f64>,
    /// Epochs committed while they were counted, seen in the history or not.
    committed: u64,
}

impl Bench {
    fn images(&self) -> Result<Images> {
        println!("filling a redis…");
        let place = Place::new(&self.folder, "imaged")?;
        let mut server = place.start_plain()?;
        let (mut client, identity) = place.wait(|| still_runs(&mut server))?;
        self.fill(&mut client)?;
        let mut images = Images {
            resident: resident(identity.pid)?,
            ..Images::default()
        };
        let image = self.folder.join("image");
        for turn in 1..=self.options.images {
            let made = self.outlive.checkpoint(identity.pid, &image, true)?;
            let raw = raw_write(&self.folder, made.bytes_written)?;
            images.note(&made, raw);
            println!(
                "image {turn}: {} in {}, stopped {}; raw {raw:.2} GB/s",
                stats::bytes(made.bytes_written),
                stats::time(Some(made.durable_us as f64)),
                stats::time(Some(made.stop_us as f64)),
            );
            fs::remove_dir_all(&image).context("cannot remove the image")?;
        }
        let digest = client.ask_text(&["DEBUG", "DIGEST"])?;
        // It is our child: nobody else can reap it, and it is gone only once it was reaped.
        let reaper = thread::spawn(move || server.wait());
        self.outlive.checkpoint(identity.pid, &image, false)?;
        let reaped = reaper
            .join()
            .map_err(|_| anyhow!("the waiting thread panicked"))?;
        reaped.context("cannot wait for redis")?;
        self.restore(&place, &image, &identity, &digest, &mut images)?;
        redis::end(identity.pid)?;
        fs::remove_dir_all(&image).context("cannot remove the image")?;
        Ok(images)
    }

    fn restore(
        &self,
        place: &Place,
        image: &Path,
        before: &redis::Identity,
        digest: &str,
        images: &mut Images,
    ) -> Result<()> {
        let begun = Instant::now();
        let restored = self.outlive.restore_image(image)?;
        let (mut client, identity) = place.wait(|| Ok(()))?;
        images.first_answer_us = begun.elapsed().as_micros() as f64;
        images.restore_us = restored.restore_us as f64;
        images.first_run_us = restored.first_run_us as f64;
        ensure!(
            restored.pid == before.pid,
            "PID {} came back as {}",
            before.pid,
            restored.pid
        );
        identity.must_continue(before)?;
        let now = client.ask_text(&["DEBUG", "DIGEST"])?;
        ensure!(
            now == digest,
            "DEBUG DIGEST was {digest}, and is {now} after the restore"
        );
        println!("restored: same PID, same DEBUG DIGEST");
        Ok(())
    }

    fn pairs(&self) -> Result<Tracking> {
        let mut tracking = Tracking::default();
        for pair in 1..=self.options.pairs {
            let (untracked, tracked);
            if pair % 2 == 1 {
                untracked = self.untracked(pair)?;
                tracked = self.tracked(pair, &mut tracking)?;
            } else {
                tracked = self.tracked(pair, &mut tracking)?;
                untracked = self.untracked(pair)?;
            }
            println!("pair {pair}: {untracked:.0} SET/s untracked, {tracked:.0} tracked");
            tracking.untracked.push(untracked);
            tracking.tracked.push(tracked);
        }
        Ok(tracking)
    }

    fn untracked(&self, pair: u32) -> Result<f64> {
        let place = Place::new(&self.folder, &format!("untracked-{pair}"))?;
        let mut server = place.start_plain()?;
        let (mut client, identity) = place.wait(|| still_runs(&mut server))?;
        self.fill(&mut client)?;
        let speed = self.benchmark(&place)?;
        redis::end(identity.pid)?;
        Ok(speed)
    }

    fn tracked(&self, pair: u32, tracking: &mut Tracking) -> Result<f64> {
        let place = Place::new(&self.folder, &format!("tracked-{pair}"))?;
        let name = format!("bench-{}-{pair}", std::process::id());
        let mut running = self.outlive.run(&name, EVERY, &place.command_line())?;
        let (mut client, _) = place.wait(|| running.must_live())?;
        self.fill(&mut client)?;
        self.outlive.await_epoch_since(&name, demo::now_nanos())?;
        let begun = demo::now_nanos();
        let (speed, mut epochs) = self.benchmark_watched(&place, &name)?;
        let ended = demo::now_nanos();
        running.must_live()?;
        note(&mut epochs, self.outlive.history(&name)?);
        let committed = epochs.keys().next_back().copied().unwrap_or(0);
        let during: Vec<_> = epochs
            .into_values()
            .filter(|epoch| (begun..ended).contains(&epoch.time.0))
            .collect();
        ensure!(
            !during.is_empty(),
            "no epoch was taken during the measurement"
        );
        let first = during.first().map_or(0, |epoch| epoch.epoch);
        tracking.committed += (committed + 1).saturating_sub(first);
        let known = |us: Option<u64>| us.filter(|&us| us > 0).map(|us| us as f64);
        tracking
            .stop_us
            .extend(during.iter().filter_map(|epoch| known(epoch.stop_us)));
        tracking
            .durable_us
            .extend(during.iter().filter_map(|epoch| known(epoch.durable_us)));
        tracking
            .bytes_written
            .extend(during.iter().map(|epoch| epoch.bytes_written as f64));
        self.outlive.stop(&name)?;
        let ended = running.keeper.wait();
        ended.context("cannot wait for the keeper")?;
        self.outlive.forget(&name)?;
        Ok(speed)
    }

    /// [`Bench::benchmark`], and the epochs that were in the history meanwhile. (They leave it when
    /// the store begins a new generation.)
    fn benchmark_watched(&self, place: &Place, name: &str) -> Result<(f64, Epochs)> {
        let done = AtomicBool::new(false);
        thread::scope(|scope| {
            let watcher = scope.spawn(|| {
                let mut seen = Epochs::new();
                while !done.load(Ordering::Relaxed) {
                    if let Ok(epochs) = self.outlive.history(name) {
                        note(&mut seen, epochs);
                    }
                    thread::sleep(LOOK);
                }
                seen
            });
            let speed = self.benchmark(place);
            done.store(true, Ordering::Relaxed);
            let seen = watcher
                .join()
                .map_err(|_| anyhow!("the watching thread panicked"))?;
            Ok((speed?, seen))
        })
    }

    /// The keys that `redis-benchmark -r` then overwrites, with values that do not compress.
    fn fill(&self, client: &mut Client) -> Result<()> {
        let bar = demo::bar(self.options.keys.into(), "filling");
        let filled = writer::fill(&mut Journal::new(1), client, self.options.keys, &bar);
        bar.finish_and_clear();
        filled
    }

    /// Requests a second.
    fn benchmark(&self, place: &Place) -> Result<f64> {
        let (port, requests) = (place.port.to_string(), self.options.requests.to_string());
        let (keys, length) = (self.options.keys.to_string(), VALUE_LENGTH.to_string());
        let output = Command::new("redis-benchmark")
            .args(["-h", "127.0.0.1", "-p", &port, "-t", "set", "-n", &requests])
            .args(["-r", &keys, "-d", &length, "--csv"])
            .output()
            .context("cannot start redis-benchmark")?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        ensure!(
            output.status.success(),
            "redis-benchmark failed: {}\n{text}",
            output.status
        );
        requests_per_second(&text)
            .with_context(|| format!("redis-benchmark printed no result for SET:\n{text}"))
    }
}

impl Images {
    fn note(&mut self, made: &Checkpoint, raw: f64) {
        self.written.push(made.bytes_written as f64);
        self.speeds
            .push(made.bytes_written as f64 / 1e3 / (made.durable_us.max(1) as f64));
        self.raw.push(raw);
        self.stop_us.push(made.stop_us as f64);
    }
}

type Epochs = BTreeMap<u64, Epoch>;

fn note(seen: &mut Epochs, epochs: Vec<Epoch>) {
    seen.extend(epochs.into_iter().map(|epoch| (epoch.epoch, epoch)));
}

fn still_runs(server: &mut std::process::Child) -> Result<()> {
    match server.try_wait()? {
        Some(status) => bail!("redis-server ended: {status}"),
        None => Ok(()),
    }
}

/// `"SET","98765.43",…` in the output of `redis-benchmark --csv`.
pub fn requests_per_second(text: &str) -> Option<f64> {
    let line = text.lines().find(|line| line.starts_with("\"SET\""))?;
    line.split(',').nth(1)?.trim_matches('"').parse().ok()
}

/// Resident bytes of a process.
fn resident(pid: u32) -> Result<u64> {
    let path = format!("/proc/{pid}/statm");
    let text = fs::read_to_string(&path).with_context(|| format!("cannot read {path}"))?;
    let pages: u64 = text
        .split(' ')
        .nth(1)
        .context("statm has no resident pages")?
        .parse()?;
    Ok(pages * rustix::param::page_size() as u64)
}

/// GB/s of writing about `bytes` bytes past the page cache, durably.
fn raw_write(folder: &Path, bytes: u64) -> Result<f64> {
    let path = folder.join("raw");
    let mut buffer = vec![0_u8; RAW_CHUNK + 4096];
    fastrand::Rng::with_seed(1).fill(&mut buffer);
    // O_DIRECT wants memory at a multiple of the sector size.
    let skip = buffer.as_ptr().align_offset(4096);
    let chunk = buffer
        .get(skip..skip + RAW_CHUNK)
        .context("the buffer cannot be aligned")?;
    let mut file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .custom_flags(rustix::fs::OFlags::DIRECT.bits() as i32)
        .open(&path)
        .with_context(|| format!("cannot write {} past the page cache", path.display()))?;
    let chunks = bytes.div_ceil(RAW_CHUNK as u64).max(1);
    let begun = Instant::now();
    for _ in 0..chunks {
        file.write_all(chunk).context("raw write")?;
    }
    file.sync_data().context("raw flush")?;
    let took = begun.elapsed().max(Duration::from_micros(1));
    fs::remove_file(&path).context("cannot remove the raw file")?;
    Ok((chunks * RAW_CHUNK as u64) as f64 / 1e9 / took.as_secs_f64())
}

fn spread(values: &[f64], digits: usize) -> String {
    let least = values.iter().copied().reduce(f64::min).unwrap_or(f64::NAN);
    let most = values.iter().copied().reduce(f64::max).unwrap_or(f64::NAN);
    let middle = stats::median(values).unwrap_or(f64::NAN);
    format!("{middle:.digits$} ({least:.digits$} to {most:.digits$})")
}

fn ratios(above: &[f64], below: &[f64]) -> Vec<f64> {
    above
        .iter()
        .zip(below)
        .map(|(above, below)| above / below)
        .collect()
}

type Rows = Vec<(&'static str, String)>;

impl Images {
    fn rows(&self) -> Rows {
        let of_raw = ratios(&self.speeds, &self.raw);
        let written = stats::median(&self.written).unwrap_or(0.0);
        let micros = |us: f64| stats::time(Some(us));
        vec![
            ("Redis, resident", stats::bytes(self.resident)),
            ("image, bytes written", stats::bytes(written as u64)),
            ("image, durable GB/s", spread(&self.speeds, 2)),
            ("raw O_DIRECT write, GB/s", spread(&self.raw, 2)),
            ("image against raw", spread(&of_raw, 2)),
            (
                "image, stop time: median / p99 / max",
                stats::times(&self.stop_us),
            ),
            ("restore, all in place", micros(self.restore_us)),
            ("restore, first thread runs", micros(self.first_run_us)),
            ("restore, first answer", micros(self.first_answer_us)),
        ]
    }

    fn json(&self) -> Value {
        json!({
            "resident_bytes": self.resident,
            "image_bytes": self.written,
            "image_gb_per_s": self.speeds,
            "raw_gb_per_s": self.raw,
            "stop_us": self.stop_us,
            "restore_us": self.restore_us,
            "first_run_us": self.first_run_us,
            "first_answer_us": self.first_answer_us,
        })
    }
}

impl Tracking {
    fn rows(&self) -> Rows {
        let of_untracked = ratios(&self.tracked, &self.untracked);
        let epoch_bytes = stats::median(&self.bytes_written).unwrap_or(0.0);
        vec![
            ("SET/s untracked", spread(&self.untracked, 0)),
            ("SET/s tracked, every 200 ms", spread(&self.tracked, 0)),
            ("tracked against untracked", spread(&of_untracked, 3)),
            (
                "epochs under SET load: seen, of committed",
                format!("{}, {}", self.bytes_written.len(), self.committed),
            ),
            (
                "their stop time: median / p99 / max",
                stats::times(&self.stop_us),
            ),
            (
                "their durable time: median / p99 / max",
                stats::times(&self.durable_us),
            ),
            (
                "their bytes written, median",
                stats::bytes(epoch_bytes as u64),
            ),
        ]
    }

    fn json(&self) -> Value {
        json!({
            "untracked_per_s": self.untracked,
            "tracked_per_s": self.tracked,
            "epochs_seen": self.bytes_written.len(),
            "epochs_committed": self.committed,
            "stop_us_median": stats::median(&self.stop_us),
            "stop_us_p99": stats::percentile(&self.stop_us, 99.0),
            "durable_us_median": stats::median(&self.durable_us),
            "epoch_bytes_median": stats::median(&self.bytes_written),
        })
    }
}

fn print(images: Option<&Images>, tracking: Option<&Tracking>) {
    println!("\n| what | measured: median (smallest to largest) |\n|---|---|");
    let rows = images
        .map(Images::rows)
        .into_iter()
        .chain(tracking.map(Tracking::rows));
    for (what, value) in rows.flatten() {
        println!("| {what} | {value} |");
    }
    println!("\n{}", super::machine());
    let (images, tracking) = (images.map(Images::json), tracking.map(Tracking::json));
    println!(
        "{}",
        json!({ "bench": "redis", "images": images, "tracking": tracking })
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_result_of_redis_benchmark_is_read() {
        let text = "\"test\",\"rps\",\"avg_latency_ms\"\n\"SET\",\"98765.43\",\"0.2\"\n";
        assert_eq!(requests_per_second(text), Some(98765.43));
        assert_eq!(requests_per_second("\"GET\",\"1\""), None);
    }

    #[test]
    fn a_raw_write_leaves_no_file() -> Result<()> {
        let folder = tempfile::tempdir_in(workspace::scratch()?)?;
        assert!(raw_write(folder.path(), 5_000_000)? > 0.0);
        assert_eq!(fs::read_dir(folder.path())?.count(), 0);
        Ok(())
    }

    #[test]
    fn our_own_memory_is_measured() {
        assert!(resident(std::process::id()).unwrap() > 4096);
    }
}
