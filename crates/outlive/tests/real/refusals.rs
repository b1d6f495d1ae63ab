//! What is not done is refused before harm: the message names the thing, and the program that was
//! to be captured runs on.

use crate::support::{
    Kept, Place, alone, comm, end, finished, installed, is_free, lives, make_fifo, may_run, signal,
    test_program, until,
};
use rustix::process::Signal;
use std::fs;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

/// The user without rights.
const NOBODY: u32 = 65534;

#[test]
fn programs_that_are_not_as_they_were_are_not_restored() {
    if !may_run("programs_that_are_not_as_they_were_are_not_restored") {
        return;
    }
    let (_alone, place) = (alone(), Place::new());
    let binary = place.text("sleeper");
    fs::copy(installed("sleep"), &binary).unwrap();
    let mut sleep = place.program(&binary, &["1000"]);
    let pid = sleep.pid();
    until("it sleeps", || comm(pid) == "sleeper");
    let words = ["checkpoint", "--pid", &pid.to_string(), "--image", "image"];
    place.call(&words).succeeds();
    sleep.keeper.wait().unwrap();
    let restore = || place.call(&["restore", "--image", "image", "--detach"]);
    let away = place.text("away");
    fs::rename(&binary, &away).unwrap();
    restore().fails(3, &["sleeper"]);
    assert!(is_free(pid));
    fs::copy(installed("cat"), &binary).unwrap();
    restore().fails(3, &["sleeper"]);
    assert!(is_free(pid));
    fs::remove_file(&binary).unwrap();
    fs::rename(&away, &binary).unwrap();
    restore().succeeds();
    assert_eq!(comm(pid), "sleeper");
    end(pid);
}

#[test]
fn a_number_that_is_taken_is_refused_with_who_has_it() {
    if !may_run("a_number_that_is_taken_is_refused_with_who_has_it") {
        return;
    }
    let (_alone, place) = (alone(), Place::new());
    let sleep = place.program("sleep", &["1000"]);
    let pid = sleep.pid();
    until("it sleeps", || comm(pid) == "sleep");
    let number = pid.to_string();
    let words = [
        "checkpoint",
        "--pid",
        &number,
        "--image",
        "image",
        "--leave-running",
    ];
    place.call(&words).succeeds();
    let done = place.call(&["restore", "--image", "image", "--detach"]);
    done.fails(3, &[&number]);
    assert!(lives(pid), "whoever has it runs on");
    drop(sleep);
    place
        .call(&["restore", "--image", "image", "--detach"])
        .succeeds();
    end(pid);
}

fn redis(place: &Place, port: u16) -> Kept {
    let port = port.to_string();
    let words = ["--port", &port, "--save", "", "--bind", "127.0.0.1"];
    place.program(&installed("redis-server"), &words)
}

/// Asks until it answers.
fn answers(port: u16) {
    until("redis answers", || {
        let Ok(mut stream) = TcpStream::connect(("127.0.0.1", port)) else {
            return false;
        };
        stream
            .set_read_timeout(Some(Duration::from_secs(5)))
            .unwrap();
        let mut text = [0; 7];
        stream.write_all(b"PING\r\n").is_ok()
            && stream.read_exact(&mut text).is_ok()
            && text == *b"+PONG\r\n"
    });
}

#[test]
fn a_port_that_is_taken_is_refused_with_its_number() {
    if !may_run("a_port_that_is_taken_is_refused_with_its_number") {
        return;
    }
    let (_alone, place) = (alone(), Place::new());
    let free = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = free.local_addr().unwrap().port();
    drop(free);
    let mut server = redis(&place, port);
    let pid = server.pid();
    answers(port);
    let words = ["checkpoint", "--pid", &pid.to_string(), "--image", "image"];
    place.call(&words).succeeds();
    server.keeper.wait().unwrap();
    let taken = TcpListener::bind(("127.0.0.1", port)).unwrap();
    let restore = ["restore", "--image", "image", "--detach"];
    let me = std::process::id().to_string();
    place.call(&restore).fails(3, &[&port.to_string(), &me]);
    assert!(is_free(pid));
    drop(taken);
    place.call(&restore).succeeds();
    answers(port);
    end(pid);
}

/// The binary where everybody may start it, as the user without rights.
fn as_nobody(place: &Place, words: &[&str]) -> crate::support::Done {
    let binary = place.path("outlive");
    if !binary.exists() {
        fs::copy(env!("CARGO_BIN_EXE_outlive"), &binary).unwrap();
        let everybody = fs::Permissions::from_mode(0o755);
        fs::set_permissions(place.dir.path(), everybody).unwrap();
    }
    let mut command = Command::new(&binary);
    command
        .args(words)
        .env("OUTLIVE_STORE", place.store())
        .env_remove("XDG_STATE_HOME")
        .current_dir("/")
        .stdin(Stdio::null())
        .uid(NOBODY)
        .gid(NOBODY);
    finished(command.output().unwrap())
}

#[test]
fn without_the_rights_it_is_not_permitted_and_nothing_is_touched() {
    if !may_run("without_the_rights_it_is_not_permitted_and_nothing_is_touched") {
        return;
    }
    let (_alone, place) = (alone(), Place::new());
    let kept = place.start(&["run", "--name", "a", "--", "sleep", "1000"]);
    place.epoch_after("a", 0);
    let status = place.status("a");
    let pid = status["pid"].as_u64().unwrap();
    let image = "/tmp/outlive-not-permitted";
    let number = pid.to_string();
    let words = ["checkpoint", "--pid", &number, "--image", image];
    as_nobody(&place, &words).fails(5, &[&number]);
    assert!(!Path::new(image).exists());
    let store = place.store();
    fs::set_permissions(&store, fs::Permissions::from_mode(0o755)).unwrap();
    for words in [
        &["history", "a"][..],
        &["restore", "a", "--detach"],
        &["stop", "a"],
        &["forget", "a"],
        &["verify", "a"],
        &["checkpoint", "a"],
        &["run", "--name", "b", "--", "true"],
    ] {
        let done = as_nobody(&place, words);
        assert_eq!(done.code, 5, "{words:?}: {done:?}");
        assert!(done.err.contains("store/"), "{words:?}: {done:?}");
    }
    let listed = as_nobody(&place, &["ps"]);
    listed.succeeds();
    assert!(listed.out.contains("permission denied"), "{listed:?}");
    fs::set_permissions(&store, fs::Permissions::from_mode(0o700)).unwrap();
    as_nobody(&place, &["ps"]).fails(5, &["store"]);
    let after = place.epoch_after("a", place.newest("a"));
    assert!(after > 1, "it is kept as before");
    assert_eq!(place.status("a")["failures"], 0);
    drop(kept);
}

#[test]
fn a_name_in_use_is_refused_and_what_can_be_done_is_said() {
    if !may_run("a_name_in_use_is_refused_and_what_can_be_done_is_said") {
        return;
    }
    let (_alone, place) = (alone(), Place::new());
    let run = |place: &Place| place.call(&["run", "--name", "a", "--", "true"]);
    let script = "trap 'exit 4' USR1; while :; do read -t 0.01 x <> fifo; done";
    make_fifo(&place.path("fifo"));
    let mut kept = place.start(&["run", "--name", "a", "--", "bash", "-c", script]);
    let keeper = kept.pid().to_string();
    place.epoch_after("a", 0);
    run(&place).fails(3, &["a is kept by", &keeper, "outlive stop a"]);
    signal(kept.pid(), Signal::USR1);
    assert_eq!(kept.code(), 4);
    let remedies = ["outlive restore a", "outlive forget a", "--name"];
    let done = run(&place);
    done.fails(3, &remedies);
    done.fails(3, &["exit status 4"]);
    place.call(&["forget", "a"]).succeeds();
    run(&place).succeeds();
}

#[test]
fn state_that_cannot_be_saved_is_named_and_the_program_runs_on() {
    if !may_run("state_that_cannot_be_saved_is_named_and_the_program_runs_on") {
        return;
    }
    let (_alone, place) = (alone(), Place::new());
    let refused = test_program("kinds");
    for (kind, words) in [
        ("system-v-memory-of-others", &["System V", "outside"][..]),
        ("asynchronous-io", &["address", "asynchronous"]),
        ("socket-netlink", &["fd ", "netlink"]),
        ("io-uring", &["fd ", "io_uring"]),
        (
            "file-signals-stranger",
            &["fd ", "which is not of this program"],
        ),
    ] {
        let mut program = place.program(&refused, &[kind]);
        let pid = program.pid();
        let out = || fs::read_to_string(place.path("out")).unwrap();
        until("it is ready", || out().contains("ready"));
        let number = pid.to_string();
        let done = place.call(&["checkpoint", "--pid", &number, "--image", "image"]);
        done.fails(3, &["refused", &format!("pid {pid} (kinds)")]);
        done.fails(3, words);
        assert!(!place.path("image").exists(), "{kind}");
        signal(pid, Signal::USR1);
        assert_eq!(program.keeper.wait().unwrap().code(), Some(0), "{kind}");
        assert!(out().contains("intact"), "{kind}");
    }
}

#[test]
fn under_run_what_cannot_be_saved_is_said_once_and_the_program_goes_on() {
    if !may_run("under_run_what_cannot_be_saved_is_said_once_and_the_program_goes_on") {
        return;
    }
    let (_alone, place) = (alone(), Place::new());
    let refused = test_program("kinds");
    let program = refused.as_str();
    let words = [
        "run",
        "--name",
        "a",
        "--every",
        "20ms",
        "--",
        program,
        "socket-netlink",
    ];
    let mut command = place.command(&words);
    let errors = place.new_errors();
    command
        .process_group(0)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(errors);
    let mut keeper = command.spawn().unwrap();
    let output = keeper.stdout.take().map(std::io::BufReader::new);
    let mut kept = Kept { keeper, output };
    assert_eq!(kept.line(), "ready");
    until("three failures", || {
        place.status("a")["failures"].as_u64() >= Some(3)
    });
    let last = place.status("a")["last_failure"]
        .as_str()
        .unwrap()
        .to_owned();
    assert!(last.contains("netlink"), "{last}");
    let said = place.said();
    assert_eq!(said.matches("netlink").count(), 1, "{said}");
    signal(kept.keeper.id(), Signal::USR1);
    assert_eq!(kept.line(), "intact");
    assert_eq!(kept.code(), 0);
}
