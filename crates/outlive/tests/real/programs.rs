//! Programs of several processes: killed with their keeper in the middle of their work, restored,
//! and judged by what they compute.

use crate::support::{
    Kept, Place, alone, end, family, installed, may_run, signal, test_program, until,
};
use rustix::process::Signal;
use std::process::Command;

/// Kills the keeper and the whole program at once, and restores what is left: the newest epoch.
fn die_and_come_back(place: &Place, mut kept: Kept, epochs: u64) -> Kept {
    for _ in 0..epochs {
        place.epoch_after("a", place.newest("a"));
    }
    // Strays are children of the keeper.
    let members = family(kept.pid()).split_off(1);
    kept.kill();
    members.into_iter().for_each(end);
    drop(kept);
    place.start(&["restore", "a"])
}

#[test]
fn a_pipeline_comes_out_byte_for_byte() {
    if !may_run("a_pipeline_comes_out_byte_for_byte") {
        return;
    }
    let (_alone, place) = (alone(), Place::new());
    let script = "i=0; (while [ $i -lt 400 ]; do echo line $i; i=$((i+1)); sleep 0.005; done) \
                  | (while read a; do echo \"$a x\"; done) | gzip -c | cat > packed";
    let bash = installed("bash");
    let mut kept = place.start(&[
        "run", "--name", "a", "--every", "50ms", "--", &bash, "-c", script,
    ]);
    for epochs in [3, 2, 4] {
        kept = die_and_come_back(&place, kept, epochs);
    }
    assert_eq!(kept.code(), 0, "{}", place.said());
    let packed = place.path("packed");
    let plain = Command::new(installed("gzip"))
        .arg("-dc")
        .arg(packed)
        .output()
        .unwrap();
    let expected: String = (0..400).map(|i| format!("line {i} x\n")).collect();
    assert!(
        plain.stdout == expected.as_bytes(),
        "{}",
        String::from_utf8_lossy(&plain.stdout)
    );
}

/// A parent and its child work in turns through memory that they share, and tell each other so
/// through a pipe; another child has ended, and its exit status is asked for at the end.
const FAMILY: &str = r#"
import mmap, os, struct, sys, time
shared = mmap.mmap(-1, 1 << 20)
reader, writer = os.pipe()
child = os.fork()
if child == 0:
    rounds = 0
    while True:
        assert struct.unpack_from("Q", shared, 8192)[0] == rounds
        rounds += 1
        struct.pack_into("Q", shared, 8192, rounds)
        os.write(writer, b"x")
        time.sleep(0.005)
ended = os.fork()
if ended == 0:
    os._exit(7)
for heard in range(1, 401):
    os.read(reader, 1)
    said = struct.unpack_from("Q", shared, 8192)[0]
    assert heard <= said <= heard + 64, (heard, said)
    struct.pack_into("Q", shared, 0, heard)
assert os.WEXITSTATUS(os.waitpid(ended, 0)[1]) == 7
assert os.getppid() != child
os.kill(child, 9)
assert os.waitpid(child, 0)[0] == child
sys.exit(5)
"#;

#[test]
fn a_family_goes_on_with_its_shared_memory_and_its_dead() {
    if !may_run("a_family_goes_on_with_its_shared_memory_and_its_dead") {
        return;
    }
    let (_alone, place) = (alone(), Place::new());
    std::fs::write(place.path("family.py"), FAMILY).unwrap();
    let (python, script) = (installed("python3"), place.text("family.py"));
    let mut kept = place.start(&[
        "run", "--name", "a", "--every", "50ms", "--", &python, &script,
    ]);
    for epochs in [4, 2, 3] {
        kept = die_and_come_back(&place, kept, epochs);
    }
    assert_eq!(kept.code(), 5, "{}", place.said());
}

#[test]
fn a_program_that_becomes_another_one_goes_on() {
    if !may_run("a_program_that_becomes_another_one_goes_on") {
        return;
    }
    let (_alone, place) = (alone(), Place::new());
    let python = installed("python3");
    let count = "import time\nfor n in range(1200):\n time.sleep(0.005)\nraise SystemExit(n % 256)";
    // Epochs are taken of the shell, of its short-lived children, and of what it becomes.
    let script =
        format!("for i in $(seq 25); do /bin/sleep 0.01; done; exec {python} -c '{count}'");
    let mut kept = place.start(&[
        "run", "--name", "a", "--every", "20ms", "--", "sh", "-c", &script,
    ]);
    for epochs in [2, 12, 8] {
        kept = die_and_come_back(&place, kept, epochs);
    }
    assert_eq!(kept.code(), 1199 % 256, "{}", place.said());
}

/// Users, groups and privileges are those of the program, not of whoever restores it.
#[test]
fn a_program_of_another_user_stays_that() {
    const JUDGE: &str = "import os, time\n\
        def me():\n\
        \x20   lines = open('/proc/self/status').read().splitlines()\n\
        \x20   kept = ('Uid', 'Gid', 'Groups', 'Cap', 'NoNewPrivs')\n\
        \x20   return [line for line in lines if line.startswith(kept)]\n\
        before = me()\n\
        assert os.getresuid() == (65534, 65534, 65534) and os.getgroups() == [12, 13]\n\
        for n in range(200):\n\
        \x20   time.sleep(0.005)\n\
        \x20   assert me() == before, me()\n\
        raise SystemExit(11)\n";
    if !may_run("a_program_of_another_user_stays_that") {
        return;
    }
    let (_alone, place) = (alone(), Place::new());
    let (setpriv, python) = (installed("setpriv"), installed("python3"));
    let mut run = vec!["run", "--name", "a", "--every", "50ms", "--", &setpriv];
    run.extend([
        "--reuid=65534",
        "--regid=65534",
        "--groups=12,13",
        "--no-new-privs",
    ]);
    run.extend([&python, "-c", JUDGE]);
    let mut kept = place.start(&run);
    for epochs in [3, 2] {
        kept = die_and_come_back(&place, kept, epochs);
    }
    assert_eq!(kept.code(), 11, "{}", place.said());
}

/// A parent with two terminals of its own: a child works line by line in the foreground of one, and
/// the other one, which is raw, is nobody's controlling terminal. What is on its way at the moment of
/// an epoch may be lost, so a line without an answer is asked again.
const TERMINALS: &str = r#"
import fcntl, os, pty, select, struct, sys, termios, time, tty
def window(fd):
    return struct.unpack('HHHH', fcntl.ioctl(fd, termios.TIOCGWINSZ, bytes(8)))
lines, master = pty.fork()
if lines == 0:
    name, modes, group = os.ttyname(0), None, os.getpgrp()
    for line in sys.stdin:
        assert os.ttyname(0) == name and os.tcgetpgrp(0) == group == os.getpid()
        own = os.open('/dev/tty', os.O_RDWR)
        assert os.ttyname(own) in (name, '/dev/tty') and os.tcgetpgrp(own) == group
        os.close(own)
        assert window(0) == (33, 111, 1, 2), window(0)
        modes = modes or termios.tcgetattr(0)
        assert termios.tcgetattr(0) == modes and not modes[3] & termios.ECHO
        print('is', int(line) * 7, flush=True)
    os._exit(9)
modes = termios.tcgetattr(master)
modes[3] &= ~termios.ECHO
termios.tcsetattr(master, termios.TCSANOW, modes)
fcntl.ioctl(master, termios.TIOCSWINSZ, struct.pack('HHHH', 33, 111, 1, 2))
aside, other = pty.openpty()
tty.setraw(other)
raw = termios.tcgetattr(other)
heard, seen = b'', set()
os.set_blocking(master, False)
os.set_blocking(aside, False)
def read(fd):
    # What there was to read may be lost by now.
    try:
        return os.read(fd, 100) if select.select([fd], [], [], 2)[0] else None
    except BlockingIOError:
        return None
for n in range(400):
    answer, line = b'is %d\r' % (n * 7), None
    while line != answer:
        os.write(master, b'%d\n' % n)
        while b'\n' not in heard and (more := read(master)):
            heard += more
        while b'\n' in heard and line != answer:
            line, heard = heard.split(b'\n', 1)
            assert answer.endswith(line) or line in seen, line
    seen.add(answer)
    os.write(other, b'a\nb')
    if more := read(aside):
        assert b'a\nb'.endswith(more)
    assert termios.tcgetattr(aside) == raw
    time.sleep(0.01)
os.write(master, b'\x04')
while True:
    try:
        if read(master) is None:
            os.write(master, b'\x04')
    except OSError:
        break
assert os.WEXITSTATUS(os.waitpid(lines, 0)[1]) == 9
sys.exit(8)
"#;

#[test]
fn terminals_of_a_program_go_on() {
    if !may_run("terminals_of_a_program_go_on") {
        return;
    }
    let (_alone, place) = (alone(), Place::new());
    std::fs::write(place.path("terminals.py"), TERMINALS).unwrap();
    let (python, script) = (installed("python3"), place.text("terminals.py"));
    let mut kept = place.start(&[
        "run", "--name", "a", "--every", "50ms", "--", &python, &script,
    ]);
    for epochs in [3, 2, 3] {
        kept = die_and_come_back(&place, kept, epochs);
    }
    assert_eq!(kept.code(), 8, "{}", place.said());
}

/// Locks of each sort, of a parent and a child on one file: each asks the kernel who keeps it out.
const LOCKS: &str = r#"
import errno, fcntl, os, select, struct, sys, time
F_OFD_GETLK, F_OFD_SETLK = 36, 37
def flock(kind, start, length):
    return struct.pack('hhqqi4x', kind, os.SEEK_SET, start, length, 0)
def holder(fd, command, start):
    kind, _, _, _, pid = struct.unpack('hhqqi4x', fcntl.fcntl(fd, command, flock(fcntl.F_WRLCK, start, 10)))
    return None if kind == fcntl.F_UNLCK else pid
def kept_out(call, *args):
    try:
        call(*args)
        return False
    except OSError as e:
        return e.errno in (errno.EAGAIN, errno.EACCES)
def opened():
    return os.open('locked', os.O_RDWR | os.O_CREAT, 0o600)
mine, common, whole = opened(), opened(), os.open('whole', os.O_RDWR | os.O_CREAT, 0o600)
fcntl.fcntl(mine, fcntl.F_SETLK, flock(fcntl.F_WRLCK, 0, 10))
fcntl.fcntl(common, F_OFD_SETLK, flock(fcntl.F_RDLCK, 100, 10))
fcntl.flock(whole, fcntl.LOCK_EX)
parent, (told, tell), (leave, end) = os.getpid(), os.pipe(), os.pipe()
child = os.fork()
def judge(other, start):
    stranger, another = opened(), os.open('whole', os.O_RDWR)
    # Closing one more descriptor of the file would give the process' own locks up, so nothing is
    # closed here; a description of its own has a lock of its own.
    assert holder(mine, fcntl.F_GETLK, start) == other, holder(mine, fcntl.F_GETLK, start)
    assert kept_out(fcntl.fcntl, mine, fcntl.F_SETLK, flock(fcntl.F_WRLCK, start, 10))
    assert kept_out(fcntl.fcntl, stranger, F_OFD_SETLK, flock(fcntl.F_WRLCK, 100, 10))
    assert not kept_out(fcntl.fcntl, common, F_OFD_SETLK, flock(fcntl.F_RDLCK, 100, 10))
    assert kept_out(fcntl.flock, another, fcntl.LOCK_SH | fcntl.LOCK_NB)
    assert not kept_out(fcntl.flock, whole, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(another)
    return stranger
if child == 0:
    fcntl.fcntl(mine, fcntl.F_SETLK, flock(fcntl.F_WRLCK, 20, 10))
    os.write(tell, b'x')
    while not select.select([leave], [], [], 0.01)[0]:
        judge(parent, 0)
    os._exit(3)
os.read(told, 1)
for n in range(300):
    judge(child, 20)
    time.sleep(0.01)
os.write(end, b'x')
assert os.WEXITSTATUS(os.waitpid(child, 0)[1]) == 3
sys.exit(4)
"#;

#[test]
fn locks_stay_with_whom_they_belong_to() {
    if !may_run("locks_stay_with_whom_they_belong_to") {
        return;
    }
    let (_alone, place) = (alone(), Place::new());
    std::fs::write(place.path("locks.py"), LOCKS).unwrap();
    let (python, script) = (installed("python3"), place.text("locks.py"));
    let mut kept = place.start(&[
        "run", "--name", "a", "--every", "50ms", "--", &python, &script,
    ]);
    for epochs in [3, 2, 3] {
        kept = die_and_come_back(&place, kept, epochs);
    }
    assert_eq!(kept.code(), 4, "{}", place.said());
}

/// A parent holds descriptors of a child that runs, of one that waits to be asked for, and of one
/// that is gone; the child has inherited one of its parent, which both of them hold as one.
const PIDFDS: &str = r#"
import errno, fcntl, os, select, signal, sys, time
def ended(fd):
    return select.select([fd], [], [], 0)[0] == [fd]
parent = os.pidfd_open(os.getpid())
child = os.fork()
if child == 0:
    while not ended(parent):
        time.sleep(0.005)
        assert os.read(os.open(f'/proc/self/fdinfo/{parent}', os.O_RDONLY | os.O_CLOEXEC), 400)             .decode().split('Pid:')[1].split()[0] == str(os.getppid())
        os.closerange(parent + 1, 40)
    os._exit(1)
def waits(code):
    pid = os.fork()
    if pid == 0:
        os._exit(code)
    fd = os.pidfd_open(pid)
    while not ended(fd):
        time.sleep(0.005)
    return pid, fd
running = os.pidfd_open(child, os.O_NONBLOCK)
asked_later, late = waits(7)
gone, dead = waits(9)
os.waitpid(gone, 0)
poll = select.epoll()
for fd in (running, late, dead):
    poll.register(fd, select.EPOLLIN)
for n in range(500):
    assert sorted(fd for fd, _ in poll.poll(0)) == sorted([late, dead]), n
    signal.pidfd_send_signal(running, 0)
    try:
        signal.pidfd_send_signal(dead, 0)
        sys.exit(f'{n}: the dead take signals')
    except ProcessLookupError:
        pass
    assert fcntl.fcntl(running, fcntl.F_GETFL) & os.O_NONBLOCK
    assert not fcntl.fcntl(late, fcntl.F_GETFL) & os.O_NONBLOCK
    time.sleep(0.005)
status = os.waitid(os.P_PIDFD, late, os.WEXITED)
assert (status.si_pid, status.si_status) == (asked_later, 7), status
signal.pidfd_send_signal(running, signal.SIGTERM)
assert os.waitpid(child, 0) == (child, signal.SIGTERM)
assert ended(running)
sys.exit(6)
"#;

#[test]
fn processes_are_held_by_descriptors() {
    if !may_run("processes_are_held_by_descriptors") {
        return;
    }
    let (_alone, place) = (alone(), Place::new());
    std::fs::write(place.path("pidfds.py"), PIDFDS).unwrap();
    let (python, script) = (installed("python3"), place.text("pidfds.py"));
    let mut kept = place.start(&[
        "run", "--name", "a", "--every", "50ms", "--", &python, &script,
    ]);
    for epochs in [3, 2, 3] {
        kept = die_and_come_back(&place, kept, epochs);
    }
    assert_eq!(kept.code(), 6, "{}", place.said());
}

/// A program that does nothing but wait for a timer of its own to end another one.
#[test]
fn a_timeout_comes_to_its_end() {
    if !may_run("a_timeout_comes_to_its_end") {
        return;
    }
    let (_alone, place) = (alone(), Place::new());
    let timeout = installed("timeout");
    let mut kept = place.start(&[
        "run", "--name", "a", "--every", "50ms", "--", &timeout, "1.5", "sleep", "1000",
    ]);
    for epochs in [3, 2] {
        kept = die_and_come_back(&place, kept, epochs);
    }
    assert_eq!(kept.code(), 124, "{}", place.said());
}

/// A process whose parent has ended stays with the program, and is asked for by nobody.
#[test]
fn a_stray_stays_with_its_program() {
    const STRAY: &str = "import os, sys, time\n\
        r, w = os.pipe()\n\
        if os.fork() == 0:\n\
        \x20   if os.fork() == 0:\n\
        \x20       for n in range(200):\n\
        \x20           os.write(w, b'x')\n\
        \x20           time.sleep(0.005)\n\
        \x20       os._exit(3)\n\
        \x20   os._exit(0)\n\
        os.wait()\n\
        os.close(w)\n\
        heard = 0\n\
        while data := os.read(r, 1):\n\
        \x20   heard += 1\n\
        sys.exit(9 if heard == 200 else 1)\n";
    if !may_run("a_stray_stays_with_its_program") {
        return;
    }
    let (_alone, place) = (alone(), Place::new());
    std::fs::write(place.path("stray.py"), STRAY).unwrap();
    let (python, script) = (installed("python3"), place.text("stray.py"));
    let mut kept = place.start(&[
        "run", "--name", "a", "--every", "50ms", "--", &python, &script,
    ]);
    for epochs in [3, 2, 3] {
        kept = die_and_come_back(&place, kept, epochs);
    }
    assert_eq!(kept.code(), 9, "{}", place.said());
}

/// The contents of a file that is mapped shared go back to what they were, and a file that is gone
/// is made again.
#[test]
fn a_mapped_file_goes_back_with_its_program() {
    const COUNTER: &str = "import mmap, struct, sys, time\n\
        f = open(sys.argv[1], 'r+b')\n\
        m = mmap.mmap(f.fileno(), 4096)\n\
        f.close()\n\
        for n in range(600):\n\
        \x20   assert struct.unpack_from('Q', m, 64)[0] == n, n\n\
        \x20   struct.pack_into('Q', m, 64, n + 1)\n\
        \x20   time.sleep(0.003)\n";
    if !may_run("a_mapped_file_goes_back_with_its_program") {
        return;
    }
    let (_alone, place) = (alone(), Place::new());
    std::fs::write(place.path("counter.py"), COUNTER).unwrap();
    std::fs::write(place.path("mapped"), [0; 4096]).unwrap();
    let (python, script) = (installed("python3"), place.text("counter.py"));
    let mapped = place.text("mapped");
    let run = [
        "run", "--name", "a", "--every", "50ms", "--", &python, &script, &mapped,
    ];
    let mut kept = place.start(&run);
    kept = die_and_come_back(&place, kept, 4);
    until("it runs again", || place.newest("a") > 0);
    for _ in 0..2 {
        place.epoch_after("a", place.newest("a"));
    }
    let root = u32::try_from(place.status("a")["pid"].as_u64().unwrap()).unwrap();
    kept.kill();
    end(root);
    drop(kept);
    std::fs::remove_file(&mapped).unwrap();
    let mut kept = place.start(&["restore", "a"]);
    assert_eq!(kept.code(), 0, "{}", place.said());
    let bytes = std::fs::read(&mapped).unwrap();
    assert_eq!(bytes[64..72], 600u64.to_ne_bytes());
}

/// Memory by a name of its own (`shm_open`), which a reboot takes away while its program has it
/// open and mapped.
#[test]
fn memory_with_a_name_is_made_again_when_it_is_gone() {
    const COUNTER: &str = "import mmap, os, struct, sys, time\n\
        fd = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o640)\n\
        os.ftruncate(fd, 3 << 20)\n\
        m = mmap.mmap(fd, 3 << 20)\n\
        n = 0\n\
        while not os.path.exists(sys.argv[2]):\n\
        \x20   assert struct.unpack('Q', os.pread(fd, 8, 2 << 20))[0] == n, n\n\
        \x20   n += 1\n\
        \x20   struct.pack_into('Q', m, 2 << 20, n)\n\
        \x20   time.sleep(0.003)\n\
        os.unlink(sys.argv[1])\n";
    if !may_run("memory_with_a_name_is_made_again_when_it_is_gone") {
        return;
    }
    let (_alone, place) = (alone(), Place::new());
    std::fs::write(place.path("counter.py"), COUNTER).unwrap();
    let name = format!("/dev/shm/outlive-test-{}", std::process::id());
    let (python, script) = (installed("python3"), place.text("counter.py"));
    let file = place.text("end");
    let run = [
        "run", "--name", "a", "--every", "50ms", "--", &python, &script, &name, &file,
    ];
    let kept = place.start(&run);
    let mut kept = die_and_come_back(&place, kept, 3);
    for _ in 0..2 {
        place.epoch_after("a", place.newest("a"));
    }
    let members = family(kept.pid()).split_off(1);
    kept.kill();
    members.into_iter().for_each(end);
    std::fs::remove_file(&name).unwrap();
    let mut kept = place.start(&["restore", "a"]);
    until("it is made again", || std::path::Path::new(&name).exists());
    std::fs::write(file, "").unwrap();
    assert_eq!(kept.code(), 0, "{}", place.said());
    assert!(!std::path::Path::new(&name).exists());
}

/// A pool of workers with locks and counters in files that were deleted at once.
#[test]
fn workers_share_locks_and_counters_without_a_name() {
    const POOL: &str = "import multiprocessing as mp, os, sys, time\n\
        def work(lock, counter, parts, n):\n\
        \x20   mine = 0\n\
        \x20   while not os.path.exists(sys.argv[1]):\n\
        \x20       with lock:\n\
        \x20           was = counter.value\n\
        \x20           time.sleep(0.001)\n\
        \x20           counter.value = was + 1\n\
        \x20       mine += 1\n\
        \x20   parts[n] = mine\n\
        mp.set_start_method('fork')\n\
        lock, counter = mp.Lock(), mp.Value('Q', 0, lock=False)\n\
        parts = mp.Array('Q', 4, lock=False)\n\
        crowd = [mp.Process(target=work, args=(lock, counter, parts, n)) for n in range(4)]\n\
        [p.start() for p in crowd]\n\
        [p.join() for p in crowd]\n\
        whole = [p.exitcode for p in crowd] == [0] * 4 and min(parts) > 0\n\
        sys.exit(6 if whole and counter.value == sum(parts) else 1)\n";
    if !may_run("workers_share_locks_and_counters_without_a_name") {
        return;
    }
    let (_alone, place) = (alone(), Place::new());
    std::fs::write(place.path("pool.py"), POOL).unwrap();
    let (python, script) = (installed("python3"), place.text("pool.py"));
    let file = place.text("end");
    let mut kept = place.start(&[
        "run", "--name", "a", "--every", "50ms", "--", &python, &script, &file,
    ]);
    for epochs in [3, 2, 3] {
        kept = die_and_come_back(&place, kept, epochs);
    }
    until("all run again", || family(kept.pid()).len() == 6);
    std::fs::write(file, "").unwrap();
    assert_eq!(kept.code(), 6, "{}", place.said());
}

/// System V objects are there again with their IDs, keys, owners, contents and users: those that
/// the dead program left, and, as after a reboot, those that are gone.
#[test]
fn system_v_objects_stay_what_they_were() {
    if !may_run("system_v_objects_stay_what_they_were") {
        return;
    }
    let (_alone, place) = (alone(), Place::new());
    let program = test_program("system_v");
    let file = place.text("end");
    let run = [
        "run", "--name", "a", "--every", "50ms", "--", &program, &file,
    ];
    let mut kept = place.start(&run);
    let ready = kept.line();
    let ids: Vec<&str> = ready.strip_prefix("ready ").unwrap().split(' ').collect();
    let _removed = Removed(ids.iter().map(ToString::to_string).collect());
    for (epochs, is_reboot) in [(3, false), (2, true), (2, true)] {
        for _ in 0..epochs {
            place.epoch_after("a", place.newest("a"));
        }
        let members = family(kept.pid()).split_off(1);
        kept.kill();
        members.into_iter().for_each(end);
        if is_reboot {
            remove_objects(&ids);
        }
        kept = place.start(&["restore", "a"]);
    }
    until("both run again", || family(kept.pid()).len() == 3);
    std::fs::write(file, "").unwrap();
    assert_eq!(kept.code(), 8, "{}", place.said());
}

/// Segments and semaphores of others are in nobody's way silently: what is in the way is named.
#[test]
fn what_is_in_the_way_of_system_v_objects_is_named() {
    if !may_run("what_is_in_the_way_of_system_v_objects_is_named") {
        return;
    }
    let (_alone, place) = (alone(), Place::new());
    let program = test_program("system_v");
    let mut kept = place.start(&["run", "--name", "a", "--", &program, "never"]);
    let ready = kept.line();
    let ids: Vec<&str> = ready.strip_prefix("ready ").unwrap().split(' ').collect();
    let _removed = Removed(ids.iter().map(ToString::to_string).collect());
    place.epoch_after("a", 1);
    let root = place.status("a")["pid"].as_u64().unwrap();
    let members = family(kept.pid()).split_off(1);
    kept.kill();
    members.into_iter().for_each(end);
    remove_objects(&ids);
    let key = format!("{:#x}", 0x4f75_0000 | (root & 0xffff));
    let made = Command::new(installed("python3"))
        .args(["-c", "import ctypes, sys\nprint(ctypes.CDLL(None).shmget(int(sys.argv[1], 16), 4096, 0o1600))"])
        .arg(&key)
        .output()
        .unwrap();
    let other = String::from_utf8(made.stdout).unwrap().trim().to_owned();
    let _other = Removed(vec![other.clone()]);
    let remedy = format!("ipcrm -m {other}");
    place
        .call(&["restore", "a", "--detach"])
        .fails(3, &[ids[0], &remedy, "has its key"]);
    let left = || {
        let sorts = ["shm", "shm", "sem", "msg", "msg"];
        let is_there = |(sort, id): &(&str, &&str)| {
            let list = std::fs::read_to_string(format!("/proc/sysvipc/{sort}")).unwrap();
            let mut listed = list.lines().filter_map(|l| l.split_whitespace().nth(1));
            listed.any(|l| l == **id)
        };
        sorts.into_iter().zip(&ids).filter(is_there).count()
    };
    assert_eq!(left(), 0, "a refused restore makes nothing");
    remove_objects(&[&other]);
    let mut kept = place.start(&["restore", "a"]);
    until("it is there again", || left() == ids.len());
    let members = family(kept.pid()).split_off(1);
    kept.kill();
    members.into_iter().for_each(end);
}

/// Objects that outlast programs, removed whatever happens.
struct Removed(Vec<String>);

impl Drop for Removed {
    fn drop(&mut self) {
        let ids: Vec<&str> = self.0.iter().map(String::as_str).collect();
        remove_objects(&ids);
    }
}

/// Removes what has these IDs, as a reboot does. IDs of the three sorts may be alike, but all of
/// them are the test's.
fn remove_objects(ids: &[&str]) {
    for (place, flag) in ["-m", "-m", "-s", "-q", "-q"].iter().enumerate() {
        if let Some(id) = ids.get(place) {
            let done = Command::new(installed("ipcrm")).args([flag, id]).output();
            drop(done);
        }
    }
}

/// A child that is about to begin a program of its own has its parent's memory until then, and the
/// parent cannot be stopped so long: no reason to refuse, only to wait a moment.
#[test]
fn a_program_that_begins_others_all_the_time_is_kept() {
    if !may_run("a_program_that_begins_others_all_the_time_is_kept") {
        return;
    }
    let (_alone, place) = (alone(), Place::new());
    let program = test_program("spawner");
    let file = place.text("end");
    let run = [
        "run", "--name", "a", "--every", "20ms", "--", &program, &file,
    ];
    let mut kept = place.start(&run);
    for epochs in [5, 8] {
        for _ in 0..epochs {
            place.epoch_after("a", place.newest("a"));
        }
        let status = place.status("a");
        assert_eq!(status["failures"], 0, "{status}");
        kept = die_and_come_back(&place, kept, 1);
    }
    until("it runs again", || family(kept.pid()).len() > 1);
    std::fs::write(file, "").unwrap();
    assert_eq!(kept.code(), 7, "{}", place.said());
}

/// A build: several compilers at a time, each of which begins others.
#[test]
fn make_builds_on() {
    if !may_run("make_builds_on") {
        return;
    }
    let (_alone, place) = (alone(), Place::new());
    // Phony: files from after the newest epoch must not pass for finished ones.
    let rules = "parts = $(foreach n,$(shell seq 40),part-$(n))\n\
        all: $(parts)\n\tcat $^ > whole\n\
        .PHONY: $(parts)\n\
        $(parts): part-%:\n\
        \tfor i in 1 2 3 4 5 6 7 8; do /bin/echo $* $$i; /bin/sleep 0.06; done > $@\n";
    std::fs::write(place.path("rules"), rules).unwrap();
    let make = installed("make");
    let run = [
        "run", "--name", "a", "--every", "50ms", "--", &make, "-s", "-j4", "-f", "rules",
    ];
    let mut kept = place.start(&run);
    for epochs in [3, 3] {
        kept = die_and_come_back(&place, kept, epochs);
    }
    assert_eq!(kept.code(), 0, "{}", place.said());
    let line = |n: usize| format!("{} {}\n", n / 8 + 1, n % 8 + 1);
    let whole: String = (0..320).map(line).collect();
    assert_eq!(std::fs::read_to_string(place.path("whole")).unwrap(), whole);
}

/// Megabytes that processes have together, what they share counted once (`Pss`).
fn together(members: &[u32]) -> u64 {
    let of = |pid: &u32| {
        let path = format!("/proc/{pid}/smaps_rollup");
        let text = std::fs::read_to_string(path).unwrap_or_default();
        let line = text
            .lines()
            .find_map(|l| l.strip_prefix("Pss:"))
            .unwrap_or("0");
        let kilobytes: u64 = line.trim().trim_end_matches(" kB").parse().unwrap();
        kilobytes
    };
    members.iter().map(of).sum::<u64>() >> 10
}

/// A master and its workers have most of their memory in common, copied only when one writes.
#[test]
fn what_forks_share_stays_shared() {
    const MASTER: u64 = 40;
    if !may_run("what_forks_share_stays_shared") {
        return;
    }
    let (_alone, place) = (alone(), Place::new());
    let (program, megabytes) = (test_program("forks"), MASTER.to_string());
    let file = place.text("end");
    let mut kept = place.start(&[
        "run", "--name", "a", "--every", "200ms", "--", &program, &megabytes, "8", &file,
    ]);
    assert_eq!(kept.line(), "ready");
    for _ in 0..2 {
        place.epoch_after("a", place.newest("a"));
        let root = u32::try_from(place.status("a")["pid"].as_u64().unwrap()).unwrap();
        let before = together(&family(root));
        assert!(before < 2 * MASTER, "{before} MB before");
        kept = die_and_come_back(&place, kept, 1);
        let members = || family(root);
        until("all run again", || members().len() == 9);
        place.epoch_after("a", place.newest("a"));
        let after = together(&members());
        assert!(
            after < before + MASTER / 4,
            "{before} MB before, {after} MB after"
        );
    }
    std::fs::write(file, "").unwrap();
    assert_eq!(kept.code(), 7, "{}", place.said());
}

/// Swap space in a file of its own, as long as it lives.
struct Swap(String);

impl Swap {
    /// `None` where the kernel or the file system does not let it be.
    fn new(path: String) -> Option<Self> {
        std::fs::write(&path, vec![0; 64 << 20]).unwrap();
        let call = |program: &str| {
            let done = Command::new(installed(program))
                .arg(&path)
                .output()
                .unwrap();
            done.status.success()
        };
        (call("mkswap") && call("swapon")).then_some(Self(path))
    }
}

impl Drop for Swap {
    fn drop(&mut self) {
        let done = Command::new(installed("swapoff")).arg(&self.0).output();
        drop(done);
    }
}

/// Pages in swap are saved, tracked and put back like those in memory.
#[test]
fn what_is_in_swap_is_kept() {
    if !may_run("what_is_in_swap_is_kept") {
        return;
    }
    let (_alone, place) = (alone(), Place::new());
    let Some(_swap) = Swap::new(place.text("swap")) else {
        println!("skipped: no swap space can be added");
        return;
    };
    let (program, file) = (test_program("swapped"), place.text("end"));
    let mut kept = place.start(&[
        "run", "--name", "a", "--every", "50ms", "--", &program, &file,
    ]);
    assert_eq!(kept.line(), "ready");
    for epochs in [3, 2] {
        for _ in 0..epochs {
            place.epoch_after("a", place.newest("a"));
        }
        let list = place.call(&["history", "a", "--json"]).json();
        let pages =
            |n: usize| list.as_array().unwrap().iter().rev().nth(n).unwrap()["pages"].as_u64();
        assert!(
            pages(0).unwrap() < 2048,
            "what did not change is not saved again: {list}"
        );
        kept = die_and_come_back(&place, kept, 1);
        until("it runs again", || family(kept.pid()).len() > 1);
        place.epoch_after("a", place.newest("a"));
    }
    std::fs::write(file, "").unwrap();
    assert_eq!(kept.code(), 7, "{}", place.said());
}

/// Much of everything in one process; it looks at all of it when it is asked for its report.
#[test]
fn a_crowd_of_threads_descriptors_and_mappings_comes_back() {
    if !may_run("a_crowd_of_threads_descriptors_and_mappings_comes_back") {
        return;
    }
    let (_alone, place) = (alone(), Place::new());
    let crowd = test_program("crowd");
    let much = "--threads 150 --descriptors 1500 --mappings 600 --memory 16 --dirty-rate 20";
    let mut words = vec!["run", "--name", "a", "--every", "50ms", "--", &crowd];
    words.extend(much.split(' '));
    let mut kept = place.start(&words);
    assert!(kept.line().starts_with("ready"), "{}", place.said());
    for _ in 0..2 {
        kept = die_and_come_back(&place, kept, 3);
    }
    // A keeper at work passes on to its program what it is sent itself.
    place.epoch_after("a", place.newest("a"));
    signal(kept.pid(), Signal::USR1);
    assert_eq!(kept.code(), 0, "{}", place.said());
}

/// No stop can be as short as that: all epochs are abandoned but those that end the program, and
/// what they found is in the one that does.
#[test]
fn a_program_is_not_stopped_for_longer_than_it_may_be() {
    if !may_run("a_program_is_not_stopped_for_longer_than_it_may_be") {
        return;
    }
    let (_alone, place) = (alone(), Place::new());
    let crowd = test_program("crowd");
    let much = "--threads 5 --descriptors 20 --memory 16 --dirty-rate 50";
    let how = "run --name a --every 20ms --max-stop 1us --";
    let mut words: Vec<&str> = how.split(' ').collect();
    words.push(&crowd);
    words.extend(much.split(' '));
    let mut kept = place.start(&words);
    assert!(kept.line().starts_with("ready"), "{}", place.said());
    let abandoned = || place.status("a")["abandoned"].as_u64().unwrap_or(0);
    for _ in 0..2 {
        until("epochs are abandoned", || abandoned() > 3);
        let status = place.status("a");
        assert_eq!(status["failures"], 0, "{status}");
        assert_eq!(status["max_stop_us"], 1, "{status}");
        let told = place.said().matches("no epoch").count();
        assert_eq!(told, 1, "{}", place.said());
        let before = place.newest("a");
        place.call(&["stop", "a"]).succeeds();
        assert_eq!(kept.code(), 0, "{}", place.said());
        assert_eq!(place.newest("a"), before + 1);
        kept = place.start(&["restore", "a"]);
    }
    until("epochs are abandoned", || abandoned() > 3);
    signal(kept.pid(), Signal::USR1);
    assert_eq!(kept.code(), 0, "{}", place.said());
}
