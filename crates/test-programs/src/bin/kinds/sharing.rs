//! Processes that share memory, descriptors, directories or signal actions as a whole.
//!
//! Each partner takes orders at a desk of its own, in memory that all of them have in any case: to
//! change what may be shared, or to say how that is for itself. So it shows that what is shared is
//! one thing, and that nothing else is.

use crate::process::end;
use crate::{Absent, Check, Kind, look, must, offered, same};
use outlive_test_programs::{now, sys};
use std::os::fd::AsRawFd;
use std::path::Path;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering::SeqCst};

const ALL: i32 = libc::CLONE_VM | libc::CLONE_FILES | libc::CLONE_FS | libc::CLONE_SIGHAND;

pub(crate) const KINDS: &[Kind] = &[
    ("child-sharing-memory", |_| child(libc::CLONE_VM)),
    ("child-sharing-descriptors", |_| child(libc::CLONE_FILES)),
    ("child-locking-by-shared-descriptors", locking),
    ("child-sharing-directory", |_| child(libc::CLONE_FS)),
    ("child-sharing-signals", |_| {
        child(libc::CLONE_VM | libc::CLONE_SIGHAND)
    }),
    ("child-sharing-all-but-memory", |_| {
        child(libc::CLONE_FILES | libc::CLONE_FS)
    }),
    ("child-sharing-all", |_| child(ALL)),
    ("grandchild-sharing-all", |_| grandchild()),
    ("grandchild-sharing-past-its-parent", |_| past_parent()),
    ("siblings-sharing-all", |_| siblings(ALL)),
    ("siblings-sharing-descriptors", |_| {
        siblings(libc::CLONE_FILES)
    }),
    ("thread-with-descriptors-of-its-own", |_| {
        thread_apart(libc::CLONE_FILES)
    }),
    ("thread-with-a-directory-of-its-own", |_| {
        thread_apart(libc::CLONE_FS)
    }),
    ("orphan-sharing-all", |_| orphan()),
    ("orphan-sharing-with-an-uncle", |_| nephew()),
];

/// Memory that is private, and so one of each process unless it is shared as a whole.
static WORD: AtomicU64 = AtomicU64::new(0);

/// The signal whose action is changed; nobody sends it.
const SIGNAL: usize = libc::SIGWINCH as usize;
/// Nobody else has so high a number open.
const NUMBER: usize = 77;

const NOTHING: i64 = 0;
/// Changes the word, opens the number, changes directory, and ignores the signal.
const CHANGE: i64 = 1;
/// Answers with flags: what is changed for it.
const TELL: i64 = 2;
/// Makes a partner at the next desk; the argument are flags.
const MAKE: i64 = 3;
/// Leaves what it shares; the argument are flags.
const LEAVE: i64 = 4;

/// Where a partner takes orders.
#[derive(Default)]
struct Desk {
    order: AtomicI64,
    argument: AtomicI64,
    answer: AtomicI64,
}

/// Ends a child; the argument is its process ID.
const END: i64 = 5;

/// Takes a lock on a file; the argument is its number.
const LOCK: i64 = 6;

/// So many partners at most.
const DESKS: usize = 8;
type Desks = &'static [Desk; DESKS];

fn desks() -> Desks {
    // SAFETY: fresh memory of that size, zeroes in which are desks without orders, for ever.
    unsafe {
        let at = libc::mmap(
            std::ptr::null_mut(),
            size_of::<[Desk; DESKS]>(),
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_SHARED | libc::MAP_ANONYMOUS,
            -1,
            0,
        );
        must("mmap", at as i64);
        &*at.cast()
    }
}

/// Changes whatever may be shared.
fn change() -> i64 {
    WORD.store(WORD.load(SeqCst) + 1, SeqCst);
    // Handler, flags, restorer, mask.
    let ignore = [libc::SIG_IGN, 0, 0, 0];
    // SAFETY: paths are literals, the structure is live and of the kernel's form.
    unsafe {
        let fd = sys(
            libc::SYS_open,
            [c"/dev/null".as_ptr() as usize, 0, 0, 0, 0, 0],
        );
        let number = sys(libc::SYS_dup2, [fd as usize, NUMBER, 0, 0, 0, 0]);
        let closed = sys(libc::SYS_close, [fd as usize, 0, 0, 0, 0, 0]);
        let there = sys(libc::SYS_chdir, [c"/usr".as_ptr() as usize, 0, 0, 0, 0, 0]);
        let at = ignore.as_ptr() as usize;
        let ignored = sys(libc::SYS_rt_sigaction, [SIGNAL, at, 0, 8, 0, 0]);
        fd.min(number).min(closed).min(there).min(ignored)
    }
}

/// What is changed, as flags.
fn changed() -> i32 {
    let mut action = [usize::MAX; 4];
    let mut path = [0u8; 16];
    // SAFETY: the structures are live and as long as the calls are told.
    let (open, ignored) = unsafe {
        let open = sys(
            libc::SYS_fcntl,
            [NUMBER, libc::F_GETFD as usize, 0, 0, 0, 0],
        );
        let at = action.as_mut_ptr() as usize;
        sys(libc::SYS_rt_sigaction, [SIGNAL, 0, at, 8, 0, 0]);
        // A longer path does not fit, and is another one.
        let at = path.as_mut_ptr() as usize;
        sys(libc::SYS_getcwd, [at, path.len(), 0, 0, 0, 0]);
        (open >= 0, action[0] == libc::SIG_IGN)
    };
    let of = |is: bool, flag| if is { flag } else { 0 };
    of(WORD.load(SeqCst) != 0, libc::CLONE_VM)
        | of(open, libc::CLONE_FILES)
        | of(path.starts_with(b"/usr\0"), libc::CLONE_FS)
        | of(ignored, libc::CLONE_SIGHAND)
}

/// Whether it is to begin another program: a signal waits that is blocked.
fn is_told_to_leave() -> bool {
    let mut waiting = 0u64;
    let at = &raw mut waiting as usize;
    // SAFETY: the set is live.
    unsafe { sys(libc::SYS_rt_sigpending, [at, 8, 0, 0, 0, 0]) };
    waiting & 1 << (libc::SIGUSR2 - 1) != 0
}

/// A partner: takes orders for ever. It may have the memory of another process, and its thread's.
extern "C" fn serve(at: *mut libc::c_void) -> i32 {
    let at = at.cast::<Desk>();
    loop {
        // SAFETY: the desk is there for ever, and the next one where it is needed.
        let (desk, next) = unsafe { (&*at, at.add(1)) };
        let argument = desk.argument.load(SeqCst) as i32;
        let answer = match desk.order.load(SeqCst) {
            CHANGE => change(),
            TELL => i64::from(changed()),
            MAKE => make(next, argument),
            // SAFETY: only a number is passed.
            LEAVE => unsafe { sys(libc::SYS_unshare, [argument as usize, 0, 0, 0, 0, 0]) },
            LOCK => lock(argument),
            // SAFETY: only numbers are passed.
            END => unsafe {
                let child = argument as usize;
                let killed = sys(libc::SYS_kill, [child, libc::SIGKILL as usize, 0, 0, 0, 0]);
                let waited = sys(libc::SYS_wait4, [child, 0, libc::__WALL as usize, 0, 0, 0]);
                killed.min(waited)
            },
            // SAFETY: takes no pointers that are not literals; does not come back.
            _ if is_told_to_leave() => unsafe {
                let program = c"/bin/sleep".as_ptr();
                let arguments = [program, c"1000".as_ptr(), std::ptr::null()];
                let at = arguments.as_ptr() as usize;
                sys(libc::SYS_execve, [program as usize, at, 0, 0, 0, 0])
            },
            _ => {
                let nap = [0i64, 1_000_000];
                let at = nap.as_ptr() as usize;
                // SAFETY: the time is live.
                unsafe { sys(libc::SYS_nanosleep, [at, 0, 0, 0, 0, 0]) };
                continue;
            }
        };
        desk.answer.store(answer, SeqCst);
        desk.order.store(NOTHING, SeqCst);
    }
}

/// Makes a partner; its process ID, or the negative error.
fn make(desk: *mut Desk, flags: i32) -> i64 {
    const STACK: usize = 256 << 10;
    let (protection, map) = (
        libc::PROT_READ | libc::PROT_WRITE,
        libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
    );
    // SAFETY: the stack is the partner's own for ever; it runs code that needs no library.
    unsafe {
        let stack = libc::mmap(std::ptr::null_mut(), STACK, protection, map, -1, 0);
        let top = stack.byte_add(STACK);
        libc::clone(serve, top, flags | libc::SIGCHLD, desk.cast()).into()
    }
}

/// Has a partner do something.
fn ask(desk: &Desk, order: i64, argument: i32) -> i64 {
    const PATIENCE: i64 = 20_000_000_000;
    desk.argument.store(argument.into(), SeqCst);
    desk.order.store(order, SeqCst);
    let begun = now();
    while desk.order.load(SeqCst) != NOTHING {
        same("that a partner works", now() - begun < PATIENCE, true);
    }
    must("what a partner did", desk.answer.load(SeqCst))
}

/// The first partner.
fn partner(desks: Desks, flags: i32) -> Result<i32, Absent> {
    let desk = std::ptr::from_ref(&desks[0]).cast_mut();
    offered("clone", make(desk, flags)).map(|pid| pid as i32)
}

/// What this process has in common with a partner, as that shows when the partner changes it.
fn shared_with(desk: &Desk) -> i32 {
    same("what is changed before", changed(), 0);
    ask(desk, CHANGE, 0);
    same("what the partner changed", ask(desk, TELL, 0), ALL.into());
    changed()
}

fn child(flags: i32) -> Result<Check, Absent> {
    let desks = desks();
    let child = partner(desks, flags)?;
    look(move || {
        same("what is shared", shared_with(&desks[0]), flags);
        end(child);
    })
}

/// A lock of the table of descriptors: it shows who of those who share that took it.
fn locking(dir: &Path) -> Result<Check, Absent> {
    let file = crate::files::file(dir);
    let desks = desks();
    let child = partner(desks, libc::CLONE_FILES)?;
    let number = file.as_raw_fd();
    ask(&desks[0], LOCK, number);
    look(move || {
        // Nobody stands in one's own way: another process must look.
        // SAFETY: the program has one thread; the child makes one call with a live region.
        let other = must("fork", unsafe { libc::fork() }) as i32;
        if other == 0 {
            let mut asked = crate::files::region(libc::F_WRLCK as i16);
            // SAFETY: as above.
            unsafe {
                let r = libc::fcntl(number, libc::F_GETLK, &raw mut asked);
                let seen = r == 0 && asked.l_pid == child;
                libc::_exit(i32::from(!seen));
            }
        }
        same("what a child sees", crate::process::ended(other), 0);
        drop(file);
        end(child);
    })
}

/// Takes a lock.
fn lock(number: i32) -> i64 {
    let wanted = crate::files::region(libc::F_WRLCK as i16);
    let at = &raw const wanted as usize;
    // SAFETY: the region is live.
    unsafe {
        sys(
            libc::SYS_fcntl,
            [number as usize, libc::F_SETLK as usize, at, 0, 0, 0],
        )
    }
}

fn grandchild() -> Result<Check, Absent> {
    let desks = desks();
    let child = partner(desks, ALL)?;
    let grandchild = ask(&desks[0], MAKE, ALL) as i32;
    look(move || {
        same("what is shared", shared_with(&desks[1]), ALL);
        same(
            "what its parent shares",
            ask(&desks[0], TELL, 0),
            ALL.into(),
        );
        // SAFETY: only numbers are passed.
        must("kill", unsafe { libc::kill(grandchild, libc::SIGKILL) });
        end(child);
    })
}

fn past_parent() -> Result<Check, Absent> {
    let desks = desks();
    let flags = libc::CLONE_FILES | libc::CLONE_FS;
    let child = partner(desks, flags)?;
    let grandchild = ask(&desks[0], MAKE, flags) as i32;
    ask(&desks[0], LEAVE, flags);
    look(move || {
        same("what is shared", shared_with(&desks[1]), flags);
        same("what its parent shares", ask(&desks[0], TELL, 0), 0);
        // SAFETY: only numbers are passed.
        must("kill", unsafe { libc::kill(grandchild, libc::SIGKILL) });
        end(child);
    })
}

/// Three children that share with each other, but not with this process. The first may have been
/// ended meanwhile, or begun another program.
fn siblings(flags: i32) -> Result<Check, Absent> {
    let desks = desks();
    let first = partner(desks, 0)?;
    let second = ask(&desks[0], MAKE, flags | libc::CLONE_PARENT) as i32;
    let third = ask(&desks[1], MAKE, flags | libc::CLONE_PARENT) as i32;
    look(move || {
        same("what is shared", shared_with(&desks[2]), 0);
        same("between them", ask(&desks[1], TELL, 0), flags.into());
        for child in [first, second, third] {
            end(child);
        }
    })
}

/// A process that shares with this one, and whose parent has ended.
fn orphan() -> Result<Check, Absent> {
    let desks = desks();
    let child = partner(desks, ALL)?;
    let grandchild = ask(&desks[0], MAKE, ALL) as i32;
    end(child);
    look(move || {
        same("what is shared", shared_with(&desks[1]), ALL);
        // SAFETY: only numbers are passed.
        must("kill", unsafe { libc::kill(grandchild, libc::SIGKILL) });
    })
}

/// A process that has lost its parent, and shares with that one's parent, a child of this one.
fn nephew() -> Result<Check, Absent> {
    let desks = desks();
    let uncle = partner(desks, 0)?;
    let parent = ask(&desks[0], MAKE, ALL) as i32;
    let nephew = ask(&desks[1], MAKE, ALL) as i32;
    ask(&desks[0], END, parent);
    look(move || {
        same("what is shared", shared_with(&desks[2]), 0);
        same("with the uncle", ask(&desks[0], TELL, 0), ALL.into());
        // SAFETY: only numbers are passed.
        must("kill", unsafe { libc::kill(nephew, libc::SIGKILL) });
        end(uncle);
    })
}

/// A thread that does not share with its process what threads share.
fn thread_apart(flag: i32) -> Result<Check, Absent> {
    let desks = desks();
    std::thread::spawn(|| serve(std::ptr::from_ref(&desks[0]).cast_mut().cast()));
    offered("unshare", ask(&desks[0], LEAVE, flag))?;
    look(move || same("what is shared", shared_with(&desks[0]), ALL & !flag))
}
