//! The binary as a script calls it: exit codes, JSON on errors, what passes through `run`. Whether
//! epochs of real programs can be restored is tested elsewhere; nothing here depends on it.
#![allow(clippy::unwrap_used, reason = "all of this is test code")]

use serde_json::Value;
use std::io::{BufRead, BufReader};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};

fn outlive(store: &Path, words: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_outlive"));
    command
        .args(words)
        .env("OUTLIVE_STORE", store)
        .stdin(Stdio::null());
    command
}

fn call(store: &Path, words: &[&str]) -> (i32, String, String) {
    let Output {
        status,
        stdout,
        stderr,
    } = outlive(store, words).output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (status.code().unwrap(), text(stdout), text(stderr))
}

/// The JSON that a failed command prints, with its exit code checked against the real one.
fn failure(store: &Path, words: &[&str]) -> (i32, String) {
    let (code, stdout, _) = call(store, words);
    let value: Value = serde_json::from_str(&stdout).unwrap_or_else(|e| panic!("{stdout:?}: {e}"));
    assert_eq!(value["exit"], code, "{stdout}");
    (code, value["error"].as_str().unwrap().to_owned())
}

/// A keeper with a program that ends when it is told to; killed and reaped when it is dropped.
struct Kept {
    keeper: Child,
    output: BufReader<std::process::ChildStdout>,
}

impl Kept {
    fn start(store: &Path, words: &[&str]) -> Self {
        let mut command = outlive(store, words);
        command
            .process_group(0)
            .stdout(Stdio::piped())
            .stderr(Stdio::null());
        let mut keeper = command.spawn().unwrap();
        let output = BufReader::new(keeper.stdout.take().unwrap());
        Self { keeper, output }
    }

    fn line(&mut self) -> String {
        let mut line = String::new();
        self.output.read_line(&mut line).unwrap();
        line.trim_end().to_owned()
    }

    fn signal(&self, signal: rustix::process::Signal) {
        let pid = rustix::process::Pid::from_child(&self.keeper);
        rustix::process::kill_process(pid, signal).unwrap();
    }

    fn code(mut self) -> i32 {
        self.keeper.wait().unwrap().code().unwrap()
    }
}

impl Drop for Kept {
    fn drop(&mut self) {
        if let Ok(None) = self.keeper.try_wait() {
            let group = rustix::process::Pid::from_child(&self.keeper);
            let _ = rustix::process::kill_process_group(group, rustix::process::Signal::KILL);
            let _ = self.keeper.wait();
        }
    }
}

#[test]
fn errors_have_the_codes_of_the_contract_and_are_json_when_asked() {
    let dir = tempfile::tempdir().unwrap();
    let store = dir.path();
    assert_eq!(failure(store, &["fly", "--json"]).0, 2);
    let promised = ["restore", "--image", "x/", "--max-stop", "2ms", "--json"];
    let (code, error) = failure(store, &promised);
    assert_eq!(code, 2, "nobody would keep it: {error}");
    assert_eq!(
        failure(store, &["run", "--strict", "--json", "--", "true"]).0,
        2
    );
    assert_eq!(failure(store, &["history", "../etc", "--json"]).0, 2);
    let (code, error) = failure(store, &["history", "nobody", "--json"]);
    assert_eq!(code, 1);
    assert!(
        error.contains("nobody") && error.contains(store.to_str().unwrap()),
        "{error}"
    );
    for words in [
        ["stop", "nobody"],
        ["forget", "nobody"],
        ["restore", "nobody"],
        ["verify", "nobody"],
    ] {
        assert_eq!(call(store, &words).0, 1, "{words:?}");
    }
    let taken = dir.path().join("taken");
    std::fs::create_dir(&taken).unwrap();
    std::fs::write(taken.join("file"), "precious").unwrap();
    let (taken, me) = (taken.to_str().unwrap(), std::process::id().to_string());
    let (code, error) = failure(
        store,
        &["checkpoint", "--pid", &me, "--image", taken, "--json"],
    );
    assert_eq!(code, 3, "{error}");
    let image = dir.path().join("none");
    let image = image.to_str().unwrap();
    assert_eq!(
        failure(store, &["restore", "--image", image, "--json"]).0,
        1
    );
    assert_eq!(
        failure(store, &["restore", "--image", image, "--detach", "--json"]).0,
        1
    );
    assert_eq!(failure(store, &["verify", image, "--json"]).0, 1);
    let (code, stdout, _) = call(store, &["--help"]);
    assert_eq!(code, 0);
    assert!(stdout.contains("Exit codes"));
}

#[test]
fn the_exit_status_of_the_program_passes_through() {
    let dir = tempfile::tempdir().unwrap();
    let run = |script: &str| {
        call(
            dir.path(),
            &["run", "--every", "1h", "--", "sh", "-c", script],
        )
    };
    let (code, stdout, stderr) = run("echo out; exit 7");
    assert_eq!((code, stdout.as_str(), stderr.as_str()), (7, "out\n", ""));
    let words = ["run", "--", "grep", "SigBlk", "/proc/self/status"];
    let (_, blocked, _) = call(dir.path(), &words);
    let own = std::fs::read_to_string("/proc/self/status").unwrap();
    assert!(
        own.contains(&blocked),
        "the program has our signal mask: {blocked}"
    );
    assert_eq!(run("kill -9 $$").0, 137);
    assert_eq!(call(dir.path(), &["run", "--", "/no/such/program"]).0, 127);
    assert_eq!(call(dir.path(), &["run", "--", "/etc/passwd"]).0, 126);
    let (code, stdout, _) = call(dir.path(), &["ps", "--json"]);
    let list: Value = serde_json::from_str(&stdout).unwrap();
    let list: Vec<_> = list
        .as_array()
        .unwrap()
        .iter()
        .map(|e| (e["name"].clone(), e["state"].clone()))
        .collect();
    assert_eq!(code, 0);
    let entry = |name: &str, state: &str| (Value::from(name), Value::from(state));
    let sh = [entry("sh", "exit status 7"), entry("sh-2", "signal 9")];
    assert_eq!(list[0], entry("grep", "exit status 0"));
    assert_eq!(list[1..], sh);
}

#[test]
fn signals_sent_to_the_keeper_reach_the_program_and_only_one_keeper_keeps_it() {
    let dir = tempfile::tempdir().unwrap();
    let script = "trap 'echo got usr1' USR1; trap 'exit 9' TERM; echo ready; \
                  while :; do sleep 0.05; done";
    let words = [
        "run", "--name", "a", "--every", "1h", "--", "sh", "-c", script,
    ];
    let mut kept = Kept::start(dir.path(), &words);
    assert_eq!(kept.line(), "ready");
    kept.signal(rustix::process::Signal::USR1);
    assert_eq!(kept.line(), "got usr1");
    let (code, stdout, _) = call(dir.path(), &["ps", "--json"]);
    assert_eq!(code, 0);
    let list: Value = serde_json::from_str(&stdout).unwrap();
    assert_eq!(list[0]["state"], "running");
    assert_eq!(list[0]["keeper_pid"], kept.keeper.id());
    let (code, error) = failure(dir.path(), &["run", "--name", "a", "--json", "--", "true"]);
    assert_eq!(code, 3);
    assert!(
        error.contains(&format!("pid {}", kept.keeper.id())),
        "{error}"
    );
    assert_eq!(call(dir.path(), &["forget", "a"]).0, 3);
    kept.signal(rustix::process::Signal::TERM);
    assert_eq!(kept.code(), 9);
    assert_eq!(call(dir.path(), &["forget", "a"]).0, 0);
    assert!(!dir.path().join("a").exists());
}

#[test]
fn a_program_without_a_keeper_is_neither_stopped_nor_forgotten() {
    let dir = tempfile::tempdir().unwrap();
    let script = "echo ready; sleep 1000";
    let words = [
        "run", "--name", "a", "--every", "1h", "--", "sh", "-c", script,
    ];
    let mut kept = Kept::start(dir.path(), &words);
    assert_eq!(kept.line(), "ready");
    // The program may be quicker than the keeper writes down who it is.
    while !call(dir.path(), &["ps", "--json"]).1.contains("running") {
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    kept.signal(rustix::process::Signal::KILL);
    kept.keeper.wait().unwrap();
    let (_, stdout, _) = call(dir.path(), &["ps", "--json"]);
    let list: Value = serde_json::from_str(&stdout).unwrap();
    assert_eq!(list[0]["state"], "not kept");
    assert!(list[0]["untracked_since"].is_string(), "{stdout}");
    for words in [["stop", "a"], ["forget", "a"], ["restore", "a"]] {
        let (code, _, stderr) = call(dir.path(), &words);
        assert_eq!(code, 3, "{words:?}: {stderr}");
        assert!(stderr.contains("`outlive attach a`"), "{words:?}: {stderr}");
    }
    let group = rustix::process::Pid::from_child(&kept.keeper);
    rustix::process::kill_process_group(group, rustix::process::Signal::KILL).unwrap();
}

#[test]
fn a_heap_is_looked_at_and_repaired_without_its_program() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("numbers.heap");
    let memory = resilient_heap::FileMemory::open(&path).unwrap();
    let heap = resilient_heap::Options::default()
        .zone_pages(16)
        .log_pages(1)
        .open::<u64>(memory, |_| Ok(7))
        .unwrap();
    heap.close().unwrap();
    let file = path.to_str().unwrap();
    let (code, out, err) = call(dir.path(), &["heap", "inspect", file]);
    assert_eq!((code, err.as_str()), (0, ""));
    assert!(
        out.contains("closed") && out.contains("root u64 8"),
        "{out}"
    );
    let mut bytes = std::fs::read(&path).unwrap();
    let data = 8 * 4096;
    bytes[data + 20] ^= 1;
    std::fs::write(&path, &bytes).unwrap();
    let (code, _, err) = call(dir.path(), &["heap", "verify", file]);
    assert!(code == 0 && err.contains("(data)"), "{code} {err}");
    assert_eq!(std::fs::read(&path).unwrap(), bytes, "the file was changed");
    let (code, _, err) = call(dir.path(), &["heap", "repair", file]);
    assert!(code == 0 && err.contains("repaired"), "{code} {err}");
    let (code, _, err) = call(dir.path(), &["heap", "verify", file]);
    assert_eq!((code, err.as_str()), (0, ""));
    // Two lines of one column: nothing brings them back.
    bytes[data..data + 64].fill(9);
    bytes[data + 4096..data + 4160].fill(9);
    std::fs::write(&path, &bytes).unwrap();
    let (code, out, _) = call(dir.path(), &["heap", "repair", file, "--json"]);
    let found: Value = serde_json::from_str(&out).unwrap();
    assert_eq!(code, 4, "{found}");
    assert_eq!(found["lost"][0]["at"], data);
    std::fs::write(&path, [7; 8192]).unwrap();
    let (code, _, err) = call(dir.path(), &["heap", "verify", file]);
    assert!(code == 1 && err.contains("no resilient heap"), "{err}");
}

/// A pool through the command line: made, given out, paged out and in again with what a file of it holds, an
/// orphan found, shown, refused, and verified.
#[test]
fn a_pool_serves_owners_and_says_what_it_refuses() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    let (pool, file) = (at("pool"), at("vm1.paged"));
    let json = |words: &[&str]| -> Value {
        let all: Vec<&str> = [&["--json", "pool"], words].concat();
        let (code, stdout, stderr) = call(dir.path(), &all);
        assert_eq!(code, 0, "{words:?}: {stdout}{stderr}");
        serde_json::from_str(&stdout).unwrap()
    };
    let refused = |words: &[&str]| failure(dir.path(), &[&["--json", "pool"], words].concat());
    assert!(json(&["devices", "--e820-type", "90"])["devices"].is_array());
    assert_eq!(refused(&["create", &pool]).0, 2);
    assert_eq!(refused(&["create", &pool, "--size", "64KiB"]).0, 3);
    assert!(!Path::new(&pool).exists());
    let made = json(&["create", &pool, "--size", "32MiB"]);
    assert!(made["bytes"].as_u64().unwrap() > 24 << 20);
    assert_eq!(refused(&["create", &pool]).0, 3);
    // Somebody's file is nobody's pool, unless that is said.
    let precious = vec![b'p'; 16 << 20];
    std::fs::write(at("other"), &precious).unwrap();
    let (code, error) = refused(&["create", &at("other")]);
    assert!(code == 3 && error.contains("--force"), "{error}");
    assert!(std::fs::read(at("other")).unwrap() == precious);
    json(&["create", &at("other"), "--force"]);
    let ask = [
        "--owner", "vm1", "--size", "4MiB", "--quota", "8MiB", "--file", &file,
    ];
    let extent = json(&[&["allocate", &pool], &ask[..]].concat());
    assert_eq!(extent["pieces"].as_array().unwrap().len(), 1);
    let offset = extent["pieces"][0]["offset"].as_u64().unwrap();
    let (code, error) = refused(&["allocate", &pool, "--owner", "vm1", "--size", "5MiB"]);
    assert!(code == 3 && error.contains("quota"), "{error}");
    assert_eq!(
        refused(&["allocate", &pool, "--owner", "vm2", "--size", "5000"]).0,
        2
    );

    // What a machine would do with its pages.
    let bytes = std::fs::File::options()
        .read(true)
        .write(true)
        .open(&pool)
        .unwrap();
    std::os::unix::fs::FileExt::write_all_at(&bytes, b"precious", offset + 12288).unwrap();
    let (code, error) = refused(&[
        "allocate", &pool, "--owner", "vm2", "--size", "4KiB", "--file", &file,
    ]);
    assert!(code == 3 && error.contains("vm1"), "{error}");
    std::fs::write(&file, "a letter").unwrap();
    let (code, error) = refused(&["page-out", &pool, "vm1"]);
    assert!(code == 3 && error.contains("vm1.paged"), "{error}");
    assert_eq!(std::fs::read(&file).unwrap(), b"a letter");
    std::fs::remove_file(&file).unwrap();
    let mut holder = Command::new("sleep").arg("600").spawn().unwrap();
    let pid = holder.id().to_string();
    json(&["start", &pool, "vm1", "--pid", &pid]);
    let (code, error) = refused(&["page-out", &pool, "vm1"]);
    assert!(code == 3 && error.contains(&pid), "{error}");
    assert_eq!(refused(&["release", &pool, "--owner", "vm1"]).0, 3);
    assert_eq!(
        json(&["page-out", &pool, "--orphans"])["paged_out"],
        serde_json::json!([])
    );
    holder.kill().unwrap();
    holder.wait().unwrap();
    assert_eq!(
        json(&["page-out", &pool, "--orphans"])["paged_out"],
        serde_json::json!(["vm1"])
    );
    let status = json(&["status", &pool]);
    assert_eq!(
        (&status["free"], &status["not_zeroed"]),
        (&made["bytes"], &serde_json::json!(0))
    );
    assert_eq!(status["owners"][0]["state"], "paged-out");
    let mut found = [1; 8];
    std::os::unix::fs::FileExt::read_exact_at(&bytes, &mut found, offset + 12288).unwrap();
    assert_eq!(found, [0; 8], "a page that was given back is not zeroed");
    assert_eq!(json(&["start", &pool, "vm1"])["paged_in"], true);
    let pieces = &json(&["status", &pool])["owners"][0]["extents"][0]["pieces"];
    let offset = pieces[0]["offset"].as_u64().unwrap();
    std::os::unix::fs::FileExt::read_exact_at(&bytes, &mut found, offset + 12288).unwrap();
    assert_eq!(&found, b"precious");

    let (code, map, _) = call(dir.path(), &["pool", "map", &pool]);
    assert!(
        code == 0 && map.contains("\na vm1\n") && map.contains('#'),
        "{map}"
    );
    json(&["map", &pool, "--svg", &at("map.svg")]);
    assert!(
        std::fs::read_to_string(at("map.svg"))
            .unwrap()
            .contains("<title>vm1: bytes")
    );
    assert_eq!(json(&["release", &pool, "--owner", "vm1"])["extents"], 1);
    let verified = json(&["verify", &pool, "--free"]);
    assert_eq!(verified["free_read"], made["bytes"]);
    std::os::unix::fs::FileExt::write_all_at(&bytes, b"left", offset).unwrap();
    let (code, stdout, _) = call(dir.path(), &["pool", "verify", &pool, "--free"]);
    assert_eq!(code, 4, "{stdout}");
    assert_eq!(refused(&["status", &file]).0, 1);
}
