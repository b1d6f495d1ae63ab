//! `check`: what this host offers.
//!
//! Where it can be, a feature is tried, not looked up: a sleeping child is tracked for a moment,
//! its descriptor is taken, files are opened in the store's directory.

use crate::out::{self, Column};
use outlive_keeper::KeeperError;
use outlive_keeper::epoch::Program;
use outlive_keeper::subject::Root;
use outlive_process::{TrackOptions, Tracked};
use rustix::fs::{Mode, OFlags};
use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};
use rustix::thread::CapabilitySet;
use serde_json::json;
use std::io::{IsTerminal, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// Free space below which the store is called short, bytes.
const LITTLE_SPACE: u64 = 2 << 30;

/// How a thing stands.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Verdict {
    Good,
    /// Works, with a drawback.
    Limited,
    /// Something does not work without it.
    Missing,
}

struct Finding {
    what: &'static str,
    verdict: Verdict,
    found: String,
    remedy: String,
}

/// A finding: good where `error` is none, else `bad` with the error and the remedy.
fn finding(
    what: &'static str,
    found: Result<String, String>,
    bad: Verdict,
    remedy: &str,
) -> Finding {
    let (verdict, found, remedy) = match found {
        Ok(found) => (Verdict::Good, found, String::new()),
        Err(found) => (bad, found, remedy.to_owned()),
    };
    Finding {
        what,
        verdict,
        found,
        remedy,
    }
}

/// `outlive check`
pub fn check(root: &Root, json: bool) -> Result<u8, KeeperError> {
    super::run::withhold()?;
    let mut findings = kernel();
    findings.extend(privileges());
    findings.extend(store(root));
    let missing = findings
        .iter()
        .any(|finding| finding.verdict == Verdict::Missing);
    if json {
        let list: Vec<_> = findings
            .iter()
            .map(|f| {
                let verdict = f.verdict.word();
                json!({ "what": f.what, "verdict": verdict, "found": f.found, "remedy": f.remedy })
            })
            .collect();
        out::json(&json!({ "ready": !missing, "findings": list }));
    } else {
        print(&findings);
    }
    Ok(u8::from(missing))
}

impl Verdict {
    fn word(self) -> &'static str {
        match self {
            Self::Good => "good",
            Self::Limited => "limited",
            Self::Missing => "missing",
        }
    }

    /// The word for a table, in colour on a terminal.
    fn shown(self, colour: bool) -> String {
        let code = match self {
            Self::Good => 32,
            Self::Limited => 33,
            Self::Missing => 31,
        };
        let word = self.word();
        if colour {
            format!("\x1b[{code}m{word:<7}\x1b[0m")
        } else {
            format!("{word:<7}")
        }
    }
}

fn print(findings: &[Finding]) {
    let colour = std::io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none();
    let rows: Vec<Vec<String>> = findings
        .iter()
        .map(|f| vec![f.what.to_owned(), out::tame(&f.found)])
        .collect();
    let table = out::table(&[("WHAT", Column::Left), ("FOUND", Column::Left)], &rows);
    let mut lines = table.lines();
    out::line(&format!("{:<7}  {}", "", lines.next().unwrap_or_default()));
    for (line, finding) in lines.zip(findings) {
        out::line(&format!("{}  {line}", finding.verdict.shown(colour)));
        if !finding.remedy.is_empty() {
            out::line(&format!("{:<7}    {}", "", finding.remedy));
        }
    }
}

fn kernel() -> Vec<Finding> {
    let uname = rustix::system::uname();
    let release = uname.release().to_string_lossy().into_owned();
    let too_old = "Linux 6.7 or newer tracks writes best (PAGEMAP_SCAN)";
    let exists = |path: &str, good: &str| {
        if Path::new(path).exists() {
            Ok(good.to_owned())
        } else {
            Err(format!("no {path}"))
        }
    };
    let recent = recent_enough(&release);
    let version = if recent {
        Ok(release.clone())
    } else {
        Err(release)
    };
    vec![
        finding("kernel", version, Verdict::Limited, too_old),
        tracking(),
        finding(
            "pidfd_getfd",
            descriptor_of_child(),
            Verdict::Missing,
            "the kernel or a seccomp filter refuses pidfd_getfd: leave the container's filter",
        ),
        finding(
            "restore",
            exists("/proc/sys/kernel/ns_last_pid", "clone3 set_tid, PR_SET_MM"),
            Verdict::Missing,
            "a kernel with CONFIG_CHECKPOINT_RESTORE is needed",
        ),
        finding(
            "time namespaces",
            exists("/proc/self/ns/time", "clocks continue after a reboot"),
            Verdict::Limited,
            "a kernel with CONFIG_TIME_NS is needed for clocks that continue after a reboot",
        ),
    ]
}

fn recent_enough(release: &str) -> bool {
    let mut numbers = release
        .split(|c: char| !c.is_ascii_digit())
        .map(str::parse::<u32>);
    let (Some(Ok(major)), Some(Ok(minor))) = (numbers.next(), numbers.next()) else {
        return false;
    };
    (major, minor) >= (6, 7)
}

/// A child that sleeps, ended and reaped when it is dropped.
struct Sleeper(Child);

impl Sleeper {
    fn start() -> Result<Self, String> {
        let mut command = Command::new("sleep");
        command
            .arg("60")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        command
            .spawn()
            .map(Self)
            .map_err(|error| format!("cannot start sleep: {error}"))
    }
}

impl Drop for Sleeper {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn tracking() -> Finding {
    let what = "tracking";
    let tried = Sleeper::start().and_then(|child| {
        let options = TrackOptions {
            stop_timeout: Duration::from_secs(1),
            ..TrackOptions::default()
        };
        let program = Tracked::attach(child.0.id(), options).map_err(|e| e.to_string())?;
        let full = program.full_copy_because();
        Program::detach(program).map_err(|e| e.to_string())?;
        Ok(full)
    });
    match tried {
        Ok(None) => finding(
            what,
            Ok("PAGEMAP_SCAN with write protection".into()),
            Verdict::Good,
            "",
        ),
        Ok(Some(reason)) => finding(
            what,
            Err(format!("every epoch copies everything: {reason}")),
            Verdict::Limited,
            "Linux 6.7 or newer with CONFIG_USERFAULTFD is needed to copy only what changed",
        ),
        Err(error) => finding(
            what,
            Err(error),
            Verdict::Missing,
            "tracing of other programs must be allowed: see ptrace and capabilities below",
        ),
    }
}

fn descriptor_of_child() -> Result<String, String> {
    let child = Sleeper::start()?;
    let pid = i32::try_from(child.0.id())
        .ok()
        .and_then(Pid::from_raw)
        .ok_or("no pid")?;
    let process = pidfd_open(pid, PidfdFlags::empty()).map_err(|e| format!("pidfd_open: {e}"))?;
    pidfd_getfd(&process, 0, PidfdGetfdFlags::empty())
        .map(|_| "descriptors can be taken".into())
        .map_err(|error| error.to_string())
}

fn privileges() -> Vec<Finding> {
    let held = rustix::thread::capabilities(None).map(|sets| sets.effective);
    let held = held.unwrap_or(CapabilitySet::empty());
    let has = |set: CapabilitySet| held.intersects(set);
    let named = |ok: bool, good: &str, bad: &str| {
        if ok {
            Ok(good.to_owned())
        } else {
            Err(bad.to_owned())
        }
    };
    let restore = CapabilitySet::SYS_ADMIN | CapabilitySet::CHECKPOINT_RESTORE;
    let scope = std::fs::read_to_string("/proc/sys/kernel/yama/ptrace_scope").ok();
    let scope: u32 = scope.and_then(|text| text.trim().parse().ok()).unwrap_or(0);
    let traced = scope < 2 || (scope == 2 && has(CapabilitySet::SYS_PTRACE));
    let others = has(CapabilitySet::SYS_PTRACE);
    vec![
        finding(
            "ptrace",
            named(
                traced,
                &format!("allowed (scope {scope})"),
                &format!("scope {scope}"),
            ),
            Verdict::Missing,
            "sysctl kernel.yama.ptrace_scope=1, or run as root",
        ),
        finding(
            "other users' programs",
            named(
                others,
                "CAP_SYS_PTRACE",
                "no CAP_SYS_PTRACE: only your own programs",
            ),
            Verdict::Limited,
            "run as root to attach to programs of other users",
        ),
        finding(
            "same pid at restore",
            named(
                has(restore),
                "allowed",
                "no CAP_CHECKPOINT_RESTORE or CAP_SYS_ADMIN",
            ),
            Verdict::Missing,
            "run as root, or give outlive the capability: setcap cap_checkpoint_restore+ep",
        ),
    ]
}

/// The nearest directory that exists, at or above the store.
fn nearest(path: &Path) -> PathBuf {
    let found = path.ancestors().find(|path| path.is_dir());
    found
        .filter(|path| !path.as_os_str().is_empty())
        .unwrap_or(Path::new("."))
        .to_path_buf()
}

fn store(root: &Root) -> Vec<Finding> {
    let dir = nearest(root.path());
    let shown = root.path().display().to_string();
    let space = rustix::fs::statvfs(&dir).map(|fs| fs.f_bavail.saturating_mul(fs.f_frsize));
    let space = match space {
        Ok(free) if free >= LITTLE_SPACE => Ok(format!("{} free", out::bytes(free))),
        Ok(free) => Err(format!("only {} free", out::bytes(free))),
        Err(error) => Err(error.to_string()),
    };
    let (writable, direct, flush) = files(&dir);
    vec![
        finding(
            "store",
            writable.map(|()| shown),
            Verdict::Missing,
            "choose another with --store DIR or OUTLIVE_STORE",
        ),
        finding(
            "space of the store",
            space,
            Verdict::Limited,
            "free space, or choose another with --store: a subject needs about 5 times its memory",
        ),
        finding(
            "O_DIRECT",
            direct.map(|()| "the page cache is passed by".into()),
            Verdict::Limited,
            "epochs go through the page cache and are slower; choose a store on ext4, xfs or btrfs",
        ),
        finding(
            "flush",
            flush,
            Verdict::Limited,
            "put the store on a disk: this file system keeps nothing through a power cut",
        ),
    ]
}

type Tried<T> = Result<T, String>;

/// Whether files can be made in `dir`, opened with O_DIRECT, and how long a flush takes.
fn files(dir: &Path) -> (Tried<()>, Tried<()>, Tried<String>) {
    let path = dir.join(format!(".outlive-check-{}", std::process::id()));
    let mut options = std::fs::OpenOptions::new();
    let made = options.write(true).create_new(true).mode(0o600).open(&path);
    let mut file = match made {
        Ok(file) => file,
        Err(error) => {
            let text = format!("{}: {error}", dir.display());
            return (Err(text.clone()), Err(text.clone()), Err(text));
        }
    };
    let flags = OFlags::WRONLY | OFlags::DIRECT | OFlags::CLOEXEC;
    let direct = rustix::fs::open(&path, flags, Mode::empty());
    let flush = flush(&mut file).map_err(|error| error.to_string());
    let volatile = rustix::fs::statfs(&path).is_ok_and(|fs| {
        let kind = u64::try_from(fs.f_type).unwrap_or(0);
        [0x0102_1994, 0x8584_58f6].contains(&kind)
    });
    let flush = if volatile {
        Err("tmpfs: memory only".into())
    } else {
        flush
    };
    let _ = std::fs::remove_file(&path);
    (
        Ok(()),
        direct.map(drop).map_err(|error| error.to_string()),
        flush,
    )
}

/// The median time of a small durable write.
fn flush(file: &mut std::fs::File) -> std::io::Result<String> {
    let mut times = Vec::new();
    for _ in 0..9 {
        let start = Instant::now();
        file.write_all(&[0x5a; 4096])?;
        file.sync_data()?;
        times.push(outlive_keeper::epoch::micros(start.elapsed()));
    }
    let median = outlive_keeper::stats::percentile(&times, 50).unwrap_or(0);
    Ok(format!("4 kB durable in {}", out::time_us(median)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernel_releases_are_read() {
        for good in ["6.7.0", "6.18.44-amd64", "7.2-rc1", "10.0"] {
            assert!(recent_enough(good), "{good}");
        }
        for old in ["6.6.100", "5.19", "", "x", "6"] {
            assert!(!recent_enough(old), "{old}");
        }
    }

    #[test]
    fn the_nearest_directory_is_found() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(nearest(&dir.path().join("a/b/c")), dir.path());
        assert_eq!(nearest(Path::new("no-such/dir")), Path::new("."));
    }
}
