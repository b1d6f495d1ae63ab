//! One process seen from outside through `/proc`.

use crate::lodger::Lodger;
use crate::resources::{descriptors, landlock};
use crate::{ProcessError, Refusal, procfs};
use rustix::fd::{AsFd, OwnedFd};
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use std::io;
use std::os::unix::ffi::OsStrExt;

/// A process that is looked at. The pidfd makes sure that it stays the same one.
#[derive(Debug)]
pub struct Target {
    /// Its process ID, as this process sees it.
    pub pid: u32,
    /// Its process ID as it sees itself: another one in a PID namespace below ours. It is what is
    /// saved.
    pub id: u32,
    /// Its name.
    pub program: String,
    /// A descriptor for it.
    pub pidfd: OwnedFd,
    /// Whether it is our own child.
    pub own_child: bool,
    /// A thread of ours in it.
    pub lodger: Lodger,
    /// Processes of ours beside it.
    pub beside: landlock::Beside,
}

impl Target {
    /// Looks a process up.
    pub fn open(pid: u32) -> Result<Self, ProcessError> {
        let gone = |_| ProcessError::Gone {
            pid,
            what: "there is no such process".into(),
        };
        let raw = i32::try_from(pid).ok().and_then(Pid::from_raw);
        let raw = raw.ok_or_else(|| ProcessError::Gone {
            pid,
            what: "not a process ID".into(),
        })?;
        let pidfd = pidfd_open(raw, PidfdFlags::empty()).map_err(gone)?;
        let status = Status::read(pid, pid).map_err(|e| gone_or(pid, "reading its status", e))?;
        if status.tgid != pid {
            let what = format!("is a thread of process {}; give that", status.tgid);
            return Err(ProcessError::Gone { pid, what });
        }
        if matches!(status.state, b'Z' | b'X') {
            if !crate::family::is_ending(pid) {
                return Err(ProcessError::Refused(vec![Refusal {
                    pid,
                    program: status.name,
                    place: String::new(),
                    what: "its leading thread has ended while others run".into(),
                    remedy: "this cannot be saved yet".into(),
                }]));
            }
            return Err(ProcessError::Gone {
                pid,
                what: "has ended".into(),
            });
        }
        let own_child = status.ppid == std::process::id();
        Ok(Self {
            pid,
            id: status.inner.pid,
            program: status.name,
            pidfd,
            own_child,
            lodger: Lodger::default(),
            beside: landlock::Beside::default(),
        })
    }

    /// Whether it has ended (a zombie has).
    #[must_use]
    pub fn has_ended(&self) -> bool {
        use rustix::event::{PollFd, PollFlags, Timespec, poll};
        let mut watched = [PollFd::new(&self.pidfd, PollFlags::IN)];
        let now = Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        poll(&mut watched, Some(&now)).is_ok_and(|ready| ready > 0)
    }

    /// The process as it is handed to whoever looks at descriptors.
    #[must_use]
    pub fn view(&self) -> descriptors::Target<'_> {
        descriptors::Target {
            pid: self.pid,
            program: &self.program,
            pidfd: self.pidfd.as_fd(),
            ignore: &[],
        }
    }

    /// A refusal that names this process.
    pub fn refusal(
        &self,
        place: impl Into<String>,
        what: impl Into<String>,
        remedy: &str,
    ) -> Refusal {
        Refusal {
            pid: self.pid,
            program: self.program.clone(),
            place: place.into(),
            what: what.into(),
            remedy: remedy.into(),
        }
    }

    /// The kernel refused an operation on this process.
    pub fn kernel(&self, what: impl Into<String>, source: impl Into<io::Error>) -> ProcessError {
        let (what, source) = (what.into(), source.into());
        gone_or(self.pid, &what, source)
    }

    /// Its threads, as they are listed now, but for one of ours.
    pub fn threads(&self) -> Result<Vec<u32>, ProcessError> {
        let path = format!("/proc/{}/task", self.pid);
        let listed = std::fs::read_dir(path).and_then(|dir| {
            dir.map(|entry| Ok(entry?.file_name().to_string_lossy().parse().unwrap_or(0)))
                .collect()
        });
        let mut tids: Vec<u32> = listed.map_err(|e| self.kernel("listing its threads", e))?;
        tids.retain(|&t| t != 0);
        self.lodger.leave_out(self.pid, &mut tids);
        tids.sort_unstable();
        Ok(tids)
    }

    /// The contents of a file below `/proc/PID`.
    pub fn proc_file(&self, name: &str) -> Result<Vec<u8>, ProcessError> {
        let path = format!("/proc/{}/{name}", self.pid);
        procfs::read(&path).map_err(|e| self.kernel(format!("reading {path}"), e))
    }

    /// The same of a file that is one record, or has short ones.
    pub fn proc_record(&self, name: &str) -> Result<Vec<u8>, ProcessError> {
        let path = format!("/proc/{}/{name}", self.pid);
        procfs::read_short(&path).map_err(|e| self.kernel(format!("reading {path}"), e))
    }

    /// Where a link below `/proc/PID` points.
    pub fn proc_link(&self, name: &str) -> Result<Vec<u8>, ProcessError> {
        let path = format!("/proc/{}/{name}", self.pid);
        let link =
            std::fs::read_link(&path).map_err(|e| self.kernel(format!("reading {path}"), e))?;
        Ok(link.as_os_str().as_bytes().to_vec())
    }
}

/// Turns "no such process" and "permission denied" into what they mean for the user.
pub fn gone_or(pid: u32, what: &str, source: io::Error) -> ProcessError {
    match source.raw_os_error() {
        Some(libc::ESRCH) => ProcessError::Gone {
            pid,
            what: "ended meanwhile".into(),
        },
        Some(libc::ENOENT) if !std::path::Path::new(&format!("/proc/{pid}")).exists() => {
            ProcessError::Gone {
                pid,
                what: "ended meanwhile".into(),
            }
        }
        Some(libc::EPERM | libc::EACCES) => ProcessError::NotPermitted {
            pid,
            what: what.to_owned(),
            remedy:
                "run outlive as root, or as the owner of the process where it is not traced by \
                     somebody else"
                    .into(),
        },
        _ => ProcessError::Kernel {
            pid,
            what: what.to_owned(),
            source,
        },
    }
}

/// IDs of a thread in the PID namespace in which it lives.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct InnerIds {
    /// The thread.
    pub tid: u32,
    /// The process.
    pub pid: u32,
    /// Process group, 0 where it is one of an outer namespace.
    pub pgid: u32,
    /// Session, 0 where it is one of an outer namespace.
    pub sid: u32,
}

/// What `/proc/PID/task/TID/status` tells (`proc_pid_status(5)`).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Status {
    /// Name of the thread, unescaped.
    pub name: String,
    /// State letter.
    pub state: u8,
    /// Process.
    pub tgid: u32,
    /// Parent.
    pub ppid: u32,
    /// Tracer, 0 where there is none.
    pub tracer: u32,
    /// The IDs that it sees itself.
    pub inner: InnerIds,
    /// Real, effective, saved and file system user.
    pub uid: [u32; 4],
    /// Real, effective, saved and file system group.
    pub gid: [u32; 4],
    /// Supplementary groups.
    pub groups: Vec<u32>,
    /// Capabilities: inheritable, permitted, effective, bounding, ambient.
    pub caps: [u64; 5],
    /// Signals pending for the thread.
    pub pending: u64,
    /// Signals pending for the process.
    pub shared_pending: u64,
    /// Signals that are blocked at this moment.
    pub blocked: u64,
    /// Signals that are ignored.
    pub ignored: u64,
    /// Signals that have a handler.
    pub caught: u64,
    /// File mode creation mask.
    pub umask: u32,
    /// `PR_SET_NO_NEW_PRIVS`.
    pub no_new_privs: bool,
    /// Seccomp mode: 0 none, 1 strict, 2 filter.
    pub seccomp: u32,
    /// Voluntary context switches so far.
    pub voluntary_switches: u64,
}

impl Status {
    /// Whether a thread has ended: it is gone, or waits for somebody to ask for its exit status.
    #[must_use]
    pub fn tells_end(pid: u32, tid: u32) -> bool {
        Self::read(pid, tid).map_or(true, |s| matches!(s.state, b'Z' | b'X'))
    }

    /// Signals that wait, and will be delivered to the thread as soon as it runs. Those that do
    /// nothing wait only because the thread is traced: else they would not even be queued.
    #[must_use]
    pub fn deliverable(&self) -> u64 {
        /// Signals that do nothing unless they have a handler (signal(7)).
        const IDLE: [i32; 4] = [libc::SIGCHLD, libc::SIGCONT, libc::SIGURG, libc::SIGWINCH];
        let idle = IDLE
            .iter()
            .fold(0, |set, signal| set | 1u64 << (signal - 1));
        let nothing = self.ignored | idle & !self.caught;
        (self.pending | self.shared_pending) & !self.blocked & !nothing
    }

    /// The status of PID 1 of the PID namespace in which a process lives, as its `/proc` shows it.
    pub fn of_init(pid: u32) -> io::Result<Self> {
        let text = procfs::read(&format!("/proc/{pid}/root/proc/1/status"))?;
        Ok(Self::parse(&text))
    }

    /// Reads the status of a thread.
    pub fn read(pid: u32, tid: u32) -> io::Result<Self> {
        Self::of(
            pid,
            tid,
            &procfs::read_short(&format!("/proc/{pid}/task/{tid}/status"))?,
        )
    }

    /// The status of a thread, of which this is the text.
    pub fn of(pid: u32, tid: u32, text: &[u8]) -> io::Result<Self> {
        let mut status = Self::parse(text);
        if status.inner.tid == 0 {
            // A kernel without PID namespaces does not tell.
            let stat = Stat::read(pid)?;
            let (pgid, sid) = (stat.pgid, stat.sid);
            status.inner = InnerIds {
                tid,
                pid,
                pgid,
                sid,
            };
        }
        Ok(status)
    }

    fn parse(text: &[u8]) -> Self {
        let text = String::from_utf8_lossy(text);
        let mut s = Self::default();
        for line in text.split('\n') {
            let Some((key, value)) = line.split_once(':') else {
                continue;
            };
            // Blanks at either end may belong to the name.
            let value = value.strip_prefix('\t').unwrap_or(value);
            s.set(key, if key == "Name" { value } else { value.trim() });
        }
        s
    }

    fn set(&mut self, key: &str, value: &str) {
        let number = || {
            value
                .split_whitespace()
                .next()
                .and_then(|w| w.parse().ok())
                .unwrap_or(0)
        };
        // From the namespace of this `/proc` inwards.
        let innermost = || {
            let last = value.split_whitespace().next_back();
            last.and_then(|w| w.parse().ok()).unwrap_or(0)
        };
        let hex = || u64::from_str_radix(value.trim(), 16).unwrap_or(0);
        let four = || {
            let mut ids = value
                .split_whitespace()
                .map(|w| w.parse().unwrap_or(u32::MAX));
            std::array::from_fn(|_| ids.next().unwrap_or(u32::MAX))
        };
        match key {
            "Name" => self.name = value.replace("\\n", "\n").replace("\\\\", "\\"),
            "Umask" => self.umask = u32::from_str_radix(value.trim(), 8).unwrap_or(0o022),
            "State" => self.state = value.bytes().next().unwrap_or(b'?'),
            "Tgid" => self.tgid = number(),
            "PPid" => self.ppid = number(),
            "TracerPid" => self.tracer = number(),
            "NSpid" => self.inner.tid = innermost(),
            "NStgid" => self.inner.pid = innermost(),
            "NSpgid" => self.inner.pgid = innermost(),
            "NSsid" => self.inner.sid = innermost(),
            "Uid" => self.uid = four(),
            "Gid" => self.gid = four(),
            "Groups" => {
                self.groups = value
                    .split_whitespace()
                    .filter_map(|w| w.parse().ok())
                    .collect();
            }
            "SigPnd" => self.pending = hex(),
            "ShdPnd" => self.shared_pending = hex(),
            "SigBlk" => self.blocked = hex(),
            "SigIgn" => self.ignored = hex(),
            "SigCgt" => self.caught = hex(),
            "CapInh" => self.caps[0] = hex(),
            "CapPrm" => self.caps[1] = hex(),
            "CapEff" => self.caps[2] = hex(),
            "CapBnd" => self.caps[3] = hex(),
            "CapAmb" => self.caps[4] = hex(),
            "NoNewPrivs" => self.no_new_privs = number() != 0,
            "Seccomp" => self.seccomp = number(),
            "voluntary_ctxt_switches" => self.voluntary_switches = u64::from(number()),
            _ => {}
        }
    }
}

/// What `/proc/PID/stat` tells of the layout of memory and of job control (`proc_pid_stat(5)`).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Stat {
    /// Process group.
    pub pgid: u32,
    /// Session.
    pub sid: u32,
    /// Controlling terminal, 0 where there is none.
    pub tty: i64,
    /// The process group in the foreground of that, where there is one.
    pub foreground: Option<u32>,
    /// Kernel flags of the leader.
    pub flags: u64,
    /// `start_code`, `end_code`, `start_stack`, `start_data`, `end_data`, `start_brk`,
    /// `arg_start`, `arg_end`, `env_start`, `env_end`.
    pub layout: [u64; 10],
    /// The signal by which the parent is told of its end; 0 for none.
    pub exit_signal: u32,
    /// Exit status of a zombie, as `wait(2)` gives it.
    pub exit_status: u32,
}

impl Stat {
    /// Reads the stat line of a process.
    pub fn read(pid: u32) -> io::Result<Self> {
        let text = procfs::read_short(&format!("/proc/{pid}/stat"))?;
        Self::parse(&text)
            .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "unexpected form of stat"))
    }

    fn parse(text: &[u8]) -> Option<Self> {
        // The name may hold spaces and parentheses; the last one ends it.
        let after = text.iter().rposition(|&b| b == b')')?;
        let rest = std::str::from_utf8(&text[after + 1..]).ok()?;
        let words: Vec<&str> = rest.split_whitespace().collect();
        // words[0] is field 3 of the manual page.
        let field = |n: usize| {
            words.get(n - 3).and_then(|w| {
                w.parse::<i64>()
                    .ok()
                    .map(|v| v as u64)
                    .or_else(|| w.parse().ok())
            })
        };
        let layout = [26, 27, 28, 45, 46, 47, 48, 49, 50, 51];
        let mut values = [0u64; 10];
        for (value, n) in values.iter_mut().zip(layout) {
            *value = field(n)?;
        }
        Some(Self {
            pgid: field(5)? as u32,
            sid: field(6)? as u32,
            tty: field(7)? as i64,
            foreground: u32::try_from(field(8)? as i64)
                .ok()
                .filter(|&group| group != 0),
            flags: field(9)?,
            layout: values,
            exit_signal: field(38)? as u32,
            exit_status: field(52)? as u32,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn our_own_process_is_understood() {
        let pid = std::process::id();
        let status = Status::read(pid, pid).unwrap();
        assert_eq!(status.tgid, pid);
        assert_eq!(status.uid[0], rustix::process::getuid().as_raw());
        let stat = Stat::read(pid).unwrap();
        let inner = InnerIds {
            tid: pid,
            pid,
            pgid: stat.pgid,
            sid: stat.sid,
        };
        assert_eq!(status.inner, inner);
        assert!(stat.layout[0] > 0 && stat.layout[2] > stat.layout[0]);
        // Not asked of `getsid`: a session may be 0, that of the kernel or of an outer namespace,
        // and then there is no `Pid` for it.
        let parent = std::os::unix::process::parent_id();
        if parent != 0 {
            assert_eq!(stat.sid, Stat::read(parent).unwrap().sid);
        }
    }

    #[test]
    fn blanks_belong_to_a_name() {
        for name in [" a b ", "\ta\t", "a\r", "", " "] {
            let text = format!("Name:\t{name}\nUmask:\t0022\nTgid:\t7\n");
            let status = Status::parse(text.as_bytes());
            assert_eq!((status.name.as_str(), status.tgid), (name, 7));
        }
    }

    #[test]
    fn signals_that_do_nothing_are_not_delivered() {
        let of = |text: &str| Status::parse(text.as_bytes()).deliverable();
        let (child, user) = (1 << 16, 1 << 9);
        let both = "SigPnd:\t0000000000010000\nShdPnd:\t0000000000000200\n";
        assert_eq!(of(both), user);
        let with = |more: &str| of(&format!("{both}{more}"));
        assert_eq!(with("SigCgt:\t0000000000010000\n"), child | user);
        assert_eq!(with("SigIgn:\t0000000000000200\n"), 0);
        assert_eq!(with("SigBlk:\t0000000000000200\n"), 0);
    }

    #[test]
    fn a_name_with_parentheses_does_not_confuse() {
        let mut line = b"7 (a) b) S 1 2 3 0 -1 64".to_vec();
        for n in 10..=52 {
            line.extend_from_slice(format!(" {n}").as_bytes());
        }
        let stat = Stat::parse(&line).unwrap();
        assert_eq!(
            (stat.pgid, stat.sid, stat.flags, stat.layout[0]),
            (2, 3, 64, 26)
        );
        assert_eq!(Stat::parse(b"7 (x"), None);
    }

    #[test]
    fn the_innermost_ids_are_those_that_a_process_sees() {
        let text = b"NStgid:\t700\t7\nNSpid:\t701\t8\nNSpgid:\t600\t0\nNSsid:\t500\t5\n";
        let inner = InnerIds {
            tid: 8,
            pid: 7,
            pgid: 0,
            sid: 5,
        };
        assert_eq!(Status::parse(text).inner, inner);
        assert_eq!(Status::parse(b"Tgid:\t7\n").inner, InnerIds::default());
    }

    #[test]
    fn a_thread_is_not_a_process() {
        assert!(matches!(
            Target::open(u32::MAX),
            Err(ProcessError::Gone { .. })
        ));
    }
}
