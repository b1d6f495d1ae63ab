//! The acts: a kill, and a planned event.

use super::{Demo, check::Checked, now_nanos, report, spinner, writer};
use crate::{cleanup, outlive, redis::Identity, stats};
use anyhow::{Context, Result, anyhow, ensure};
use std::{
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    thread,
    time::{Duration, Instant},
};

/// How long the keeper may take to end after the program that it kept has ended.
const KEEPER_PATIENCE: Duration = Duration::from_secs(20);

/// How often to look at the history while writing.
const LOOK: Duration = Duration::from_millis(300);

impl Demo {
    /// Writes, kills Redis and its keeper, restores, compares.
    pub(super) fn kill(&mut self, round: u32) -> Result<()> {
        let delay = self.random_delay();
        let keeper_first = self.random.bool();
        let order = if keeper_first {
            "keeper, then redis"
        } else {
            "redis, then keeper"
        };
        println!(
            "\nkill {round}: SIGKILL ({order}) {:.3} s after the first write",
            delay.as_secs_f64()
        );
        let (redis, keeper) = (self.identity.pid, self.keeper);
        let victims = if keeper_first {
            [keeper, redis]
        } else {
            [redis, keeper]
        };
        let mut killed_at = 0;
        self.write_until(delay, || {
            killed_at = now_nanos();
            victims.into_iter().try_for_each(cleanup::kill)
        })?;
        victims.into_iter().try_for_each(cleanup::wait_gone)?;
        ensure!(
            self.place.is_silent(),
            "somebody answers at the port although redis was killed"
        );
        println!("  both processes are gone, the port is silent");

        let history = self.outlive.history(&self.name)?;
        let newest = history.last().context("no epoch was committed")?.clone();
        self.report.note_epochs(history);
        let must_hold = self.journal.acknowledged_before(newest.time.0);
        let acknowledged = self.journal.acknowledged();
        let restore = self.restore(newest.epoch)?;
        let checked = self.check_every_key(must_hold)?;
        let behind = checked
            .newest_at
            .map_or(0, |at| killed_at.saturating_sub(at));
        let lost_ms = if checked.lost == 0 {
            0.0
        } else {
            behind as f64 / 1e6
        };
        println!(
            "  every key is right: {} keys as after write {} of {} acknowledged; {} later ones \
             ({lost_ms:.0} ms) came after epoch {}",
            stats::count(self.journal.keys_after(checked.prefix)),
            stats::count(checked.prefix as u64),
            stats::count(acknowledged as u64),
            stats::count(checked.lost as u64),
            newest.epoch
        );
        self.report.kills.push(report::Kill {
            restore,
            lost: checked.lost,
            lost_ms,
        });
        Ok(())
    }

    /// Writes, announces a power cut, restores, compares: nothing acknowledged may be missing.
    pub(super) fn planned_event(&mut self) -> Result<()> {
        let delay = self.random_delay();
        println!(
            "\nplanned event: `outlive power simulate` {:.3} s after the first write",
            delay.as_secs_f64()
        );
        let (outlive, name) = (self.outlive.clone(), self.name.clone());
        let mut event = None;
        self.write_until(delay, || {
            event = Some(outlive.simulate_power_event(&name)?);
            Ok(())
        })?;
        self.await_gone(self.identity.pid)?;
        self.await_gone(self.keeper)?;
        ensure!(
            self.place.is_silent(),
            "somebody answers at the port after the power event"
        );

        let history = self.outlive.history(&self.name)?;
        let newest = history.last().context("no epoch was committed")?.epoch;
        self.report.note_epochs(history);
        let acknowledged = self.journal.acknowledged();
        let restore = self.restore(newest)?;
        let Checked { prefix, lost, .. } = self.check_every_key(acknowledged)?;
        println!(
            "  every key is right: {} keys, all {} acknowledged writes are there",
            stats::count(self.journal.keys_after(prefix)),
            stats::count(acknowledged as u64)
        );
        let event = event.context("no power event happened")?;
        self.report.planned = Some(report::Planned {
            restore,
            lost,
            event,
        });
        Ok(())
    }

    fn random_delay(&mut self) -> Duration {
        let (least, most) = self.options.writing();
        let span = u64::try_from((most - least).as_micros()).unwrap_or(u64::MAX);
        least + Duration::from_micros(self.random.u64(..span.max(1)))
    }

    /// Writes without pause; after `delay` calls `end`, which must make the connection break.
    fn write_until(&mut self, delay: Duration, end: impl FnOnce() -> Result<()>) -> Result<()> {
        let mut client = self.client()?;
        let (stop, acknowledged) = (AtomicBool::new(false), AtomicU64::new(0));
        let (journal, mut random) = (&mut self.journal, self.random.fork());
        let begun = Instant::now();
        let spinner = spinner("writing");
        let how = thread::scope(|scope| -> Result<String> {
            let writer = scope.spawn(|| {
                writer::write_on(journal, &mut client, &mut random, &stop, &acknowledged)
            });
            while begun.elapsed() < delay && !writer.is_finished() {
                let left = delay.saturating_sub(begun.elapsed());
                thread::sleep(left.min(LOOK));
                // Only for the figures: epochs leave the history when a new generation begins.
                if begun.elapsed() < delay
                    && let Ok(epochs) = self.outlive.history(&self.name)
                {
                    self.report.note_epochs(epochs);
                }
                let written = acknowledged.load(Ordering::Relaxed);
                spinner.set_message(format!("{} writes acknowledged", stats::count(written)));
            }
            let early = writer.is_finished();
            let ended = if early { Ok(()) } else { end() };
            if ended.is_err() {
                stop.store(true, Ordering::Relaxed);
            }
            let how = writer
                .join()
                .map_err(|_| anyhow!("the writer panicked"))??;
            ended?;
            ensure!(
                !early,
                "the connection broke although nothing had been done to redis: {how}"
            );
            Ok(how)
        })?;
        let seconds = begun.elapsed().as_secs_f64();
        spinner.finish_and_clear();
        let written = acknowledged.load(Ordering::Relaxed);
        self.report.write_rates.push(written as f64 / seconds);
        println!(
            "  {} writes acknowledged; then: {how}",
            stats::count(written)
        );
        Ok(())
    }

    /// Restores the newest epoch and meets the server again.
    fn restore(&mut self, newest: u64) -> Result<report::Restore> {
        let begun = Instant::now();
        let (restored, said) = self.outlive.restore(&self.name)?;
        self.said = said;
        let pid = restored.pid;
        let (_, identity) = self.place.wait(|| {
            let alive = std::path::Path::new(&format!("/proc/{pid}")).exists();
            ensure!(alive, "the restored process {pid} has ended");
            Ok(())
        })?;
        let first_answer = begun.elapsed();
        ensure!(
            restored.epoch == newest,
            "epoch {} was restored; the newest committed one is {newest}",
            restored.epoch
        );
        ensure!(
            pid == self.identity.pid,
            "the restored process has PID {pid}, not {}",
            self.identity.pid
        );
        identity.must_continue(&self.identity)?;
        self.keeper = outlive::keeper_of(pid)?;
        self.note_return(&identity, first_answer);
        self.identity = identity;
        Ok(report::Restore {
            restore_us: restored.restore_us as f64,
            first_run_us: restored.first_run_us as f64,
            first_answer_us: first_answer.as_micros() as f64,
        })
    }

    fn note_return(&self, identity: &Identity, first_answer: Duration) {
        println!(
            "  restored: the same PID {}, port {} and run ID {}…, up for {} s; first answer {} \
             after the command",
            identity.pid,
            identity.port,
            identity.run_id.get(..8).unwrap_or_default(),
            identity.uptime,
            stats::time(Some(first_answer.as_micros() as f64))
        );
    }

    /// Waits for a process that ends by itself.
    pub(super) fn await_gone(&self, pid: u32) -> Result<()> {
        cleanup::wait_gone_within(pid, KEEPER_PATIENCE)
    }
}
