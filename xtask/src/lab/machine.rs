//! A machine of QEMU: one disk, two serial lines. The kernel writes to the first; commands go over
//! the second, one at a time.

use super::{initramfs::Programs, kernels::Kernel};
use crate::cleanup;
use anyhow::{Context, Result, bail, ensure};
use std::{
    cell::RefCell,
    collections::BTreeMap,
    fs,
    io::{BufRead, BufReader, Write},
    path::{Path, PathBuf},
    process::{Child, ChildStdin, Command, Stdio},
    sync::mpsc::{Receiver, RecvTimeoutError, channel},
    thread,
    time::{Duration, Instant},
};

/// How long a machine may take to boot, and a command to end.
const PATIENCE: Duration = Duration::from_secs(120);
/// Bytes of the disk.
const DISK: u64 = 1 << 30;
/// Bytes of persistent memory, where there is some.
const MEMORY: u64 = 128 << 20;

/// Everything that machines are made of.
pub struct Lab {
    folder: PathBuf,
    archives: BTreeMap<String, PathBuf>,
}

impl Lab {
    /// A first file system for each kernel, with these programs.
    pub fn new(folder: PathBuf, kernels: &[Kernel], programs: &[PathBuf]) -> Result<Self> {
        let programs = Programs::collect(&folder, programs)?;
        let mut archives = BTreeMap::new();
        for kernel in kernels {
            let path = folder.join(format!("initramfs-{}", kernel.release));
            fs::write(&path, programs.archive(kernel)?)?;
            archives.insert(kernel.release.clone(), path);
        }
        Ok(Self { folder, archives })
    }

    fn disk(&self) -> PathBuf {
        self.folder.join("disk")
    }

    /// Where things for machines can be put.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// An empty disk in the place of the one there was.
    pub fn new_disk(&self) -> Result<()> {
        fs::File::create(self.disk())?.set_len(DISK)?;
        let status = Command::new("mkfs.ext4")
            .arg("-q")
            .arg("-F")
            .arg(self.disk())
            .status();
        ensure!(
            status.context("cannot start mkfs.ext4")?.success(),
            "mkfs.ext4 failed"
        );
        Ok(())
    }

    /// Boots a kernel on a processor, by QEMU's name for it. A machine that dies before it is up,
    /// which the imitation of processors is to blame for, is switched on once more.
    pub fn boot(&self, kernel: &Kernel, processor: &str) -> Result<Machine> {
        let disk = format!("file={}", self.disk().display());
        match self.switch_on(kernel, processor, &disk) {
            Err(error) => {
                println!("lab:   the machine did not come up, once more: {error:#}");
                self.switch_on(kernel, processor, &disk)
            }
            up => up,
        }
    }

    /// The same once, with a disk that is served at a socket.
    pub fn boot_from(&self, kernel: &Kernel, processor: &str, socket: &Path) -> Result<Machine> {
        let of = "file.driver=nbd,file.server.type=unix,file.server.path=";
        let disk = format!("{of}{},discard=unmap", socket.display());
        self.switch_on(kernel, processor, &disk)
    }

    /// What machines with persistent memory find in it from now on: nothing.
    pub fn new_memory(&self) -> Result<()> {
        Ok(fs::File::create(self.memory())?.set_len(MEMORY)?)
    }

    fn memory(&self) -> PathBuf {
        self.folder.join("memory")
    }

    /// The same as [`Lab::boot`] once, with persistent memory in a slot, which the host keeps in a file.
    pub fn boot_with_memory(&self, kernel: &Kernel, processor: &str) -> Result<Machine> {
        let path = self.memory();
        if !path.exists() {
            self.new_memory()?;
        }
        let of = format!("id=kept,share=on,size={MEMORY},mem-path={}", path.display());
        let disk = format!("file={}", self.disk().display());
        self.switch_on_with(kernel, processor, &disk, |qemu| {
            qemu.args(["-machine", "pc,nvdimm=on", "-m", "512,slots=2,maxmem=2G"])
                .arg("-object")
                .arg(format!("memory-backend-file,{of}"))
                .args(["-device", "nvdimm,id=slot,memdev=kept"]);
        })
    }

    fn switch_on(&self, kernel: &Kernel, processor: &str, disk: &str) -> Result<Machine> {
        self.switch_on_with(kernel, processor, disk, |_| ())
    }

    fn switch_on_with(
        &self,
        kernel: &Kernel,
        processor: &str,
        disk: &str,
        more: impl FnOnce(&mut Command),
    ) -> Result<Machine> {
        let archive = self
            .archives
            .get(&kernel.release)
            .context("no such kernel")?;
        let log = self.folder.join("console");
        let mut qemu = Command::new("qemu-system-x86_64");
        qemu.args(["-accel", "tcg,thread=multi", "-smp", "2", "-m", "512"])
            .args([
                "-cpu",
                processor,
                "-no-reboot",
                "-nodefaults",
                "-nic",
                "none",
            ])
            .args(["-display", "none", "-monitor", "none"])
            .arg("-kernel")
            .arg(&kernel.image)
            .arg("-initrd")
            .arg(archive)
            .args(["-append", "console=ttyS0 quiet panic=-1"])
            .arg("-drive")
            .arg(format!("{disk},if=virtio,format=raw"))
            .arg("-serial")
            .arg(format!("file:{}", log.display()))
            .args(["-serial", "stdio"]);
        more(&mut qemu);
        let mut child = qemu
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::inherit())
            .spawn()
            .context("cannot start qemu-system-x86_64")?;
        let input = child.stdin.take().context("QEMU has no input")?;
        let output = child.stdout.take().context("QEMU has no output")?;
        let (sender, lines) = channel();
        thread::spawn(move || {
            for line in BufReader::new(output).split(b'\n') {
                let Ok(line) = line else { break };
                let line = String::from_utf8_lossy(&line)
                    .trim_end_matches('\r')
                    .to_owned();
                if sender.send(line).is_err() {
                    break;
                }
            }
        });
        let machine = Machine {
            child,
            input: RefCell::new(input),
            lines,
            log,
        };
        machine.until("lab ready").context("booting")?;
        Ok(machine)
    }
}

/// A machine that runs; dropping it cuts its power.
pub struct Machine {
    child: Child,
    input: RefCell<ChildStdin>,
    lines: Receiver<String>,
    log: PathBuf,
}

impl Machine {
    /// Lines up to the one that begins with `end`, which is the last of them.
    fn until(&self, end: &str) -> Result<Vec<String>> {
        let deadline = Instant::now() + PATIENCE;
        let mut lines = Vec::new();
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            match self.lines.recv_timeout(left) {
                Ok(line) => {
                    let last = line.starts_with(end);
                    lines.push(line);
                    if last {
                        return Ok(lines);
                    }
                }
                Err(e) => {
                    let why = match e {
                        RecvTimeoutError::Timeout => "it does not answer",
                        RecvTimeoutError::Disconnected => "it is off",
                    };
                    let last = &lines[lines.len().saturating_sub(20)..];
                    bail!(
                        "{why}; it said: {last:?}; its kernel said: {}",
                        self.console()
                    )
                }
            }
        }
    }

    /// The last words of the kernel.
    fn console(&self) -> String {
        let text = fs::read(&self.log).unwrap_or_default();
        let text = String::from_utf8_lossy(&text).into_owned();
        let from = text.len().saturating_sub(2000);
        let from = (from..).find(|&at| text.is_char_boundary(at)).unwrap_or(0);
        text[from..].to_owned()
    }

    /// Does one command line; returns its exit status and what it said.
    pub fn ask(&self, command: &str) -> Result<(i32, String)> {
        ensure!(!command.contains('\n'), "more than one line: {command}");
        writeln!(self.input.borrow_mut(), "{command}")
            .with_context(|| format!("asking for {command:?}"))?;
        let mut lines = self
            .until("lab done ")
            .with_context(|| format!("asking for {command:?}"))?;
        let end = lines.pop().unwrap_or_default();
        let status = end.trim_start_matches("lab done ").parse();
        let said: String = lines
            .iter()
            .flat_map(|line| [line.as_str(), "\n"])
            .collect();
        Ok((
            status.with_context(|| format!("a strange answer: {end}"))?,
            said,
        ))
    }

    /// Does one command line that must succeed; returns what it said.
    pub fn must(&self, command: &str) -> Result<String> {
        let (status, said) = self.ask(command)?;
        ensure!(status == 0, "{command:?} ended with {status}: {said}");
        Ok(said)
    }

    /// Asks again and again until there is an answer.
    pub fn wait_for<T>(
        &self,
        what: &str,
        patience: Duration,
        mut ask: impl FnMut() -> Result<Option<T>>,
    ) -> Result<T> {
        let deadline = Instant::now() + patience;
        loop {
            if let Some(answer) = ask()? {
                return Ok(answer);
            }
            if Instant::now() > deadline {
                let said = self.must("cat /tmp/said")?;
                bail!(
                    "waited {} s for {what}; Outlive said: {said}",
                    patience.as_secs()
                );
            }
            thread::sleep(Duration::from_millis(500));
        }
    }

    /// Cuts the power: nothing is written back, nobody is told.
    pub fn cut(mut self) -> Result<()> {
        self.off()
    }

    fn off(&mut self) -> Result<()> {
        if self.child.try_wait()?.is_none() {
            cleanup::kill(self.child.id())?;
            self.child.wait()?;
        }
        Ok(())
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        // Whoever drops it early is on the way to an error already.
        let _ = self.off();
    }
}
