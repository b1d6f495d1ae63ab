//! Leaves nothing behind: no process and no file, after success, failure and Ctrl-C alike.
//!
//! # Rules
//! - This process is a *child subreaper*: a background process that was started here, however
//!   often it forked, becomes our child when its parent ends. So "everything that was started
//!   here" is exactly "every descendant of ours", and nothing else is ever signalled.
//! - A process is ended by its number while it is our child: its number cannot be reused before
//!   we reap it.
//! - Folders are registered before anything is put into them.

use anyhow::{Context, Result, bail};
use rustix::process::{Pid, Signal, WaitOptions, kill_process, set_child_subreaper, waitpid};
use std::{
    fs,
    path::{Path, PathBuf},
    sync::{Mutex, MutexGuard, PoisonError},
    thread,
    time::{Duration, Instant},
};

/// Held while something must not be cut short.
static UNINTERRUPTED: Mutex<()> = Mutex::new(());

static FOLDERS: Mutex<Vec<PathBuf>> = Mutex::new(Vec::new());

/// Becomes the subreaper, and cleans up on SIGINT, SIGTERM and SIGHUP.
pub fn install() -> Result<()> {
    use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
    set_child_subreaper(Some(rustix::process::getpid()))
        .context("cannot become the reaper of background processes")?;
    let mut signals = signal_hook::iterator::Signals::new([SIGINT, SIGTERM, SIGHUP])
        .context("cannot watch for Ctrl-C")?;
    thread::spawn(move || {
        if let Some(signal) = signals.forever().next() {
            let _whole = uninterrupted();
            eprintln!("\nxtask: interrupted; ending what was started and removing its files");
            everything();
            std::process::exit(128 + signal);
        }
    });
    Ok(())
}

/// While the result lives, an interruption waits (a package manager must not be killed).
pub fn uninterrupted() -> MutexGuard<'static, ()> {
    UNINTERRUPTED.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Ends every descendant and removes every registered folder.
pub fn everything() {
    end_descendants();
    let folders = {
        let mut guard = FOLDERS.lock().unwrap_or_else(PoisonError::into_inner);
        std::mem::take(&mut *guard)
    };
    for folder in folders {
        if let Err(error) = fs::remove_dir_all(&folder)
            && folder.exists()
        {
            eprintln!(
                "xtask: cannot remove {}: {error}; remove it by hand",
                folder.display()
            );
        }
    }
}

/// Makes a private folder below `parent` that is removed at the end.
pub fn folder(parent: &Path) -> Result<PathBuf> {
    let made = tempfile::Builder::new()
        .prefix("outlive-")
        .tempdir_in(parent)
        .with_context(|| format!("cannot make a folder in {}", parent.display()))?
        .keep();
    FOLDERS
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .push(made.clone());
    Ok(made)
}

/// Sends SIGKILL to a process.
pub fn kill(pid: u32) -> Result<()> {
    kill_process(typed(pid)?, Signal::KILL).with_context(|| format!("cannot kill process {pid}"))
}

/// Waits until a killed process, child or not, is gone and its number is free again.
pub fn wait_gone(pid: u32) -> Result<()> {
    wait_gone_within(pid, Duration::from_secs(20))
}

/// Waits until a process, child or not, is gone and its number is free again.
pub fn wait_gone_within(pid: u32, patience: Duration) -> Result<()> {
    let typed = typed(pid)?;
    let deadline = Instant::now() + patience;
    while Path::new(&format!("/proc/{pid}")).exists() {
        // ECHILD only says that somebody else has to reap it (or that we shall, soon).
        let _ = waitpid(Some(typed), WaitOptions::NOHANG);
        if Instant::now() > deadline {
            bail!(
                "process {pid} has not ended within {} s",
                patience.as_secs()
            );
        }
        thread::sleep(Duration::from_millis(1));
    }
    Ok(())
}

fn typed(pid: u32) -> Result<Pid> {
    i32::try_from(pid)
        .ok()
        .and_then(Pid::from_raw)
        .with_context(|| format!("{pid} is no process number"))
}

/// The parent of a process, from `/proc/PID/status`.
pub fn parent(pid: u32) -> Result<u32> {
    status_field(pid, "PPid:")?
        .parse()
        .with_context(|| format!("process {pid} has no parent"))
}

/// The name (`comm`) of a process.
pub fn name(pid: u32) -> Result<String> {
    status_field(pid, "Name:")
}

fn status_field(pid: u32, field: &str) -> Result<String> {
    let path = format!("/proc/{pid}/status");
    let text = fs::read_to_string(&path).with_context(|| format!("cannot read {path}"))?;
    text.lines()
        .find_map(|line| line.strip_prefix(field))
        .map(|value| value.trim().to_owned())
        .with_context(|| format!("{path} has no line {field}"))
}

fn end_descendants() {
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        let children = children();
        if children.is_empty() || Instant::now() > deadline {
            return;
        }
        for child in children {
            if let Ok(pid) = typed(child) {
                let _ = kill_process(pid, Signal::KILL);
                let _ = waitpid(Some(pid), WaitOptions::NOHANG);
            }
        }
        thread::sleep(Duration::from_millis(2));
    }
}

fn children() -> Vec<u32> {
    let Ok(entries) = fs::read_dir("/proc") else {
        return Vec::new();
    };
    entries
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
        .filter(|&pid| parent(pid).is_ok_and(|parent| parent == std::process::id()))
        .collect()
}
