//! The `outlive` binary, called as a user calls it.

use crate::cleanup;
use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, de::DeserializeOwned};
use std::{
    io::Read,
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{Arc, Mutex, PoisonError},
    thread,
    time::{Duration, Instant},
};

/// How long to wait for an epoch that must come.
const EPOCH_PATIENCE: Duration = Duration::from_secs(120);

/// The binary and the store that it is told to use.
#[derive(Clone, Debug)]
pub struct Outlive {
    /// The binary.
    pub binary: PathBuf,
    /// The folder that holds the store.
    pub store: PathBuf,
}

/// One line of `history --json`.
#[derive(Clone, Debug, Deserialize)]
pub struct Epoch {
    /// Its number.
    pub epoch: u64,
    /// When the program was stopped for it.
    pub time: Moment,
    /// From the first thread frozen to the last resumed, microseconds.
    pub stop_us: Option<u64>,
    /// Until it would have survived a power cut, microseconds.
    pub durable_us: Option<u64>,
    /// Pages stored.
    pub pages: u64,
    /// Bytes written to the medium.
    pub bytes_written: u64,
}

/// What `restore --json` prints.
#[derive(Clone, Debug, Deserialize)]
pub struct Restored {
    /// The process.
    pub pid: u32,
    /// Until everything was in place, microseconds.
    pub restore_us: u64,
    /// Until the first thread ran, microseconds.
    pub first_run_us: u64,
    /// The epoch that was restored.
    pub epoch: u64,
}

/// What `checkpoint --json` prints, as far as it is used here.
#[derive(Clone, Debug, Deserialize)]
pub struct Checkpoint {
    /// From the first thread frozen to the last resumed, microseconds.
    pub stop_us: u64,
    /// Until the image would have survived a power cut, microseconds.
    pub durable_us: u64,
    /// Bytes written to the medium.
    pub bytes_written: u64,
}

/// What `power simulate --json` prints, as far as it is used here.
#[derive(Clone, Copy, Debug, Deserialize)]
pub struct PowerEvent {
    /// From the stop until the last epoch would have survived a power cut, microseconds.
    pub durable_us: Option<u64>,
    /// From the event until the program had ended, microseconds.
    pub event_us: Option<u64>,
}

/// A moment, nanoseconds since the Unix epoch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Moment(pub u64);

impl<'de> Deserialize<'de> for Moment {
    fn deserialize<D: serde::Deserializer<'de>>(source: D) -> Result<Self, D::Error> {
        let given = serde_json::Value::deserialize(source)?;
        let nanos = given.as_u64().or_else(|| parse_time(given.as_str()?));
        nanos.map(Self).ok_or_else(|| {
            let wanted = "nanoseconds since 1970 or a time like 2026-01-31T23:59:59.5Z";
            serde::de::Error::custom(format!("{given} is not {wanted}"))
        })
    }
}

/// RFC 3339 in UTC to nanoseconds since the Unix epoch.
fn parse_time(text: &str) -> Option<u64> {
    let (date, clock) = text.strip_suffix('Z')?.split_once('T')?;
    let mut parts = date.splitn(3, '-').map(str::parse::<u64>);
    let (year, month, day) = (
        parts.next()?.ok()?,
        parts.next()?.ok()?,
        parts.next()?.ok()?,
    );
    let (clock, fraction) = clock.split_once('.').unwrap_or((clock, ""));
    let mut parts = clock.splitn(3, ':').map(str::parse::<u64>);
    let (hour, minute, second) = (
        parts.next()?.ok()?,
        parts.next()?.ok()?,
        parts.next()?.ok()?,
    );
    let digits_ok = fraction.len() <= 9 && fraction.bytes().all(|byte| byte.is_ascii_digit());
    let ranges = (1970..10_000).contains(&year) && (1..=12).contains(&month);
    if !digits_ok || !ranges || !(1..=31).contains(&day) || hour > 23 || minute > 59 || second > 60
    {
        return None;
    }
    let nanos: u64 = format!("{fraction:0<9}").parse().ok()?;
    let seconds = ((days(year, month, day) * 24 + hour) * 60 + minute) * 60 + second;
    seconds.checked_mul(1_000_000_000)?.checked_add(nanos)
}

/// Days from 1 January 1970 to a date of the Gregorian calendar not before it.
fn days(year: u64, month: u64, day: u64) -> u64 {
    // Years begin in March here, so that a leap day is the last day of its year.
    let year = if month < 3 { year - 1 } else { year };
    let day_of_year = (153 * ((month + 9) % 12) + 2) / 5 + day - 1;
    year * 365 + year / 4 - year / 100 + year / 400 + day_of_year - 719_468
}

/// Output of a process that outlives the call which started it: collected as it comes.
#[derive(Clone, Default)]
pub struct Output(Arc<Mutex<Vec<u8>>>);

impl Output {
    fn collect(mut pipe: impl Read + Send + 'static) -> Self {
        let output = Self::default();
        let sink = output.clone();
        thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(count @ 1..) = pipe.read(&mut buffer) {
                sink.0
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .extend(&buffer[..count]);
            }
        });
        output
    }

    /// What came so far.
    pub fn text(&self) -> String {
        let bytes = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        String::from_utf8_lossy(&bytes).into_owned()
    }
}

/// A program under `outlive run`.
pub struct Running {
    /// The keeper.
    pub keeper: Child,
    /// What the keeper says.
    pub said: Output,
}

impl Running {
    /// Refuses once the keeper has ended.
    pub fn must_live(&mut self) -> Result<()> {
        if let Some(status) = self.keeper.try_wait()? {
            thread::sleep(Duration::from_millis(50));
            bail!(
                "`outlive run` ended ({status}) and said:\n{}",
                self.said.text()
            );
        }
        Ok(())
    }
}

impl Outlive {
    fn command(&self, words: &[&str]) -> Command {
        let mut command = Command::new(&self.binary);
        command.args(words).env("OUTLIVE_STORE", &self.store);
        // A process group of its own: a Ctrl-C at the terminal is for us, who then clean up.
        command.stdin(Stdio::null()).process_group(0);
        command
    }

    /// `outlive run --name NAME --every EVERY --store DIR -- CMD…`
    pub fn run(&self, name: &str, every: &str, line: &[String]) -> Result<Running> {
        self.run_with(name, every, &[], line)
    }

    /// The same with more flags.
    pub fn run_with(
        &self,
        name: &str,
        every: &str,
        flags: &[&str],
        line: &[String],
    ) -> Result<Running> {
        let store = self.store.display().to_string();
        let mut command = self.command(&["run", "--name", name, "--every", every]);
        command.args(flags);
        command.args(["--store", &store, "--"]).args(line);
        command.stdout(Stdio::null()).stderr(Stdio::piped());
        let mut keeper = command.spawn().context("cannot start outlive")?;
        let pipe = keeper
            .stderr
            .take()
            .context("the keeper has no standard error")?;
        Ok(Running {
            keeper,
            said: Output::collect(pipe),
        })
    }

    /// `outlive restore NAME --detach --json`; the keeper goes on in the background.
    /// Also returns what it goes on saying.
    pub fn restore(&self, name: &str) -> Result<(Restored, Output)> {
        self.json(&["restore", name, "--detach", "--json"])
    }

    /// `outlive restore --image DIR --detach --json`
    pub fn restore_image(&self, image: &Path) -> Result<Restored> {
        let image = image.display().to_string();
        Ok(self
            .json(&["restore", "--image", &image, "--detach", "--json"])?
            .0)
    }

    /// `outlive checkpoint --pid PID --image DIR [--leave-running] --json`
    pub fn checkpoint(&self, pid: u32, image: &Path, leave_running: bool) -> Result<Checkpoint> {
        let (pid, image) = (pid.to_string(), image.display().to_string());
        let mut words = vec!["checkpoint", "--pid", &pid, "--image", &image, "--json"];
        if leave_running {
            words.push("--leave-running");
        }
        Ok(self.json(&words)?.0)
    }

    /// `outlive history NAME --json`, oldest first.
    pub fn history(&self, name: &str) -> Result<Vec<Epoch>> {
        let mut epochs: Vec<Epoch> = self.json(&["history", name, "--json"])?.0;
        epochs.sort_by_key(|epoch| epoch.epoch);
        Ok(epochs)
    }

    /// Waits until an epoch is committed that was taken not before a moment.
    pub fn await_epoch_since(&self, name: &str, nanos: u64) -> Result<()> {
        let deadline = Instant::now() + EPOCH_PATIENCE;
        loop {
            let history = self.history(name);
            if let Ok(epochs) = &history
                && epochs.iter().any(|epoch| epoch.time.0 >= nanos)
            {
                return Ok(());
            }
            if Instant::now() > deadline {
                let older = history?.len();
                let waited = EPOCH_PATIENCE.as_secs();
                bail!("no new epoch of {name} within {waited} s; there are {older} older ones");
            }
            thread::sleep(Duration::from_millis(50));
        }
    }

    /// `outlive power simulate NAME --json`
    pub fn simulate_power_event(&self, name: &str) -> Result<PowerEvent> {
        Ok(self.json(&["power", "simulate", name, "--json"])?.0)
    }

    /// The same with mains that come back at once.
    pub fn simulate_outage(&self, name: &str) -> Result<serde_json::Value> {
        let back = ["--mains-back-after", "1us", "--json"];
        let words: Vec<&str> = ["power", "simulate", name]
            .into_iter()
            .chain(back)
            .collect();
        Ok(self.json(&words)?.0)
    }

    /// What `outlive ps --json` says of a subject.
    pub fn status(&self, name: &str) -> Result<serde_json::Value> {
        let all: Vec<serde_json::Value> = self.json(&["ps", "--json"])?.0;
        let found = all.into_iter().find(|entry| entry["name"] == name);
        found.with_context(|| format!("`outlive ps` does not know {name}"))
    }

    /// `outlive stop NAME`
    pub fn stop(&self, name: &str) -> Result<()> {
        self.call(&["stop", name]).map(drop)
    }

    /// `outlive forget NAME`, which its keeper must have left.
    pub fn forget(&self, name: &str) -> Result<()> {
        self.call(&["forget", name]).map(drop)
    }

    fn json<T: DeserializeOwned>(&self, words: &[&str]) -> Result<(T, Output)> {
        let (text, said) = self.call(words)?;
        let parsed = serde_json::from_str(&text).with_context(|| {
            format!(
                "`outlive {}` printed what its contract does not allow:\n{text}",
                words.join(" ")
            )
        })?;
        Ok((parsed, said))
    }

    /// Runs a command to its end and returns what it printed. Not until the end of its *output*:
    /// a program that it restored holds the same pipe for as long as it lives.
    fn call(&self, words: &[&str]) -> Result<(String, Output)> {
        let what = format!("`outlive {}`", words.join(" "));
        let mut command = self.command(words);
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command
            .spawn()
            .with_context(|| format!("cannot start {what}"))?;
        let pipe = child.stdout.take().context("no standard output")?;
        let said = Output::collect(child.stderr.take().context("no standard error")?);
        let printed = Output::collect(pipe);
        let status = child
            .wait()
            .with_context(|| format!("cannot wait for {what}"))?;
        // What it wrote is in the pipes; the collecting threads need a moment to take it.
        let needs_json = words.contains(&"--json");
        let deadline = Instant::now() + Duration::from_secs(5);
        while needs_json
            && serde_json::from_str::<serde::de::IgnoredAny>(&printed.text()).is_err()
            && Instant::now() < deadline
        {
            thread::sleep(Duration::from_micros(200));
        }
        if !status.success() {
            thread::sleep(Duration::from_millis(50));
            bail!(
                "{what} failed ({status}) and said:\n{}{}",
                said.text(),
                printed.text()
            );
        }
        Ok((printed.text(), said))
    }
}

/// The keeper of a restored program: its parent.
pub fn keeper_of(pid: u32) -> Result<u32> {
    let keeper = cleanup::parent(pid)?;
    let name = cleanup::name(keeper)?;
    ensure!(
        name == "outlive",
        "the restored process {pid} has no keeper: its parent is {keeper} ({name})"
    );
    Ok(keeper)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_read() {
        assert_eq!(parse_time("1970-01-01T00:00:00Z"), Some(0));
        assert_eq!(
            parse_time("1970-01-02T00:00:01.5Z"),
            Some(86_401_500_000_000)
        );
        assert_eq!(
            parse_time("2000-02-29T00:00:00Z"),
            Some(951_782_400_000_000_000)
        );
        assert_eq!(
            parse_time("2026-11-21T08:16:38.000000001Z"),
            Some(1_795_248_998_000_000_001)
        );
        for wrong in [
            "",
            "Z",
            "2026-11-21",
            "2026-13-01T00:00:00Z",
            "2026-01-01T00:00:00.x1Z",
        ] {
            assert_eq!(parse_time(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn the_contract_of_history_is_read() {
        let line = r#"[{"epoch":3,"time":"2026-11-21T08:16:38Z","stop_us":410,"durable_us":null,
                        "pages":7,"bytes_written":40960,"more":true}]"#;
        let epochs: Vec<Epoch> = serde_json::from_str(line).unwrap();
        assert_eq!((epochs[0].epoch, epochs[0].durable_us), (3, None));
    }
}
