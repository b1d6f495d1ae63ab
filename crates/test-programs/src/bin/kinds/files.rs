//! Files of all sorts: on disk, of the kernel, devices, and what hangs on a descriptor.

use crate::{Absent, Check, Kind, look, must, offered, same};
use std::ffi::CString;
use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::Path;

pub(crate) const KINDS: &[Kind] = &[
    ("file-read-half", read_half),
    ("file-appended", appended),
    ("file-direct-sync", direct),
    ("file-deleted", deleted),
    ("file-without-name", nameless),
    ("file-by-path-only", path_only),
    ("file-read-only-duplicate", duplicate),
    ("file-close-on-exec", close_on_exec),
    ("file-locked-flock", flock),
    ("file-locked-posix", posix_lock),
    ("file-locked-description", description_lock),
    ("file-leased", lease),
    ("file-signals-owner", owner),
    ("file-signals-stranger", owned_by_stranger),
    ("directory-read-half", directory),
    ("directory-deleted", directory_deleted),
    ("directory-watched-dnotify", dnotify),
    ("symbolic-link-by-path", |d| symlink(d)),
    ("fifo-with-contents", fifo),
    ("proc-own-status", |_| {
        kernel_file("/proc/self/status", "Name:")
    }),
    ("proc-own-memory", own_memory),
    ("proc-of-another", |_| {
        kernel_file("/proc/1/status", "Name:")
    }),
    ("proc-system", |_| kernel_file("/proc/meminfo", "MemTotal:")),
    ("sysfs", |_| {
        kernel_file("/sys/devices/system/cpu/online", "0")
    }),
    ("cgroup-file", |_| {
        kernel_file("/sys/fs/cgroup/unified/cgroup.procs", "")
    }),
    ("device-null", |_| device("/dev/null")),
    ("device-zero", |_| device("/dev/zero")),
    ("device-full", |_| device("/dev/full")),
    ("device-random", |_| device("/dev/random")),
    ("device-urandom", |_| device("/dev/urandom")),
    ("device-fuse", |_| device("/dev/fuse")),
    ("device-kvm", |_| device("/dev/kvm")),
    ("device-tun", |_| device("/dev/net/tun")),
    ("device-loop-control", |_| device("/dev/loop-control")),
    ("device-kernel-log", |_| device("/dev/kmsg")),
    ("device-block", |_| device("/dev/vda")),
    ("terminal-master", terminal_master),
    ("terminal-pair", terminal_pair),
    ("memory-file", memory_file),
    ("memory-file-sealed", memory_file_sealed),
    ("memory-file-huge", memory_file_huge),
    ("memory-file-secret", memory_file_secret),
    ("mount-detached", mount_detached),
    ("file-system-context", file_system_context),
];

/// The signal that tells of a descriptor (fcntl(2)).
const F_SETSIG: i32 = 10;
/// Files are created; more than one is told of.
const DN_CREATE_MULTISHOT: libc::c_long = 0x8000_0004;
const TEXT: &[u8] = b"what a file holds before and after";

fn c(path: &Path) -> CString {
    CString::new(path.as_os_str().as_bytes()).unwrap_or_default()
}

fn io<T>(what: &str, result: std::io::Result<T>) -> T {
    result.unwrap_or_else(|e| outlive_test_programs::fail(&format!("{what}: {e}")))
}

pub(crate) fn file(dir: &Path) -> File {
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(true);
    let mut file = io("open", options.open(dir.join("file")));
    io("write", file.write_all(TEXT));
    file
}

fn flags(file: &impl AsRawFd) -> i32 {
    // SAFETY: only numbers are passed.
    unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GETFL) }
}

fn read_half(dir: &Path) -> Result<Check, Absent> {
    let mut file = file(dir);
    io("seek", file.seek(SeekFrom::Start(5)));
    look(move || {
        let mut rest = Vec::new();
        io("read", file.read_to_end(&mut rest));
        same("the rest", &rest[..], &TEXT[5..]);
    })
}

fn appended(dir: &Path) -> Result<Check, Absent> {
    let path = dir.join("file");
    let mut log = io(
        "open",
        OpenOptions::new().append(true).create(true).open(&path),
    );
    io("write", log.write_all(b"one "));
    look(move || {
        io("write", log.write_all(b"two"));
        same(
            "the log",
            io("read", std::fs::read(path)),
            b"one two".to_vec(),
        );
    })
}

fn direct(dir: &Path) -> Result<Check, Absent> {
    drop(file(dir));
    let mut options = OpenOptions::new();
    options
        .write(true)
        .custom_flags(libc::O_DIRECT | libc::O_DSYNC | libc::O_NOATIME);
    let Ok(file) = options.open(dir.join("file")) else {
        return Err(Absent("this file system has no O_DIRECT".into()));
    };
    let before = flags(&file);
    look(move || same("the flags", flags(&file), before))
}

fn deleted(dir: &Path) -> Result<Check, Absent> {
    let file = file(dir);
    io("remove", std::fs::remove_file(dir.join("file")));
    look(move || still(&file))
}

fn still(file: &File) {
    let mut text = vec![0; TEXT.len()];
    io("read", file.read_exact_at(&mut text, 0));
    same("the text", &text[..], TEXT);
}

fn nameless(dir: &Path) -> Result<Check, Absent> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).custom_flags(libc::O_TMPFILE);
    let Ok(mut file) = options.open(dir) else {
        return Err(Absent("this file system has no O_TMPFILE".into()));
    };
    io("write", file.write_all(TEXT));
    look(move || still(&file))
}

fn path_only(dir: &Path) -> Result<Check, Absent> {
    let inode = io("stat", file(dir).metadata()).ino();
    let mut options = OpenOptions::new();
    options.read(true).custom_flags(libc::O_PATH);
    let path = io("open", options.open(dir.join("file")));
    look(move || {
        same("the file", io("stat", path.metadata()).ino(), inode);
        same("O_PATH", flags(&path) & libc::O_PATH, libc::O_PATH);
    })
}

fn duplicate(dir: &Path) -> Result<Check, Absent> {
    let file = file(dir);
    let mut second = io("dup", file.try_clone());
    look(move || {
        io("seek", second.seek(SeekFrom::Start(7)));
        let mut first = &file;
        same(
            "the shared position",
            io("tell", first.stream_position()),
            7,
        );
    })
}

fn close_on_exec(dir: &Path) -> Result<Check, Absent> {
    let (closed, kept) = (file(dir), file(dir));
    // SAFETY: only numbers are passed.
    let flag = |f: &File, set: Option<i32>| unsafe {
        set.map_or_else(
            || libc::fcntl(f.as_raw_fd(), libc::F_GETFD),
            |v| libc::fcntl(f.as_raw_fd(), libc::F_SETFD, v),
        )
    };
    must("F_SETFD", flag(&kept, Some(0)));
    look(move || {
        same(
            "the flags",
            (flag(&closed, None), flag(&kept, None)),
            (1, 0),
        )
    })
}

fn flock(dir: &Path) -> Result<Check, Absent> {
    let held = file(dir);
    let other = file(dir);
    // SAFETY: only numbers are passed.
    let lock = |f: &File| unsafe { libc::flock(f.as_raw_fd(), libc::LOCK_EX | libc::LOCK_NB) };
    must("flock", lock(&held));
    look(move || {
        same("the lock of another", lock(&other), -1);
        drop(held);
    })
}

pub(crate) fn region(kind: i16) -> libc::flock {
    libc::flock {
        l_type: kind,
        l_whence: libc::SEEK_SET as i16,
        l_start: 3,
        l_len: 11,
        l_pid: 0,
    }
}

fn posix_lock(dir: &Path) -> Result<Check, Absent> {
    let held = file(dir);
    let mut wanted = region(libc::F_WRLCK as i16);
    // SAFETY: the region is live.
    must("F_SETLK", unsafe {
        libc::fcntl(held.as_raw_fd(), libc::F_SETLK, &raw mut wanted)
    });
    let me = std::process::id() as i32;
    look(move || {
        // A lock of one's own is in nobody's own way: only a child can see it.
        // SAFETY: the child makes calls with numbers and a live region, and leaves.
        let child = must("fork", unsafe { libc::fork() }) as i32;
        if child == 0 {
            let mut asked = region(libc::F_WRLCK as i16);
            // SAFETY: as above.
            unsafe {
                let r = libc::fcntl(held.as_raw_fd(), libc::F_GETLK, &raw mut asked);
                let seen = r == 0 && asked.l_pid == me && (asked.l_start, asked.l_len) == (3, 11);
                libc::_exit(i32::from(!seen));
            }
        }
        same("what a child sees", crate::process::ended(child), 0);
    })
}

fn description_lock(dir: &Path) -> Result<Check, Absent> {
    let (held, other) = (file(dir), file(dir));
    let lock = |f: &File| {
        let mut wanted = region(libc::F_WRLCK as i16);
        // SAFETY: the region is live.
        unsafe { libc::fcntl(f.as_raw_fd(), libc::F_OFD_SETLK, &raw mut wanted) }
    };
    must("F_OFD_SETLK", lock(&held));
    look(move || {
        same("the lock of another", lock(&other), -1);
        drop(held);
    })
}

fn lease(dir: &Path) -> Result<Check, Absent> {
    drop(file(dir));
    let held = io("open", File::open(dir.join("file")));
    // SAFETY: only numbers are passed.
    let r = unsafe { libc::fcntl(held.as_raw_fd(), libc::F_SETLEASE, libc::F_RDLCK) };
    offered("F_SETLEASE", r.into())?;
    // SAFETY: as above.
    let kept = move || unsafe { libc::fcntl(held.as_raw_fd(), libc::F_GETLEASE) };
    look(move || same("the lease", kept(), libc::F_RDLCK))
}

fn owner(_: &Path) -> Result<Check, Absent> {
    let mut ends = [0; 2];
    let me = std::process::id() as i32;
    // SAFETY: the array is live; the rest are numbers.
    let (reader, writer) = unsafe {
        must("pipe", libc::pipe2(ends.as_mut_ptr(), libc::O_NONBLOCK));
        must("F_SETOWN", libc::fcntl(ends[0], libc::F_SETOWN, me));
        must("F_SETSIG", libc::fcntl(ends[0], F_SETSIG, libc::SIGUSR2));
        let flags = libc::O_NONBLOCK | libc::O_ASYNC;
        must("O_ASYNC", libc::fcntl(ends[0], libc::F_SETFL, flags));
        (File::from_raw_fd(ends[0]), File::from_raw_fd(ends[1]))
    };
    look(move || {
        io("write", (&writer).write_all(b"!"));
        outlive_test_programs::await_signal(libc::SIGUSR2);
        drop(reader);
    })
}

fn owned_by_stranger(_: &Path) -> Result<Check, Absent> {
    let mut ends = [0; 2];
    // SAFETY: the array is live; the rest are numbers.
    let owner = unsafe {
        must("pipe", libc::pipe(ends.as_mut_ptr()));
        must(
            "F_SETOWN",
            libc::fcntl(ends[0], libc::F_SETOWN, libc::getppid()),
        );
        libc::getppid()
    };
    look(move || {
        // SAFETY: only numbers are passed.
        same(
            "the owner",
            unsafe { libc::fcntl(ends[0], libc::F_GETOWN) },
            owner,
        );
    })
}

fn directory(dir: &Path) -> Result<Check, Absent> {
    for n in 0..5 {
        io("create", File::create(dir.join(format!("entry-{n}"))));
    }
    let opened = io("open", File::open(dir));
    let mut buffer = [0u8; 64];
    // SAFETY: the buffer is live and as long as is said.
    let mut next = move || unsafe {
        let at = buffer.as_mut_ptr();
        libc::syscall(libc::SYS_getdents64, opened.as_raw_fd(), at, buffer.len())
    };
    must("getdents64", next());
    look(move || {
        let mut more = 0;
        while must("getdents64", next()) > 0 {
            more += 1;
        }
        if more == 0 {
            outlive_test_programs::fail("no entries are left");
        }
    })
}

fn directory_deleted(dir: &Path) -> Result<Check, Absent> {
    let path = dir.join("away");
    io("mkdir", std::fs::create_dir(&path));
    let opened = io("open", File::open(&path));
    io("rmdir", std::fs::remove_dir(&path));
    look(move || same("its links", io("stat", opened.metadata()).nlink(), 0))
}

fn dnotify(dir: &Path) -> Result<Check, Absent> {
    let opened = io("open", File::open(dir));
    let what = DN_CREATE_MULTISHOT;
    // SAFETY: only numbers are passed.
    unsafe {
        must(
            "F_SETSIG",
            libc::fcntl(opened.as_raw_fd(), F_SETSIG, libc::SIGUSR2),
        );
        offered(
            "F_NOTIFY",
            libc::fcntl(opened.as_raw_fd(), libc::F_NOTIFY, what).into(),
        )?;
    }
    let dir = dir.to_path_buf();
    look(move || {
        io("create", File::create(dir.join("new")));
        outlive_test_programs::await_signal(libc::SIGUSR2);
        drop(opened);
    })
}

fn symlink(dir: &Path) -> Result<Check, Absent> {
    let path = dir.join("link");
    io("symlink", std::os::unix::fs::symlink("file", &path));
    let path = c(&path);
    // SAFETY: the path is live.
    let fd = must("open", unsafe {
        libc::open(path.as_ptr(), libc::O_PATH | libc::O_NOFOLLOW)
    });
    look(move || {
        let link = io(
            "readlink",
            std::fs::read_link(format!("/proc/self/fd/{fd}")),
        );
        same(
            "its name",
            link.file_name().map(|n| n.as_bytes().to_vec()),
            Some(b"link".to_vec()),
        );
    })
}

fn fifo(dir: &Path) -> Result<Check, Absent> {
    let path = dir.join("fifo");
    // SAFETY: the path is live.
    must("mkfifo", unsafe { libc::mkfifo(c(&path).as_ptr(), 0o600) });
    let mut end = io("open", OpenOptions::new().read(true).write(true).open(path));
    io("write", end.write_all(TEXT));
    look(move || {
        let mut text = vec![0; TEXT.len()];
        io("read", end.read_exact(&mut text));
        same("the contents", &text[..], TEXT);
    })
}

fn kernel_file(path: &str, begin: &'static str) -> Result<Check, Absent> {
    let mut file = File::open(path).map_err(|e| Absent(format!("{path}: {e}")))?;
    look(move || {
        let mut text = String::new();
        io("read", file.read_to_string(&mut text));
        same("its beginning", text.starts_with(begin), true);
    })
}

fn own_memory(_: &Path) -> Result<Check, Absent> {
    static WORD: u64 = 0x0123_4567_89ab_cdef;
    let mem = io("open", File::open("/proc/self/mem"));
    look(move || {
        let mut word = [0; 8];
        io("read", mem.read_exact_at(&mut word, &raw const WORD as u64));
        same("the word", u64::from_ne_bytes(word), WORD);
    })
}

fn device(path: &'static str) -> Result<Check, Absent> {
    let mut options = OpenOptions::new();
    let file = options.read(true).custom_flags(libc::O_NONBLOCK).open(path);
    let file = file.map_err(|e| Absent(format!("{path}: {e}")))?;
    let before = io("stat", file.metadata()).rdev();
    look(move || same("the device", io("stat", file.metadata()).rdev(), before))
}

fn master() -> File {
    let mut options = OpenOptions::new();
    options
        .read(true)
        .write(true)
        .custom_flags(libc::O_NOCTTY | libc::O_NONBLOCK);
    let file = io("open", options.open("/dev/ptmx"));
    // SAFETY: only numbers are passed.
    must("unlockpt", unsafe { libc::unlockpt(file.as_raw_fd()) });
    file
}

fn number(master: &File) -> u32 {
    let mut number = 0u32;
    // SAFETY: the number is live.
    must("TIOCGPTN", unsafe {
        libc::ioctl(master.as_raw_fd(), libc::TIOCGPTN, &raw mut number)
    });
    number
}

fn terminal_master(_: &Path) -> Result<Check, Absent> {
    let master = master();
    let before = number(&master);
    look(move || same("its number", number(&master), before))
}

fn terminal_pair(_: &Path) -> Result<Check, Absent> {
    let mut first = master();
    let path = format!("/dev/pts/{}", number(&first));
    let mut options = OpenOptions::new();
    options
        .read(true)
        .write(true)
        .custom_flags(libc::O_NOCTTY | libc::O_NONBLOCK);
    let mut second = io("open", options.open(path));
    let size = libc::winsize {
        ws_row: 31,
        ws_col: 77,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    // SAFETY: the structure is live.
    must("TIOCSWINSZ", unsafe {
        libc::ioctl(first.as_raw_fd(), libc::TIOCSWINSZ, &raw const size)
    });
    look(move || {
        let mut now = libc::winsize {
            ws_row: 0,
            ws_col: 0,
            ws_xpixel: 0,
            ws_ypixel: 0,
        };
        // SAFETY: the structure is live.
        must("TIOCGWINSZ", unsafe {
            libc::ioctl(second.as_raw_fd(), libc::TIOCGWINSZ, &raw mut now)
        });
        same("the size", (now.ws_row, now.ws_col), (31, 77));
        io("write", first.write_all(b"line\n"));
        let mut line = [0; 5];
        io("read", second.read_exact(&mut line));
        same("the line", &line, b"line\n");
    })
}

fn memory_file_of(flags: libc::c_uint) -> Result<File, Absent> {
    // SAFETY: the name is a literal.
    let fd = offered(
        "memfd_create",
        unsafe { libc::memfd_create(c"m".as_ptr(), flags) }.into(),
    )?;
    // SAFETY: the descriptor is ours.
    Ok(unsafe { File::from_raw_fd(fd as i32) })
}

fn memory_file(_: &Path) -> Result<Check, Absent> {
    let mut file = memory_file_of(libc::MFD_CLOEXEC)?;
    io("write", file.write_all(TEXT));
    look(move || still(&file))
}

fn memory_file_sealed(_: &Path) -> Result<Check, Absent> {
    let mut file = memory_file_of(libc::MFD_ALLOW_SEALING)?;
    io("write", file.write_all(TEXT));
    let seals = libc::F_SEAL_WRITE | libc::F_SEAL_GROW;
    // SAFETY: only numbers are passed.
    must("F_ADD_SEALS", unsafe {
        libc::fcntl(file.as_raw_fd(), libc::F_ADD_SEALS, seals)
    });
    look(move || {
        still(&file);
        // SAFETY: only numbers are passed.
        let kept = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GET_SEALS) };
        same("the seals", kept, seals);
    })
}

fn memory_file_huge(_: &Path) -> Result<Check, Absent> {
    let file = memory_file_of(libc::MFD_HUGETLB)?;
    look(move || {
        same(
            "its block size",
            io("stat", file.metadata()).blksize(),
            2 << 20,
        )
    })
}

fn memory_file_secret(_: &Path) -> Result<Check, Absent> {
    // SAFETY: only numbers are passed.
    let fd = offered("memfd_secret", unsafe {
        libc::syscall(libc::SYS_memfd_secret, 0)
    })?;
    // SAFETY: the descriptor is ours.
    let file = unsafe { File::from_raw_fd(fd as i32) };
    look(move || same("its size", io("stat", file.metadata()).len(), 0))
}

fn mount_detached(dir: &Path) -> Result<Check, Absent> {
    const OPEN_TREE_CLONE: libc::c_uint = 1;
    let path = c(dir);
    // SAFETY: the path is live.
    let fd = unsafe {
        libc::syscall(
            libc::SYS_open_tree,
            libc::AT_FDCWD,
            path.as_ptr(),
            OPEN_TREE_CLONE,
        )
    };
    let fd = offered("open_tree", fd)? as i32;
    look(move || must_be_open(fd))
}

fn file_system_context(_: &Path) -> Result<Check, Absent> {
    // SAFETY: the name is a literal.
    let fd = offered("fsopen", unsafe {
        libc::syscall(libc::SYS_fsopen, c"tmpfs".as_ptr(), 0)
    })?;
    look(move || must_be_open(fd as i32))
}

/// Fails unless the descriptor is open: for kinds that can do nothing harmless.
pub(crate) fn must_be_open(fd: i32) {
    // SAFETY: only numbers are passed.
    must("F_GETFD", unsafe { libc::fcntl(fd, libc::F_GETFD) });
}
