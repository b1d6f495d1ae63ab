//! A machine of QEMU that boots the kernel, with memory that survives; its switch and its reset button.

use crate::cleanup;
use anyhow::{Context, Result, bail};
use std::{
    fs,
    io::Write,
    path::{Path, PathBuf},
    process::{Child, ChildStdin, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

/// Bytes of memory that survives.
pub const MEMORY: u64 = 16 << 20;

/// A machine that is on; dropping it switches it off.
pub struct Switched {
    child: Child,
    /// Where QEMU takes commands.
    monitor: ChildStdin,
    /// The file that the kernel's words go to.
    said: PathBuf,
    /// How many of them were there at the last reset.
    before: usize,
    /// It was reset while it came up.
    pub reset_early: bool,
}

impl Switched {
    /// Switches it on.
    pub fn on(kernel: &Path, memory: &Path, said: PathBuf) -> Result<Self> {
        let kept = format!(
            "memory-backend-file,id=kept,share=on,size={MEMORY},mem-path={}",
            memory.display()
        );
        let mut child = Command::new("qemu-system-x86_64")
            .args(["-accel", "tcg", "-cpu", "max"])
            .args(["-machine", "pc,nvdimm=on"])
            .args(["-m", "128,slots=2,maxmem=1G"])
            .args(["-nodefaults", "-nic", "none", "-display", "none"])
            .args(["-object", &kept])
            .args(["-device", "nvdimm,id=slot,memdev=kept"])
            .arg("-kernel")
            .arg(kernel)
            .arg("-serial")
            .arg(format!("file:{}", said.display()))
            .args(["-monitor", "stdio"])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::inherit())
            .spawn()
            .context("cannot start qemu-system-x86_64")?;
        let monitor = child.stdin.take().context("QEMU has no input")?;
        Ok(Self {
            child,
            monitor,
            said,
            before: 0,
            reset_early: false,
        })
    }

    /// All that the kernel said since the machine was switched on.
    pub fn said(&self) -> Result<String> {
        match fs::read(&self.said) {
            Ok(bytes) => Ok(String::from_utf8_lossy(&bytes).into_owned()),
            // QEMU has not begun yet.
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(String::new()),
            Err(error) => Err(error).context("reading what the kernel said"),
        }
    }

    /// Waits until tasks run, since the last reset.
    pub fn wait_until_up(&mut self, patience: Duration) -> Result<()> {
        let begun = Instant::now();
        loop {
            if self.is_up()? {
                return Ok(());
            }
            let over = self.child.try_wait()?.is_some();
            if over || begun.elapsed() > patience {
                bail!(
                    "the kernel does not come up; it said:\n{}",
                    super::last_of(&self.said()?)
                );
            }
            thread::sleep(Duration::from_millis(20));
        }
    }

    fn is_up(&self) -> Result<bool> {
        let said = self.said()?;
        let new = said.get(self.before..).unwrap_or_default();
        Ok(new.lines().any(|line| line.starts_with("task ")))
    }

    /// Presses the reset button.
    pub fn reset(&mut self) -> Result<()> {
        self.reset_early |= !self.is_up()?;
        self.before = self.said()?.len();
        writeln!(self.monitor, "system_reset").context("resetting the machine")
    }

    /// Switches it off, at once; what the kernel had said.
    pub fn off(mut self) -> Result<String> {
        self.end()?;
        self.said()
    }

    fn end(&mut self) -> Result<()> {
        if self.child.try_wait()?.is_none() {
            cleanup::kill(self.child.id())?;
            self.child.wait()?;
        }
        Ok(())
    }
}

impl Drop for Switched {
    fn drop(&mut self) {
        // Whoever drops it early is on the way to an error already.
        let _ = self.end();
    }
}
