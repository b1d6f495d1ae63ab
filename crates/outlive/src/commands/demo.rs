//! `demo`: a counter is killed without warning, together with its keeper, and counts on.
//!
//! Everything is done with the ordinary commands, in a store of its own in the temporary
//! directory, and removed at the end. The counter is a loop in the user's `sh`, of builtin commands
//! only, so that it is one process.

use crate::out;
use outlive_keeper::control::{Reply, Request, ask};
use outlive_keeper::keep::SIGNALS;
use outlive_keeper::subject::{Root, Subject};
use outlive_keeper::{KeeperError, procfs};
use outlive_linux::signals::SignalQueue;
use rustix::process::{Pid, Signal, WaitOptions, kill_process, set_child_subreaper, waitpid};
use serde_json::json;
use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How long it counts before and after its death.
const ACT: Duration = Duration::from_secs(2);
/// How long a step that must come may take.
const PATIENCE: Duration = Duration::from_secs(20);
/// The counter: it works for every number, and starts no program.
const COUNTER: &str = "i=0; while :; do i=$((i+1)); \
    if [ $((i % 100000)) = 0 ]; then echo $((i / 100000)); fi; done";
/// The counter's name.
const NAME: &str = "counter";

/// `outlive demo`
pub fn demo(json: bool) -> Result<u8, KeeperError> {
    let mut show = Show::prepare()?;
    let done = show.play();
    show.clean_up();
    let (before, after, epoch) = done?;
    if after <= 1 || after > before + 1 {
        return Err(KeeperError::Other(format!(
            "the counter was at {before} when it was killed and came back at {after}"
        )));
    }
    if json {
        out::json(&json!({ "before": before, "after": after, "epoch": epoch }));
    } else {
        out::say(&format!(
            "killed at {before}, came back at {after}. What is left was removed."
        ));
        out::say("for your own: `outlive run --name NAME -- COMMAND`, `outlive restore NAME`");
    }
    Ok(0)
}

/// The store, and whatever runs at the moment.
struct Show {
    dir: PathBuf,
    subject: Subject,
    signals: SignalQueue,
    keeper: Option<Child>,
    program: Option<u32>,
}

/// Numbers as they arrive: the first and the last.
struct Numbers {
    first: Arc<AtomicU64>,
    last: Arc<AtomicU64>,
    reader: JoinHandle<()>,
}

impl Show {
    fn prepare() -> Result<Self, KeeperError> {
        let dir = std::env::temp_dir().join(format!("outlive-demo-{}", std::process::id()));
        let subject = Root::find(Some(&dir))?.subject(NAME)?;
        let signals = SignalQueue::open(&SIGNALS).map_err(KeeperError::io("open signals"))?;
        // The counter becomes our child when its keeper dies, so that it can be reaped.
        set_child_subreaper(Some(rustix::process::getpid()))
            .map_err(KeeperError::io("become the parent of orphans"))?;
        Ok(Self {
            dir,
            subject,
            signals,
            keeper: None,
            program: None,
        })
    }

    /// The number before the death, the first one after it, and the epoch between.
    fn play(&mut self) -> Result<(u64, u64, u64), KeeperError> {
        out::say("a counter in `sh` runs under `outlive run`, with an epoch every 100 ms");
        let numbers = self.start(&["run", "--name", NAME, "--"], true)?;
        self.wait_for_epoch()?;
        self.pause(ACT)?;
        let epoch = self.kill()?;
        let _ = numbers.reader.join();
        let before = numbers.last.load(Ordering::Relaxed);
        out::say(&format!(
            "counter and keeper were killed (SIGKILL) at {before}; `outlive restore` from epoch {epoch}"
        ));
        self.pause(Duration::from_secs(1))?;
        let numbers = self.start(&["restore", NAME], false)?;
        let started = Instant::now();
        while numbers.first.load(Ordering::Relaxed) == 0 {
            self.pause(Duration::from_millis(20))?;
            self.must_run()?;
            if started.elapsed() > PATIENCE {
                return Err(KeeperError::Other("the counter did not come back".into()));
            }
        }
        self.pause(ACT)?;
        self.kill()?;
        let _ = numbers.reader.join();
        Ok((before, numbers.first.load(Ordering::Relaxed), epoch))
    }

    fn start(&mut self, words: &[&str], count: bool) -> Result<Numbers, KeeperError> {
        let itself = std::env::current_exe().map_err(KeeperError::io("find this program"))?;
        let mut command = Command::new(&itself);
        command.arg("--store").arg(&self.dir).args(words);
        if count {
            command.args(["sh", "-c", COUNTER]);
        }
        // Pipes, also where our own streams are files: those would be cut back with the counter.
        command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let mut keeper = self
            .signals
            .release_in(&mut command)
            .spawn()
            .map_err(KeeperError::io("start outlive"))?;
        let pipe = keeper.stdout.take();
        let said = keeper.stderr.take();
        std::thread::spawn(move || {
            let lines = said
                .into_iter()
                .flat_map(|pipe| BufReader::new(pipe).lines());
            lines
                .map_while(Result::ok)
                .for_each(|line| eprintln!("{line}"));
        });
        self.keeper = Some(keeper);
        let (first, last) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
        let (one, two) = (first.clone(), last.clone());
        let reader = std::thread::spawn(move || {
            let lines = pipe
                .into_iter()
                .flat_map(|pipe| BufReader::new(pipe).lines());
            for number in lines
                .map_while(Result::ok)
                .filter_map(|line| line.parse().ok())
            {
                out::line(&format!("  {number}"));
                let _ = one.compare_exchange(0, number, Ordering::Relaxed, Ordering::Relaxed);
                two.store(number, Ordering::Relaxed);
            }
        });
        Ok(Numbers {
            first,
            last,
            reader,
        })
    }

    /// The keeper must not have given up.
    fn must_run(&mut self) -> Result<(), KeeperError> {
        let ended = self
            .keeper
            .as_mut()
            .and_then(|keeper| keeper.try_wait().ok().flatten());
        match ended {
            None => Ok(()),
            Some(status) => Err(KeeperError::Other(format!("outlive ended with {status}"))),
        }
    }

    fn wait_for_epoch(&mut self) -> Result<(), KeeperError> {
        let started = Instant::now();
        loop {
            if let Ok(Some(Reply::Status(status))) = ask(self.subject.dir(), Request::Status, None)
            {
                self.program = Some(status.pids.pid);
                if status.epoch > 0 {
                    return Ok(());
                }
                if let Some(why) = status.last_failure {
                    return Err(KeeperError::Refused(format!(
                        "no epoch can be taken: {why}"
                    )));
                }
            }
            self.must_run()?;
            if started.elapsed() > PATIENCE {
                return Err(KeeperError::Other("no epoch was taken".into()));
            }
            self.pause(Duration::from_millis(20))?;
        }
    }

    fn pause(&mut self, time: Duration) -> Result<(), KeeperError> {
        let started = Instant::now();
        while started.elapsed() < time {
            if let Ok(Some(_)) = self.signals.take() {
                return Err(KeeperError::Other("interrupted".into()));
            }
            std::thread::sleep(time.min(Duration::from_millis(20)));
        }
        Ok(())
    }

    /// Kills the counter and its keeper; the newest epoch that was seen.
    fn kill(&mut self) -> Result<u64, KeeperError> {
        let status = ask(self.subject.dir(), Request::Status, None)?;
        let Some(Reply::Status(status)) = status else {
            return Err(KeeperError::Other("the keeper did not answer".into()));
        };
        self.program = Some(status.pids.pid);
        self.end();
        Ok(status.epoch)
    }

    /// Ends and reaps whatever runs.
    fn end(&mut self) {
        if let Some(mut keeper) = self.keeper.take() {
            let _ = keeper.kill();
            let _ = keeper.wait();
        }
        let program = self
            .program
            .take()
            .filter(|pid| procfs::start_time(*pid).is_some());
        if let Some(pid) = program.and_then(|pid| Pid::from_raw(i32::try_from(pid).ok()?)) {
            let _ = kill_process(pid, Signal::KILL);
            let _ = waitpid(Some(pid), WaitOptions::empty());
        }
    }

    fn clean_up(&mut self) {
        self.end();
        let _ = std::fs::remove_dir_all(&self.dir);
    }
}
