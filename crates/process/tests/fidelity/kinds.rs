//! Everything a process can hold, one by one: it is either restored exactly, or refused by name
//! with the program unharmed. The list is the program's (`kinds --list`); what is refused today
//! stands here, and `docs/kinds.md` shows it (`OUTLIVE_UPDATE_DOCS=1` writes that page anew).

use crate::store::Store;
use crate::support::{
    Program, alone, bring_back, bring_back_tracked, clean_up, descriptors, epoch, last_epoch,
    may_run, programs, track,
};
use crate::unharmed::must_be_free;
use outlive_process::{ProcessError, Refusal, TrackOptions, Tracked};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::Command;

/// What is refused, and a word by which the refusal names it.
const REFUSED: &[(&str, &str)] = &[
    ("file-leased", "file lease"),
    ("file-signals-stranger", "which is not of this program"),
    ("directory-deleted", "deleted file"),
    ("directory-watched-dnotify", "directory watched by F_NOTIFY"),
    ("symbolic-link-by-path", "path of a symbolic link (O_PATH)"),
    ("proc-own-status", "file about a process"),
    ("proc-own-memory", "file about a process"),
    ("proc-of-another", "file about a process"),
    ("device-fuse", "FUSE connection"),
    ("device-kvm", "KVM"),
    ("device-tun", "network tunnel (tun/tap)"),
    ("device-loop-control", "loop device control"),
    ("device-kernel-log", "character device"),
    ("memory-file-huge", "memory of a special kind"),
    ("memory-file-secret", "secret memory"),
    ("mount-detached", "path does not lead"),
    ("file-system-context", "file system under construction"),
    ("epoll-of-closed", "epoll that still watches fd"),
    ("inotify-queued", "inotify events that were not read yet"),
    ("fanotify", "fanotify"),
    ("pidfd-stranger", "pidfd of process"),
    ("userfaultfd", "userfaultfd"),
    ("io-uring", "io_uring"),
    ("perf-event", "perf event"),
    ("bpf-map", "BPF object"),
    ("bpf-program", "BPF object"),
    ("landlock-rules", "Landlock rules under construction"),
    ("landlock-restricted", "Landlock rules in force"),
    ("landlock-restricted-user", "Landlock rules in force"),
    (
        "landlock-restricted-capabilities",
        "Landlock rules in force",
    ),
    ("landlock-restricted-thread", "Landlock rules in force"),
    ("namespace-network", "network namespace"),
    ("namespace-mount", "mount namespace"),
    ("namespace-user", "user namespace"),
    ("namespace-time", "time namespace"),
    (
        "tcp-not-accepted",
        "TCP connection within the program that was not accepted yet",
    ),
    (
        "udp-corked",
        "UDP socket that holds back a datagram (UDP_CORK)",
    ),
    ("unix-stream-descriptor-queued", "pipe to another process"),
    (
        "unix-not-accepted",
        "unix connection within the program that was not accepted yet",
    ),
    (
        "socket-filter",
        "socket with a packet filter (SO_ATTACH_FILTER)",
    ),
    ("socket-raw", "raw IP socket"),
    ("socket-mptcp", "multipath TCP socket"),
    (
        "socket-udplite",
        "IP datagram socket that is not UDP (ping, mostly)",
    ),
    ("socket-packet", "packet socket"),
    ("socket-netlink", "netlink socket"),
    ("socket-netlink-events", "netlink socket"),
    ("socket-vsock", "VM socket (vsock)"),
    ("socket-xdp", "XDP socket"),
    ("droppable", "droppable memory"),
    ("secret-memory", "secret memory"),
    ("device-zero-private", "memory of a device"),
    ("policy-of-range", "memory with a policy of its own (mbind"),
    (
        "userfault-registered",
        "memory that the program's own userfaultfd serves",
    ),
    ("ring-of-packets", "packet socket"),
    ("ring-of-io", "memory of a device"),
    ("ring-of-samples", "device memory"),
    ("system-v-memory-of-others", "outside"),
    ("posix-message-queue", "directory is gone"),
    ("asynchronous-io", "asynchronous I/O context"),
    ("working-directory-deleted", "working directory was deleted"),
    ("child-stopped", "program is stopped by signal"),
    (
        "thread-with-descriptors-of-its-own",
        "table of descriptors of its own",
    ),
    (
        "thread-with-a-directory-of-its-own",
        "working directory of its own",
    ),
    ("child-of-vfork", "vfork"),
    ("child-traced", "traced by process"),
    ("leading-thread-ended", "leading thread"),
    (
        "time-stamp-counter-off",
        "time stamp counter is switched off (PR_SET_TSC)",
    ),
    ("write-or-execute", "PR_SET_MDWE"),
    (
        "local-descriptor-table",
        "local descriptor table (modify_ldt)",
    ),
    (
        "system-call-dispatch",
        "dispatched (PR_SET_SYSCALL_USER_DISPATCH)",
    ),
    ("system-call-filter", "filtered (seccomp)"),
    ("system-call-filter-strict", "filtered (seccomp)"),
    ("mount-namespace", "mnt namespace"),
    ("network-namespace", "another net namespace"),
    ("host-name-namespace", "another uts namespace"),
    ("ipc-namespace", "another ipc namespace"),
    ("user-namespace", "another user namespace"),
    (
        "process-namespace-of-children",
        "children will live in another PID namespace (unshare)",
    ),
    ("control-group-namespace", "another cgroup namespace"),
    ("huge-pages", "explicit huge pages (hugetlbfs)"),
    ("protection-key", "memory with a protection key"),
    ("device-block", "block device"),
    ("kernel-crypto", "kernel crypto socket"),
    (
        "socket-ping",
        "IP datagram socket that is not UDP (ping, mostly)",
    ),
    (
        "socket-l2tp",
        "IP datagram socket that is not UDP (ping, mostly)",
    ),
    ("socket-sctp", "SCTP socket"),
    ("socket-can", "CAN socket"),
    ("socket-bluetooth", "Bluetooth socket"),
    ("socket-tipc", "TIPC socket"),
    ("socket-kcm", "socket of an unknown family"),
    ("socket-smc", "socket of an unknown family"),
    ("socket-ax25", "socket of an unknown family"),
    ("socket-ieee802154", "socket of an unknown family"),
    ("socket-phonet", "socket of an unknown family"),
    ("socket-rds", "socket of an unknown family"),
    ("socket-pppox", "socket of an unknown family"),
    ("core-scheduling", "core-scheduling group (PR_SCHED_CORE)"),
    (
        "processor-id-faulting",
        "CPUID instruction is switched off (ARCH_SET_CPUID)",
    ),
    ("port-permissions", "I/O ports may be accessed (ioperm)"),
    ("socket-kernel-tls", "encrypted by the kernel"),
    (
        "time-namespace-of-children",
        "will live in another time namespace",
    ),
    ("posix-timer-of-ended-thread", "which has ended"),
    ("session-keyring", "session keyring of its own"),
    ("session-keyring-of-a-thread", "session keyring of its own"),
    (
        "session-keyring-that-leads-to-user",
        "session keyring of its own",
    ),
    (
        "session-keyring-of-a-thread-that-leads-to-user",
        "session keyring of its own",
    ),
    (
        "session-keyring-of-user-forged",
        "session keyring of its own",
    ),
    ("process-keyring", "process keyring of its own"),
    ("thread-keyring", "thread keyring of its own"),
];

/// What is looked for once, when tracking begins, and why.
const AT_THE_ATTACH_ONLY: &[&str] = &[
    // Reading policies walks all page tables.
    "policy-of-range",
];

/// What became of a kind.
#[derive(Debug, PartialEq, Eq)]
enum Outcome {
    Restored,
    Refused(Vec<Refusal>),
    /// This machine does not offer it.
    Absent(String),
}

fn refusals(error: ProcessError) -> Outcome {
    match error {
        ProcessError::Refused(list) => Outcome::Refused(list),
        other => panic!("neither saved nor refused: {other}"),
    }
}

/// Tries to save and to restore one kind, which must pass the program's own check in any case.
fn try_one(kind: &str) -> Outcome {
    let mut program = Program::start("kinds", &[kind]);
    let said = program.output();
    if let Some(why) = said.lines().find_map(|l| l.strip_prefix("absent: ")) {
        program.must_report();
        return Outcome::Absent(why.to_owned());
    }
    let (maps, fds) = (program.mappings(), descriptors(program.pid));
    let mut store = Store::default();
    let options = TrackOptions {
        strays: kind.starts_with("orphan-"),
        ..TrackOptions::default()
    };
    let refused = match Tracked::attach(program.pid, options) {
        Err(e) => refusals(e),
        Ok(mut tracked) => match epoch(&mut tracked, &mut store) {
            Err(e) => refusals(e),
            Ok(_) => {
                let seen = last_epoch(&mut program, tracked, &mut store);
                // Processes that it leaves behind become ours, and are ours to reap.
                clean_up();
                bring_back(&mut program, store.newest(), &seen);
                program.must_report();
                return Outcome::Restored;
            }
        },
    };
    must_be_free(&program);
    assert_eq!((maps, fds), (program.mappings(), descriptors(program.pid)));
    program.must_report();
    refused
}

/// What is wrong with the outcome, if anything.
fn judge(kind: &str, outcome: &Outcome) -> Option<String> {
    let word = REFUSED.iter().find(|(k, _)| *k == kind).map(|(_, w)| *w);
    match (outcome, word) {
        (Outcome::Absent(why), _) => {
            println!("SKIPPED 1 test: {kind}: not offered here: {why}");
            None
        }
        (Outcome::Restored, None) => None,
        (Outcome::Restored, Some(_)) => Some("is restored, but listed as refused".into()),
        (Outcome::Refused(list), word) => {
            let named = word.is_some_and(|word| names(list, word));
            (!named).then(|| format!("is refused like this: {list:?}"))
        }
    }
}

/// A refusal must name a process, the kind, and a remedy.
fn names(list: &[Refusal], word: &str) -> bool {
    list.iter().any(|r| {
        r.pid != 0
            && !r.program.is_empty()
            && !r.remedy.is_empty()
            && r.what.to_lowercase().contains(&word.to_lowercase())
    })
}

fn text(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().cloned();
    let text = text.or_else(|| panic.downcast_ref::<&str>().map(|s| (*s).to_owned()));
    text.unwrap_or_default()
}

/// The names of all kinds.
fn list() -> String {
    let mut program = Command::new(programs().join("kinds"));
    let listed = program.arg("--list").output().expect("the list");
    String::from_utf8(listed.stdout).expect("names")
}

const PAGE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/kinds.md");
const PAGE_BEGINS: &str = "# Kinds of state

What a process can hold, one kind a line, and what becomes of it. A test makes each of them in a
program of its own (`crates/test-programs/src/bin/kinds`), which checks what it has afterwards:
*restored* means that this check passes after the program was killed and brought back, and that all
that can be seen of it from outside is as it was; *refused* means that the epoch fails with a
message that names it, and that the program goes on unharmed. What the machine of the test does not
offer is not tried there, and the test says so. This page is written by that test.

| kind | |
|---|---|
";

const PAGE_ENDS: &str = "
## What belongs to the machine

A program can hold some of its state together with others, who may use it while the program is not
there, and whom nobody can ask. That is neither saved nor refused; like a file that is not open, it is
where it was when the program comes back, or it is not.

- **Keyrings of users** (`_uid.N`, `_uid_ses.N`) and the keys in them: the kernel keeps them for the user as
  long as the machine runs, whether or not a process of that user does, and whoever is that user finds
  them by the names that `keyctl(2)` has for them (`@u`, `@us`). So a program is not refused for having none but these, also where it
  took its user's session keyring for its own. As with files in `/run`, other programs of the user may
  change them while it is away, and they are empty after the machine has booted: for every program of
  that user, restored or begun anew. Who put a key there is not known to anybody, so no key is the
  program's rather than its user's.
- **The session keyring of who runs Outlive**: it was made for a login or a service, the program was only
  started there, and after a restore it has that of who restores it. So has a program with the session
  keyring of its user, with one that was revoked, or with one without a name in which there is nothing, or
  only keyrings of users and what systemd puts there. Keyrings of users are told from others with their
  names by their numbers. Everything else in thread, process and session keyrings is refused. Some threads
  can only be asked by one that is made for it: where none can be made (`pids.max`, `RLIMIT_NPROC`), the
  epoch fails, and the next one asks again.
- **System V semaphores, message queues and segments that nobody has mapped**, as long as they are not
  the program's. Nothing that the kernel keeps ties them to a process but who made a segment, who
  changed a semaphore or a queue last, and who waits for them. An object is the program's if that is one
  of its processes, or one that was there at the stop before, or if it was the program's before. What is
  left was used by nobody yet, or only by processes that came and went between two stops or before, and might as
  well be anybody's: where the machine has not booted since, the program finds it as it is.
";

#[test]
fn the_page_of_kinds_says_what_the_tests_say() {
    let find = |table: &[(&str, &str)], kind: &str| {
        table
            .iter()
            .find(|(k, _)| *k == kind)
            .map(|(_, w)| (*w).to_owned())
    };
    let mut page = PAGE_BEGINS.to_owned();
    for kind in list().lines() {
        let refused = find(REFUSED, kind).map(|word| format!("refused: {word}"));
        let fate = refused.unwrap_or_else(|| "restored".into());
        page += &format!("| {} | {fate} |\n", kind.replace('-', " "));
    }
    page += PAGE_ENDS;
    if std::env::var_os("OUTLIVE_UPDATE_DOCS").is_some() {
        std::fs::write(PAGE, &page).expect("writing the page");
    }
    let written = std::fs::read_to_string(PAGE).unwrap_or_default();
    assert!(
        written == page,
        "docs/kinds.md is stale: set OUTLIVE_UPDATE_DOCS=1 and run this again"
    );
}

#[test]
fn every_kind_is_restored_or_refused_by_name() {
    let _alone = alone();
    if !may_run("every_kind_is_restored_or_refused_by_name") {
        return;
    }
    crate::support::adopt_orphans();
    let listed = list();
    let only = std::env::var("OUTLIVE_KIND").ok();
    let kinds: Vec<&str> = listed
        .lines()
        .filter(|k| only.as_deref().is_none_or(|o| k.starts_with(o)))
        .collect();
    assert!(only.is_some() || kinds.len() > 200, "{}", kinds.len());
    for (kind, _) in REFUSED {
        assert!(
            only.is_some() || kinds.contains(kind),
            "{kind} is not in the list"
        );
    }
    let (mut wrong, mut absent) = (Vec::new(), Vec::<&str>::new());
    for kind in &kinds {
        match catch_unwind(AssertUnwindSafe(|| try_one(kind))) {
            Ok(outcome) => {
                absent.extend(matches!(outcome, Outcome::Absent(_)).then_some(*kind));
                wrong.extend(judge(kind, &outcome).map(|w| format!("{kind} {w}")));
            }
            Err(panic) => wrong.push(format!("{kind}: {}", text(&*panic))),
        }
        clean_up();
    }
    if !absent.is_empty() {
        let (many, which) = (absent.len(), absent.join(", "));
        println!("skipped: {many} kinds that this machine does not offer: {which}");
    }
    assert!(
        wrong.is_empty(),
        "{} kinds:\n{}",
        wrong.len(),
        wrong.join("\n")
    );
}

/// What a program takes on while it is tracked already is refused as well, and at the stop.
#[test]
fn what_is_refused_is_refused_at_the_stop_too() {
    let _alone = alone();
    if !may_run("what_is_refused_is_refused_at_the_stop_too") {
        return;
    }
    crate::support::adopt_orphans();
    let only = std::env::var("OUTLIVE_KIND").ok();
    let mut wrong = Vec::new();
    for (kind, word) in REFUSED {
        if AT_THE_ATTACH_ONLY.contains(kind)
            || only.as_deref().is_some_and(|o| !kind.starts_with(o))
        {
            continue;
        }
        match catch_unwind(AssertUnwindSafe(|| try_later(kind))) {
            Ok(None) => {}
            Ok(Some(list)) if names(&list, word) => {}
            Ok(Some(list)) => wrong.push(format!("{kind} is refused like this: {list:?}")),
            Err(panic) => wrong.push(format!("{kind}: {}", text(&*panic))),
        }
        clean_up();
    }
    assert!(
        wrong.is_empty(),
        "{} kinds:\n{}",
        wrong.len(),
        wrong.join("\n")
    );
}

/// Has a tracked program take on a kind; `None` where this machine does not offer it.
fn try_later(kind: &str) -> Option<Vec<Refusal>> {
    let program = Program::start("kinds", &[kind, "later"]);
    let mut tracked = track(&program);
    let mut store = Store::default();
    epoch(&mut tracked, &mut store).expect("an epoch before");
    program.signal(libc::SIGUSR2);
    program.await_word("held");
    let absent = program.output().contains("absent: ");
    let outcome = epoch(&mut tracked, &mut store);
    must_be_free(&program);
    drop(tracked);
    must_be_free(&program);
    program.must_report();
    match outcome {
        Err(ProcessError::Refused(list)) => Some(list),
        _ if absent => None,
        Ok(_) => panic!("it was not refused"),
        Err(e) => panic!("neither saved nor refused: {e}"),
    }
}

/// System V objects are the program's though nobody used them yet but a thread that waits, and though
/// who used them has ended between two stops; the machine has booted since.
#[test]
fn system_v_objects_are_kept_whoever_used_them() {
    let _alone = alone();
    if !may_run("system_v_objects_are_kept_whoever_used_them") {
        return;
    }
    crate::support::adopt_orphans();
    for kind in ["system-v-messages-awaited", "system-v-of-a-child"] {
        let mut program = Program::start("kinds", &[kind]);
        let mut tracked = track(&program);
        let mut store = Store::default();
        epoch(&mut tracked, &mut store).expect("an epoch before");
        let children = format!("/proc/{0}/task/{0}/children", program.pid);
        let children = std::fs::read_to_string(children).expect("its children");
        for child in children.split_whitespace() {
            crate::support::kill_child(child.parse().expect("a process ID"));
        }
        epoch(&mut tracked, &mut store).expect("an epoch without it");
        let seen = last_epoch(&mut program, tracked, &mut store);
        clean_up();
        program.remove_objects();
        let mut tracked = bring_back_tracked(&mut program, store.newest(), &seen);
        // What follows a restore knows them too.
        epoch(&mut tracked, &mut store).expect("an epoch after a restore");
        let seen = last_epoch(&mut program, tracked, &mut store);
        clean_up();
        program.remove_objects();
        bring_back(&mut program, store.newest(), &seen);
        program.must_report();
        clean_up();
    }
}
