//! What passes through: streams, terminals, signals, the exit status; before and after a restore.

use crate::support::{Kept, Place, alone, end, make_fifo, may_run, signal, until};
use rustix::process::Signal;
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use std::fs::{self, File, OpenOptions};
use std::io::{BufReader, Read, Write};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};

fn pid_of(place: &Place, name: &str) -> u32 {
    u32::try_from(place.status(name)["pid"].as_u64().unwrap()).unwrap()
}

/// Starts the binary with pipes as its standard streams.
fn piped(place: &Place, words: &[&str]) -> Kept {
    let mut command = place.command(words);
    command
        .process_group(0)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(place.new_errors());
    let mut keeper = command.spawn().unwrap();
    let output = keeper.stdout.take().map(BufReader::new);
    Kept { keeper, output }
}

#[test]
fn pipes_and_the_exit_status_pass_through_before_and_after() {
    if !may_run("pipes_and_the_exit_status_pass_through_before_and_after") {
        return;
    }
    let (_alone, place) = (alone(), Place::new());
    let script = "n=0; trap 'echo usr1 $n' USR1; while read x; do n=$((n+1)); echo $n $x; done; \
                  exit 5";
    let run = ["run", "--name", "a", "--", "sh", "-c", script];
    let mut kept = piped(&place, &run);
    let mut input = kept.keeper.stdin.take().unwrap();
    input.write_all(b"one\n").unwrap();
    assert_eq!(kept.line(), "1 one");
    place.epoch_after("a", place.newest("a"));
    let pid = pid_of(&place, "a");
    signal(pid, Signal::KILL);
    assert_eq!(kept.code(), 137);
    let mut kept = piped(&place, &["restore", "a"]);
    let mut input = kept.keeper.stdin.take().unwrap();
    input.write_all(b"two\n").unwrap();
    let said = || place.said();
    assert_eq!(kept.line(), "2 two", "{:?}", said());
    signal(kept.pid(), Signal::USR1);
    input.write_all(b"three\n").unwrap();
    let (one, other) = (kept.line(), kept.line());
    let heard = one.starts_with("usr1") || other.starts_with("usr1");
    assert!(heard, "{one}, {other}");
    drop(input);
    assert_eq!(kept.code(), 5);
}

#[test]
fn files_as_streams_go_on_where_they_were() {
    if !may_run("files_as_streams_go_on_where_they_were") {
        return;
    }
    let (_alone, place) = (alone(), Place::new());
    let lines: String = (1..=300).map(|n| format!("line {n}\n")).collect();
    fs::write(place.path("input"), &lines).unwrap();
    make_fifo(&place.path("fifo"));
    // The shell reads ahead and seeks back to where the line ended.
    let script = "while read a b; do echo $b; read -t 0.002 x <> fifo; done; exit 7";
    let mut command = place.command(&[
        "run", "--name", "a", "--every", "20ms", "--", "bash", "-c", script,
    ]);
    let output = place.path("output");
    command
        .process_group(0)
        .stdin(File::open(place.path("input")).unwrap())
        .stdout(File::create(&output).unwrap())
        .stderr(place.new_errors());
    let keeper = command.spawn().unwrap();
    let mut kept = Kept {
        keeper,
        output: None,
    };
    place.epoch_after("a", 1);
    let pid = pid_of(&place, "a");
    signal(pid, Signal::KILL);
    assert_eq!(kept.code(), 137);
    let mut kept = place.start(&["restore", "a"]);
    assert_eq!(kept.code(), 7);
    let text = fs::read_to_string(&output).unwrap();
    let expected: String = (1..=300).map(|n| format!("{n}\n")).collect();
    assert!(text == expected, "each line once");
}

/// A terminal, and what runs in it as the leader of its session.
struct Terminal {
    master: File,
    child: Child,
    seen: String,
}

impl Terminal {
    fn start(place: &Place, words: &[&str]) -> Self {
        let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
        let master = openpt(flags).unwrap();
        grantpt(&master).unwrap();
        unlockpt(&master).unwrap();
        let name = ptsname(&master, Vec::new()).unwrap();
        let slave = || {
            let mut options = OpenOptions::new();
            std::os::unix::fs::OpenOptionsExt::custom_flags(&mut options, 0o400);
            let open = options.read(true).write(true);
            Stdio::from(open.open(name.to_str().unwrap()).unwrap())
        };
        let mut command = Command::new("setsid");
        command
            .args(["--ctty", "--wait", env!("CARGO_BIN_EXE_outlive")])
            .args(words)
            .env("OUTLIVE_STORE", place.store())
            .current_dir(place.dir.path())
            .stdin(slave())
            .stdout(slave())
            .stderr(slave());
        let child = command.spawn().unwrap();
        rustix::io::ioctl_fionbio(&master, true).unwrap();
        Self {
            master: File::from(master),
            child,
            seen: String::new(),
        }
    }

    /// Waits until the terminal showed this, and forgets what it showed up to there.
    fn shows(&mut self, words: &str) {
        until(words, || {
            let mut bytes = [0; 4096];
            if let Ok(n) = self.master.read(&mut bytes) {
                self.seen.push_str(&String::from_utf8_lossy(&bytes[..n]));
            }
            if let Some(at) = self.seen.find(words) {
                self.seen.drain(..at + words.len());
                return true;
            }
            let ended = self.child.try_wait().unwrap();
            assert!(ended.is_none(), "{words:?} was not shown: {:?}", self.seen);
            false
        });
    }

    fn types(&mut self, text: &str) {
        self.master.write_all(text.as_bytes()).unwrap();
    }

    fn code(&mut self) -> i32 {
        let mut bytes = [0; 4096];
        let mut code = None;
        until("the session ends", || {
            let _ = self.master.read(&mut bytes);
            code = self.child.try_wait().unwrap();
            code.is_some()
        });
        code.unwrap().code().unwrap_or(-1)
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn ctrl_c_reaches_the_program_once() {
    if !may_run("ctrl_c_reaches_the_program_once") {
        return;
    }
    let (_alone, place) = (alone(), Place::new());
    let script = "trap 'n=$((n+1)); echo caught $n' INT; echo ready; \
                  while :; do read x && echo got $x; done";
    let words = ["run", "--name", "a", "--", "sh", "-c", script];
    let mut terminal = Terminal::start(&place, &words);
    terminal.shows("ready");
    terminal.types("\x03");
    terminal.shows("caught 1");
    terminal.types("hello\n");
    terminal.shows("got hello");
    terminal.types("\x03");
    terminal.shows("caught 2");
    place.epoch_after("a", place.newest("a"));
    let pid = pid_of(&place, "a");
    place.call(&["stop", "a"]).succeeds();
    assert_eq!(terminal.code(), 0);
    let mut other = Terminal::start(&place, &["restore", "a"]);
    other.shows("runs again");
    other.types("there\n");
    other.shows("got there");
    other.types("\x03");
    other.shows("caught 3");
    signal(pid, Signal::TERM);
    assert_eq!(other.code(), 143);
    let mut plain = Terminal::start(&place, &["run", "--", "sleep", "1000"]);
    place.epoch_after("sleep", 0);
    plain.types("\x03");
    assert_eq!(plain.code(), 130);
}

#[test]
fn a_shell_goes_on_in_another_terminal() {
    if !may_run("a_shell_goes_on_in_another_terminal") {
        return;
    }
    let (_alone, place) = (alone(), Place::new());
    // With job control, the shell is a group of its own and owns the terminal.
    let words = [
        "run",
        "--name",
        "a",
        "--",
        "bash",
        "--norc",
        "--noediting",
        "-i",
    ];
    let mut terminal = Terminal::start(&place, &words);
    terminal.types("name=world; echo hello $name\n");
    terminal.shows("hello world");
    place.epoch_after("a", place.newest("a"));
    place.call(&["stop", "a"]).succeeds();
    terminal.code();
    let mut other = Terminal::start(&place, &["restore", "a"]);
    other.shows("runs again");
    other.types("echo again $name\n");
    other.shows("again world");
    other.types("exit 9\n");
    assert_eq!(other.code(), 9);
}

#[test]
fn a_program_restored_in_the_background_writes_to_its_log() {
    if !may_run("a_program_restored_in_the_background_writes_to_its_log") {
        return;
    }
    let (_alone, place) = (alone(), Place::new());
    let script = "n=0; while :; do n=$((n+1)); echo $n; read -t 0.01 x <> fifo; done";
    make_fifo(&place.path("fifo"));
    let mut kept = place.start(&["run", "--name", "a", "--", "bash", "-c", script]);
    assert_eq!(kept.line(), "1");
    place.epoch_after("a", 1);
    let pid = pid_of(&place, "a");
    place.call(&["stop", "a"]).succeeds();
    kept.code();
    place.call(&["restore", "a", "--detach"]).succeeds();
    let log = || fs::read_to_string(place.path("store/a/log")).unwrap_or_default();
    until("three lines", || log().lines().count() > 3);
    let numbers: Vec<u64> = log().lines().filter_map(|line| line.parse().ok()).collect();
    assert!(
        numbers.windows(2).all(|two| two[1] == two[0] + 1),
        "{numbers:?}"
    );
    assert!(numbers[0] > 1);
    place.call(&["stop", "a"]).succeeds();
    end(pid);
}

#[test]
fn a_terminal_is_left_as_it_was_found() {
    use rustix::termios::{LocalModes, tcgetattr};
    if !may_run("a_terminal_is_left_as_it_was_found") {
        return;
    }
    let (_alone, place) = (alone(), Place::new());
    let script = "stty -icanon -echo; echo raw; while :; do read x; done";
    let words = ["run", "--name", "a", "--", "sh", "-c", script];
    let mut terminal = Terminal::start(&place, &words);
    let cooked = LocalModes::ICANON | LocalModes::ECHO;
    let modes = |terminal: &Terminal| tcgetattr(&terminal.master).unwrap().local_modes & cooked;
    terminal.shows("raw");
    assert!(modes(&terminal).is_empty());
    place.epoch_after("a", place.newest("a"));
    place.call(&["stop", "a"]).succeeds();
    let ended = terminal.code();
    assert_eq!((ended, modes(&terminal)), (0, cooked));
    // In another terminal the program finds its modes again, and leaves those that were there.
    let mut other = Terminal::start(&place, &["restore", "a"]);
    other.shows("runs again");
    assert!(modes(&other).is_empty());
    place.epoch_after("a", place.newest("a"));
    place.call(&["stop", "a"]).succeeds();
    let ended = other.code();
    assert_eq!((ended, modes(&other)), (0, cooked));
}
