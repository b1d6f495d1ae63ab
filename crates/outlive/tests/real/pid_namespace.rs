//! Programs restored into a PID namespace of their own, where their numbers are free: what they
//! see, what passes through, and that they can be captured again.

use crate::support::{
    Done, Kept, Place, alone, comm, end, finished, installed, is_free, lives, may_run, signal,
    until,
};
use rustix::process::Signal;
use std::path::Path;
use std::process::Command;

const INIT: &str = "outlive-init";

/// A process with a thread, and a child of it, check their numbers in every round by all ways to
/// ask for them, and make a directory for the round, named by their PID namespace. No file is
/// open on the way, so that two of them can run side by side.
const NUMBERS: &str = r#"
import os, sys, threading, time
parent = os.getpid()
child = os.fork()
me = os.getpid()
who = "parent" if child else "child"
seen = []
def thread():
    mine = os.readlink("/proc/thread-self")
    seen.append(mine)
    while os.readlink("/proc/thread-self") == mine:
        time.sleep(0.01)
    os._exit(20)
threading.Thread(target=thread, daemon=True).start()
while not seen:
    time.sleep(0.001)
assert seen[0].startswith("%d/task/" % me) and not seen[0].endswith("/%d" % me)
for n in range(100000):
    assert os.getpid() == me
    assert os.readlink("/proc/self") == str(me)
    assert os.path.exists("/proc/" + seen[0])
    if child:
        os.kill(child, 0)
        assert os.path.exists("/proc/%d/task/%d" % (child, child))
    else:
        assert os.getppid() == parent
    here = os.readlink("/proc/self/ns/pid").strip("pid:[]")
    # It may be saved between these lines, and then be twice at the same place.
    os.makedirs("%s-%s-%d" % (here, who, n), exist_ok=True)
    if child and os.path.exists("end-" + here):
        os.kill(child, 9)
        assert os.waitpid(child, 0) == (child, 9)
        sys.exit(7)
    time.sleep(0.01)
"#;

/// What names the PID namespace of a process.
fn namespace(pid: u32) -> String {
    let link = std::fs::read_link(format!("/proc/{pid}/ns/pid")).unwrap();
    let text = link.to_str().unwrap();
    text.trim_matches(|c: char| !c.is_ascii_digit()).to_owned()
}

/// The number that a process sees itself.
fn inside(pid: u32) -> u32 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find_map(|l| l.strip_prefix("NSpid:"));
    let last = line.unwrap().split_whitespace().next_back();
    last.unwrap().parse().unwrap()
}

fn children(pid: u32) -> Vec<u32> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"));
    let text = text.unwrap_or_default();
    text.split_whitespace()
        .map(|w| w.parse().unwrap())
        .collect()
}

/// PID 1 of the namespace of a restored program, whose parent this is.
fn init_below(pid: u32) -> u32 {
    let mut children = children(pid).into_iter();
    children.find(|child| comm(*child) == INIT).unwrap()
}

fn number(value: &serde_json::Value) -> u32 {
    u32::try_from(value.as_u64().unwrap()).unwrap()
}

/// How many rounds were made in a namespace.
fn rounds(place: &Place, namespace: &str, who: &str) -> usize {
    let prefix = format!("{namespace}-{who}-");
    let names = place.names(".").into_iter();
    names.filter(|name| name.starts_with(&prefix)).count()
}

fn goes_on(place: &Place, namespace: &str) {
    for who in ["parent", "child"] {
        let before = rounds(place, namespace, who);
        until("it goes on", || rounds(place, namespace, who) > before + 3);
    }
}

fn mounts() -> String {
    std::fs::read_to_string("/proc/self/mountinfo").unwrap()
}

fn checkpoint(place: &Place, pid: u32, image: &str, more: &[&str]) -> Done {
    let pid = pid.to_string();
    let words = ["checkpoint", "--pid", &pid, "--image", image, "--json"];
    place.call(&[&words[..], more].concat())
}

#[test]
fn a_program_runs_beside_its_original_with_the_same_numbers() {
    if !may_run("a_program_runs_beside_its_original_with_the_same_numbers") {
        return;
    }
    let (_alone, place) = (alone(), Place::new());
    std::fs::write(place.path("numbers.py"), NUMBERS).unwrap();
    let script = place.text("numbers.py");
    let mut original = place.program(&installed("python3"), &["-I", "-S", &script]);
    let pid = original.pid();
    let here = namespace(std::process::id());
    goes_on(&place, &here);
    let before = mounts();
    checkpoint(&place, pid, "image0", &["--leave-running"]).succeeds();
    place
        .call(&["restore", "--image", "image0", "--detach"])
        .fails(3, &[&pid.to_string(), "taken", "--new-pid-ns"]);
    // A copy of the original, then a copy of that copy, and so on, one beside the other.
    let mut copies = Vec::new();
    for round in 0..3 {
        let (image, next) = (format!("image{round}"), format!("image{}", round + 1));
        let restore = ["restore", "--image", &image, "--new-pid-ns"];
        let copy = place.start(&restore);
        until("it runs", || !place.said().is_empty());
        let said = place.said();
        let root = *children(copy.pid())
            .iter()
            .find(|c| comm(**c) != INIT)
            .unwrap();
        assert!(
            said.contains(&format!("pid {root} ({pid} in its PID namespace)")),
            "{said}"
        );
        assert_eq!(inside(root), pid);
        let there = namespace(root);
        assert_ne!(there, here);
        goes_on(&place, &there);
        goes_on(&place, &here);
        let taken = checkpoint(&place, root, &next, &["--leave-running"]);
        taken.succeeds();
        assert_eq!(number(&taken.json()["pid"]), root);
        assert_eq!(number(&taken.json()["ns_pid"]), pid);
        assert_eq!(number(&taken.json()["processes"]), 2);
        assert_eq!(number(&taken.json()["threads"]), 4);
        copies.push((copy, root, there));
    }
    assert_eq!(mounts(), before, "nothing of it is seen outside");
    for (copy, root, there) in &mut copies {
        let init = init_below(copy.pid());
        goes_on(&place, there);
        std::fs::write(place.path(&format!("end-{there}")), "").unwrap();
        assert_eq!(copy.code(), 7);
        until("its init has ended", || !lives(init));
        assert!(is_free(*root));
        // The last image may be of the moment right before this is looked for.
        std::fs::remove_file(place.path(&format!("end-{there}"))).unwrap();
    }
    std::fs::write(place.path(&format!("end-{here}")), "").unwrap();
    assert_eq!(original.code(), 7);
    // The numbers are free now, and the image of a program in a namespace does without one.
    for name in place.names(".").iter().filter(|name| name.contains(&here)) {
        let path = place.path(name);
        std::fs::remove_dir(&path)
            .or_else(|_| std::fs::remove_file(&path))
            .unwrap();
    }
    let words = ["restore", "--image", "image3", "--detach", "--json"];
    let done = where_numbers_are_free(&place, &words);
    assert_eq!(number(&done["pid"]), pid);
    goes_on(&place, &here);
    end(pid);
}

/// Restores a program whose numbers were those of a namespace: outside, somebody else may have
/// them for a moment.
fn where_numbers_are_free(place: &Place, words: &[&str]) -> serde_json::Value {
    let mut last = None;
    until("the numbers are free", || {
        let done = place.call(words);
        let taken = done.code == 3 && done.err.contains("taken");
        last = Some(done);
        !taken
    });
    let done = last.unwrap();
    done.succeeds();
    done.json()
}

/// Grandchildren whose parents have ended: the first counts for its grandparent, which asks for
/// nobody; the others end at once, or stay until it ends, with the low numbers of a new namespace.
const STRAYS: &str = r#"
import os, sys, time
r, w = os.pipe()
end, never = os.pipe()
def wait():
    os.close(never)
    os.read(end, 1)
def stray(work):
    if os.fork() == 0:
        if os.fork() == 0:
            work()
            os._exit(3)
        os._exit(0)
    os.wait()
def count():
    n = 0
    while not os.path.exists("end"):
        os.write(w, b"x")
        n += 1
        time.sleep(0.005)
    os.write(w, b"=%d" % n)
me = os.getpid()
stray(count)
os.close(w)
heard = 0
while os.read(r, 1) == b"x":
    heard += 1
    if heard % 20 == 0:
        stray(wait if heard % 60 == 0 else lambda: None)
    assert os.getpid() == me
sys.exit(9 if int(os.read(r, 9)) == heard else 1)
"#;

/// Everything below a process, but for inits, which end by themselves.
fn members(root: u32) -> Vec<u32> {
    let mut all = vec![root];
    let mut at = 0;
    while at < all.len() {
        all.extend(children(all[at]));
        at += 1;
    }
    all.retain(|pid| *pid != root && comm(*pid) != INIT);
    all
}

#[test]
fn strays_stay_with_their_program_through_a_chain_of_namespaces() {
    if !may_run("strays_stay_with_their_program_through_a_chain_of_namespaces") {
        return;
    }
    let (_alone, place) = (alone(), Place::new());
    std::fs::write(place.path("strays.py"), STRAYS).unwrap();
    let (python, script) = (installed("python3"), place.text("strays.py"));
    let run = [
        "run", "--name", "a", "--every", "50ms", "--", &python, "-I", "-S", &script,
    ];
    let mut kept = place.start(&run);
    place.epoch_after("a", 0);
    let pid = number(&place.status("a")["pid"]);
    for _ in 0..3 {
        for _ in 0..3 {
            place.epoch_after("a", place.newest("a"));
        }
        let status = place.status("a");
        assert_eq!(number(&status["ns_pid"]), pid);
        assert_eq!(number(&status["failures"]), 0, "{status}");
        let init = children(kept.pid()).into_iter().find(|c| comm(*c) == INIT);
        let (root, all) = (number(&status["pid"]), members(kept.pid()));
        assert_eq!(init.is_some(), inside(root) != root);
        if let Some(init) = init {
            until("strays that have ended are reaped", || {
                children(init).into_iter().all(lives)
            });
        }
        kept.kill();
        for member in all {
            end(member);
        }
        if let Some(init) = init {
            until("its init has ended", || !lives(init));
        }
        drop(kept);
        kept = place.start(&["restore", "a", "--new-pid-ns"]);
    }
    std::fs::write(place.path("end"), "").unwrap();
    assert_eq!(kept.code(), 9, "{}", place.said());
}

/// Renames a file from its working directory through a directory that it holds, which the kernel
/// refuses across mounts; reads a file of `/proc` that it holds; and signals a child that is gone
/// through a descriptor, which the kernel refuses across PID namespaces in another way.
const HELD: &str = r#"
import os, signal, time
child = os.fork()
if child == 0:
    os._exit(0)
dead = os.pidfd_open(child)
os.waitpid(child, 0)
there = os.open("there", os.O_RDONLY | os.O_DIRECTORY)
memory = os.open("/proc/meminfo", os.O_RDONLY)
n = 0
while not os.path.exists("end"):
    n += 1
    os.symlink(str(n), "here")
    os.rename("here", str(n), dst_dir_fd=there)
    assert os.pread(memory, 8, 0) == b"MemTotal"
    assert os.stat("/proc/meminfo").st_dev == os.fstat(memory).st_dev
    try:
        signal.pidfd_send_signal(dead, 0)
        raise SystemExit(1)
    except ProcessLookupError:
        pass
    time.sleep(0.005)
raise SystemExit(12)
"#;

#[test]
fn descriptors_are_those_of_the_namespace() {
    if !may_run("descriptors_are_those_of_the_namespace") {
        return;
    }
    let (_alone, place) = (alone(), Place::new());
    std::fs::write(place.path("held.py"), HELD).unwrap();
    std::fs::create_dir(place.path("there")).unwrap();
    let (python, script) = (installed("python3"), place.text("held.py"));
    let run = [
        "run", "--name", "a", "--every", "50ms", "--", &python, "-I", "-S", &script,
    ];
    let mut kept = place.start(&run);
    for _ in 0..3 {
        place.epoch_after("a", place.newest("a"));
        place.epoch_after("a", place.newest("a"));
        place.call(&["stop", "a"]).succeeds();
        assert_eq!(kept.code(), 0);
        drop(kept);
        kept = place.start(&["restore", "a", "--new-pid-ns"]);
    }
    std::fs::write(place.path("end"), "").unwrap();
    assert_eq!(kept.code(), 12, "{}", place.said());
}

#[test]
fn signals_and_statuses_pass_through() {
    if !may_run("signals_and_statuses_pass_through") {
        return;
    }
    let (_alone, place) = (alone(), Place::new());
    let script = "trap 'kill $!; exit 9' TERM; sleep 1000 & wait";
    let mut sh = place.program("sh", &["-c", script]);
    until("it waits", || {
        children(sh.pid())
            .iter()
            .any(|child| comm(*child) == "sleep")
    });
    checkpoint(&place, sh.pid(), "image", &[]).succeeds();
    sh.keeper.wait().unwrap();
    let restore = || {
        let kept = place.start(&["restore", "--image", "image", "--new-pid-ns"]);
        until("it runs", || !place.said().is_empty());
        let init = init_below(kept.pid());
        let all = children(kept.pid());
        let root = all.into_iter().find(|c| *c != init).unwrap();
        (kept, root, init)
    };
    let (mut kept, _, init) = restore();
    signal(kept.pid(), Signal::TERM);
    assert_eq!(kept.code(), 9);
    until("its init has ended", || !lives(init));
    let (mut kept, root, init) = restore();
    let sleep = children(root)[0];
    signal(root, Signal::KILL);
    assert_eq!(kept.code(), 137);
    // What the program leaves lives on, as it would without a namespace.
    assert_eq!(children(init), [sleep]);
    assert!(lives(sleep) && lives(init));
    signal(sleep, Signal::KILL);
    until("its init has ended", || !lives(init));
    // The end of the namespace is the end of the program.
    let (mut kept, root, init) = restore();
    end(init);
    assert_eq!(kept.code(), 137);
    assert!(is_free(root));
}

#[test]
fn a_program_in_a_namespace_survives_its_keeper() {
    if !may_run("a_program_in_a_namespace_survives_its_keeper") {
        return;
    }
    let (_alone, place) = (alone(), Place::new());
    let mut kept = place.start(&["run", "--name", "a", "--", "sh", "-c", "sleep 1000; exit 3"]);
    place.epoch_after("a", 0);
    let pid = number(&place.status("a")["pid"]);
    place.call(&["stop", "a"]).succeeds();
    assert_eq!(kept.code(), 0);
    // Whatever it left to be reaped has its number no longer.
    drop(kept);
    let mut keeper = place.start(&["restore", "a", "--new-pid-ns"]);
    place.epoch_after("a", place.newest("a"));
    let root = number(&place.status("a")["pid"]);
    let init = init_below(keeper.pid());
    keeper.kill();
    let status = place.status("a");
    assert_eq!(status["state"], "not kept");
    assert_eq!(
        (number(&status["pid"]), number(&status["ns_pid"])),
        (root, pid)
    );
    assert!(lives(root) && lives(init));
    let again = root.to_string();
    let mut keeper = place.start(&["attach", "--pid", &again, "--name", "a"]);
    place.epoch_after("a", place.newest("a"));
    let taken = place.call(&["checkpoint", "a", "--json"]);
    taken.succeeds();
    let taken = taken.json();
    assert_eq!(
        (number(&taken["pid"]), number(&taken["ns_pid"])),
        (root, pid)
    );
    place.call(&["stop", "a"]).succeeds();
    assert_eq!(keeper.code(), 0);
    end(root);
    until("its init has ended", || !lives(init));
    let done = where_numbers_are_free(&place, &["restore", "a", "--detach", "--json"]);
    assert_eq!(number(&done["pid"]), pid);
    assert_eq!(number(&done["ns_pid"]), pid);
    place.call(&["stop", "a"]).succeeds();
}

/// A namespace that somebody else made, with the first process of it, and one below that.
fn unshared(place: &Place, script: &str) -> (Kept, u32) {
    let words = ["--pid", "--fork", "--mount-proc", "sh", "-c", script];
    let outer = place.program(&installed("unshare"), &words);
    until("it runs", || {
        let first = children(outer.pid());
        first.first().is_some_and(|sh| !children(*sh).is_empty())
    });
    let first = children(outer.pid())[0];
    (outer, first)
}

#[test]
fn namespaces_of_others_are_told_apart() {
    if !may_run("namespaces_of_others_are_told_apart") {
        return;
    }
    let (_alone, place) = (alone(), Place::new());
    let (outer, first) = unshared(&place, "sleep 1000; exit 0");
    let sleep = children(first)[0];
    let inner = inside(sleep);
    until("it sleeps", || comm(sleep) == "sleep");
    checkpoint(&place, outer.pid(), "image", &[])
        .fails(3, &["another pid namespace", &first.to_string()]);
    checkpoint(&place, first, "image", &[]).fails(3, &["PID 1", &first.to_string()]);
    assert!(lives(first) && lives(sleep));
    checkpoint(&place, sleep, "image", &["--leave-running"]).succeeds();
    let words = [
        "restore",
        "--image",
        "image",
        "--new-pid-ns",
        "--detach",
        "--json",
    ];
    let done = place.call(&words);
    done.succeeds();
    assert_eq!(number(&done.json()["ns_pid"]), inner);
    let root = number(&done.json()["pid"]);
    assert_eq!((comm(root), inside(root)), ("sleep".into(), inner));
    end(root);
    end(sleep);
    until("all have ended", || !lives(first));
    let (_outer, first) = unshared(&place, "mount -t tmpfs none /mnt; sleep 1000; exit 0");
    until("it sleeps", || {
        children(first).iter().any(|c| comm(*c) == "sleep")
    });
    let sleep = children(first)[0];
    checkpoint(&place, sleep, "image2", &[]).fails(3, &["mount namespace", "/mnt"]);
    assert!(lives(sleep));
    end(sleep);
    until("all have ended", || !lives(first));
}

#[test]
fn a_namespace_needs_the_privilege_for_it() {
    if !may_run("a_namespace_needs_the_privilege_for_it") {
        return;
    }
    let (_alone, place) = (alone(), Place::new());
    let pid = place.image_of_sleep("image");
    let mut command = Command::new(installed("setpriv"));
    command
        .args(["--bounding-set", "-sys_admin", "--inh-caps", "-sys_admin"])
        .arg(env!("CARGO_BIN_EXE_outlive"))
        .args(["restore", "--image", "image", "--new-pid-ns", "--detach"])
        .current_dir(place.dir.path());
    finished(command.output().unwrap()).fails(5, &["CAP_SYS_ADMIN"]);
    assert!(is_free(pid));
    assert!(Path::new(&place.path("image")).exists());
}
