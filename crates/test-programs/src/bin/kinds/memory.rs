//! Memory: mappings of every sort, and what was advised about them.

use crate::{Absent, Check, Kind, look, must, offered, same};
use std::fs::OpenOptions;
use std::os::fd::AsRawFd;
use std::path::Path;

pub(crate) const KINDS: &[Kind] = &[
    ("anonymous", |_| filled(libc::MAP_PRIVATE, None)),
    ("anonymous-no-reserve", |_| {
        filled(libc::MAP_PRIVATE | libc::MAP_NORESERVE, None)
    }),
    ("anonymous-shared", |_| filled(libc::MAP_SHARED, None)),
    ("growing-down", |_| {
        filled(libc::MAP_PRIVATE | libc::MAP_GROWSDOWN, None)
    }),
    ("droppable", droppable),
    ("huge-pages", |_| {
        filled_of(2 << 20, libc::MAP_PRIVATE | libc::MAP_HUGETLB, None)
    }),
    ("huge-pages-transparent", transparent),
    ("no-access-with-contents", |_| guarded_by(libc::PROT_NONE)),
    ("read-only-with-contents", |_| guarded_by(libc::PROT_READ)),
    ("executable-anonymous", executable),
    ("break-moved", break_moved),
    ("file-private-changed", |d| {
        of_file(d, libc::MAP_PRIVATE, false)
    }),
    ("file-shared-changed", |d| {
        of_file(d, libc::MAP_SHARED, false)
    }),
    ("file-deleted-private", |d| {
        of_file(d, libc::MAP_PRIVATE, true)
    }),
    ("file-deleted-shared", |d| {
        of_file(d, libc::MAP_SHARED, true)
    }),
    ("memory-file-shared", memory_file),
    ("memory-file-shared-closed", memory_file_closed),
    ("secret-memory", secret),
    ("device-zero-shared", |_| of_zero(libc::MAP_SHARED)),
    ("device-zero-private", |_| of_zero(libc::MAP_PRIVATE)),
    ("locked", locked),
    ("locked-on-fault", |_| locked_with(1)),
    ("locked-future", locked_future),
    ("advised-no-fork", |_| advised(libc::MADV_DONTFORK, "dc")),
    ("advised-no-dump", |_| advised(libc::MADV_DONTDUMP, "dd")),
    ("advised-wipe-on-fork", |_| {
        advised(libc::MADV_WIPEONFORK, "wf")
    }),
    ("advised-sequential", |_| {
        advised(libc::MADV_SEQUENTIAL, "sr")
    }),
    ("advised-random", |_| advised(libc::MADV_RANDOM, "rr")),
    ("advised-huge-pages", |_| advised(libc::MADV_HUGEPAGE, "hg")),
    ("advised-no-huge-pages", |_| {
        advised(libc::MADV_NOHUGEPAGE, "nh")
    }),
    ("advised-mergeable", |_| advised(libc::MADV_MERGEABLE, "mg")),
    ("guard-pages", guard),
    ("sealed", sealed),
    ("named", named),
    ("policy-of-range", policy_of_range),
    ("policy-of-thread", policy_of_thread),
    ("protection-key", protection_key),
    ("protection-key-unused", protection_key_unused),
    ("userfault-registered", userfault_registered),
    ("ring-of-packets", ring_of_packets),
    ("ring-of-io", ring_of_io),
    ("ring-of-samples", ring_of_samples),
    ("moved", moved),
    ("hole-in-the-middle", hole),
];

const PAGE: usize = 4096;
const SIZE: usize = 8 * PAGE;

/// Maps; the mapping stays until the program ends.
fn map(size: usize, flags: i32, fd: i32) -> Result<*mut u8, Absent> {
    let flags = if fd < 0 {
        flags | libc::MAP_ANONYMOUS
    } else {
        flags
    };
    let access = libc::PROT_READ | libc::PROT_WRITE;
    // SAFETY: a new mapping replaces nothing.
    let at = unsafe { libc::mmap(std::ptr::null_mut(), size, access, flags, fd, 0) };
    offered("mmap", at as i64)?;
    Ok(at.cast())
}

fn pattern(i: usize) -> u8 {
    (outlive_test_programs::mix(i as u64) & 0xff) as u8
}

fn fill(at: *mut u8, size: usize) {
    // SAFETY: the callers pass mappings of that length.
    let bytes = unsafe { std::slice::from_raw_parts_mut(at, size) };
    bytes
        .iter_mut()
        .enumerate()
        .for_each(|(i, b)| *b = pattern(i));
}

fn must_be_filled(at: *const u8, size: usize) {
    // SAFETY: as above.
    let bytes = unsafe { std::slice::from_raw_parts(at, size) };
    let wrong = bytes.iter().enumerate().find(|(i, b)| **b != pattern(*i));
    same("a byte that differs", wrong, None);
}

fn filled(flags: i32, advice: Option<i32>) -> Result<Check, Absent> {
    filled_of(SIZE, flags, advice)
}

fn filled_of(size: usize, flags: i32, advice: Option<i32>) -> Result<Check, Absent> {
    let at = map(size, flags, -1)?;
    if let Some(advice) = advice {
        offered(
            "madvise",
            // SAFETY: the mapping is ours.
            unsafe { libc::madvise(at.cast(), size, advice) }.into(),
        )?;
    }
    fill(at, size);
    look(move || must_be_filled(at, size))
}

fn droppable(_: &Path) -> Result<Check, Absent> {
    const MAP_DROPPABLE: i32 = 8;
    let at = map(SIZE, MAP_DROPPABLE, -1)?;
    fill(at, PAGE);
    let before = codes(at);
    look(move || same("its flags", codes(at), before))
}

fn transparent(_: &Path) -> Result<Check, Absent> {
    let size = 4 << 20;
    let at = map(size, libc::MAP_PRIVATE, -1)?;
    offered(
        "madvise",
        // SAFETY: the mapping is ours.
        unsafe { libc::madvise(at.cast(), size, libc::MADV_HUGEPAGE) }.into(),
    )?;
    fill(at, size);
    look(move || must_be_filled(at, size))
}

fn protect(at: *mut u8, size: usize, access: i32) {
    // SAFETY: the mapping is ours.
    must("mprotect", unsafe {
        libc::mprotect(at.cast(), size, access)
    });
}

fn guarded_by(access: i32) -> Result<Check, Absent> {
    let at = map(SIZE, libc::MAP_PRIVATE, -1)?;
    fill(at, SIZE);
    protect(at, SIZE, access);
    look(move || {
        protect(at, SIZE, libc::PROT_READ);
        must_be_filled(at, SIZE);
    })
}

fn executable(_: &Path) -> Result<Check, Absent> {
    let at = map(PAGE, libc::MAP_PRIVATE, -1)?;
    // mov eax, 1234; ret
    let code = [0xb8u8, 0xd2, 0x04, 0, 0, 0xc3];
    // SAFETY: the code fits, and is a function without arguments that changes eax only.
    unsafe { at.copy_from_nonoverlapping(code.as_ptr(), code.len()) };
    protect(at, PAGE, libc::PROT_READ | libc::PROT_EXEC);
    look(move || {
        // SAFETY: as above.
        let function: extern "C" fn() -> i32 = unsafe { std::mem::transmute(at) };
        same("its answer", function(), 1234);
    })
}

fn break_moved(_: &Path) -> Result<Check, Absent> {
    // SAFETY: the allocator of this program does not use the break below this call's memory.
    let at = unsafe { libc::sbrk(SIZE as isize) }.cast::<u8>();
    fill(at, SIZE);
    look(move || {
        must_be_filled(at, SIZE);
        // SAFETY: only a number is passed.
        same(
            "the break",
            unsafe { libc::sbrk(0) }.cast::<u8>() >= at.wrapping_add(SIZE),
            true,
        );
    })
}

fn of_file(dir: &Path, flags: i32, deleted: bool) -> Result<Check, Absent> {
    let path = dir.join("mapped");
    let mut options = OpenOptions::new();
    let file = options
        .read(true)
        .write(true)
        .create(true)
        .truncate(true)
        .open(&path);
    let file = file.map_err(|e| Absent(e.to_string()))?;
    file.set_len(SIZE as u64)
        .map_err(|e| Absent(e.to_string()))?;
    let at = map(SIZE, flags, file.as_raw_fd())?;
    fill(at, SIZE);
    if deleted {
        std::fs::remove_file(&path).map_err(|e| Absent(e.to_string()))?;
    }
    look(move || must_be_filled(at, SIZE))
}

fn memfd() -> Result<i32, Absent> {
    // SAFETY: the name is a literal; the rest are numbers.
    unsafe {
        let fd = offered("memfd_create", libc::memfd_create(c"m".as_ptr(), 0).into())? as i32;
        must("ftruncate", libc::ftruncate(fd, SIZE as i64));
        Ok(fd)
    }
}

fn memory_file(_: &Path) -> Result<Check, Absent> {
    let fd = memfd()?;
    let at = map(SIZE, libc::MAP_SHARED, fd)?;
    fill(at, SIZE);
    look(move || {
        must_be_filled(at, SIZE);
        // What is written through the descriptor is seen in the mapping.
        // SAFETY: the byte is live, and the mapping as long as the file.
        unsafe {
            must(
                "pwrite",
                libc::pwrite(fd, [7u8].as_ptr().cast(), 1, 5000) as i64,
            );
            same("the byte", at.add(5000).read_volatile(), 7);
        }
    })
}

fn memory_file_closed(_: &Path) -> Result<Check, Absent> {
    let fd = memfd()?;
    let (one, two) = (
        map(SIZE, libc::MAP_SHARED, fd)?,
        map(SIZE, libc::MAP_SHARED, fd)?,
    );
    // SAFETY: only numbers are passed; the number is not used again.
    must("close", unsafe { libc::close(fd) });
    fill(one, SIZE);
    look(move || {
        must_be_filled(two, SIZE);
        // SAFETY: both mappings are that long.
        unsafe {
            one.add(9).write_volatile(0);
            same("that they are one", two.add(9).read_volatile(), 0);
        }
    })
}

fn secret(_: &Path) -> Result<Check, Absent> {
    // SAFETY: only numbers are passed.
    let fd = unsafe { libc::syscall(libc::SYS_memfd_secret, 0) };
    let fd = offered("memfd_secret", fd)? as i32;
    // SAFETY: as above.
    must("ftruncate", unsafe { libc::ftruncate(fd, SIZE as i64) });
    let at = map(SIZE, libc::MAP_SHARED, fd)?;
    fill(at, SIZE);
    // SAFETY: only numbers are passed; the number is not used again.
    must("close", unsafe { libc::close(fd) });
    look(move || must_be_filled(at, SIZE))
}

fn of_zero(flags: i32) -> Result<Check, Absent> {
    let mut options = OpenOptions::new();
    let file = options.read(true).write(true).open("/dev/zero");
    let file = file.map_err(|e| Absent(e.to_string()))?;
    let at = map(SIZE, flags, file.as_raw_fd())?;
    fill(at, SIZE);
    look(move || must_be_filled(at, SIZE))
}

/// The `VmFlags` of the mapping that holds an address.
fn codes(at: *const u8) -> Vec<String> {
    let text = std::fs::read_to_string("/proc/self/smaps").unwrap_or_default();
    let mut here = false;
    for line in text.lines() {
        let range = line.split(' ').next().and_then(|r| r.split_once('-'));
        let hex = |t: &str| usize::from_str_radix(t, 16).ok();
        if let Some((start, end)) = range.and_then(|(a, b)| Some((hex(a)?, hex(b)?))) {
            here = (start..end).contains(&(at as usize));
        } else if here && let Some(codes) = line.strip_prefix("VmFlags:") {
            // Registered for tracking is not the program's own doing; guards are looked at apart.
            let kept = codes
                .split_whitespace()
                .filter(|c| !["uw", "ac", "gu"].contains(c));
            return kept.map(str::to_owned).collect();
        }
    }
    Vec::new()
}

fn has(at: *const u8, code: &str) -> bool {
    codes(at).iter().any(|c| c == code)
}

fn advised(advice: i32, code: &'static str) -> Result<Check, Absent> {
    let at = map(SIZE, libc::MAP_PRIVATE, -1)?;
    offered(
        "madvise",
        // SAFETY: the mapping is ours.
        unsafe { libc::madvise(at.cast(), SIZE, advice) }.into(),
    )?;
    fill(at, SIZE);
    if !has(at, code) {
        return Err(Absent(format!("the kernel does not show {code}")));
    }
    look(move || {
        must_be_filled(at, SIZE);
        same("what was advised", has(at, code), true);
    })
}

fn locked(_: &Path) -> Result<Check, Absent> {
    locked_with(0)
}

fn locked_with(flags: i32) -> Result<Check, Absent> {
    let at = map(SIZE, libc::MAP_PRIVATE, -1)?;
    // SAFETY: the mapping is ours.
    let r = unsafe { libc::syscall(libc::SYS_mlock2, at, SIZE, flags) };
    offered("mlock2", r)?;
    fill(at, SIZE);
    let before = codes(at);
    look(move || {
        must_be_filled(at, SIZE);
        same("its flags", codes(at), before);
    })
}

fn locked_future(_: &Path) -> Result<Check, Absent> {
    offered(
        "mlockall",
        // SAFETY: only a number is passed.
        unsafe { libc::mlockall(libc::MCL_FUTURE) }.into(),
    )?;
    look(move || {
        let Ok(at) = map(SIZE, libc::MAP_PRIVATE, -1) else {
            outlive_test_programs::fail("no memory")
        };
        same("that new memory is locked", has(at, "lo"), true);
    })
}

fn guard(_: &Path) -> Result<Check, Absent> {
    const MADV_GUARD_INSTALL: i32 = 102;
    let at = map(SIZE, libc::MAP_PRIVATE, -1)?;
    fill(at, SIZE);
    // SAFETY: the pages are ours.
    unsafe {
        let r = libc::madvise(at.add(3 * PAGE).cast(), PAGE, MADV_GUARD_INSTALL);
        offered("MADV_GUARD_INSTALL", r.into())?;
    }
    look(move || {
        must_be_filled(at, 3 * PAGE);
        let null = OpenOptions::new().write(true).open("/dev/zero");
        let Ok(null) = null else { return };
        let mut ends = [0; 2];
        // Whether a page can be read is asked of a call, which answers instead of dying.
        // SAFETY: the array is live; the call checks the address.
        let r = unsafe {
            must("pipe", libc::pipe(ends.as_mut_ptr()));
            libc::write(ends[1], at.add(3 * PAGE).cast(), 8)
        };
        same("reading the guard", r, -1);
        drop(null);
    })
}

fn sealed(_: &Path) -> Result<Check, Absent> {
    const SYS_MSEAL: i64 = 462;
    let at = map(SIZE, libc::MAP_PRIVATE, -1)?;
    fill(at, SIZE);
    // SAFETY: the mapping is ours, and stays as it is.
    offered("mseal", unsafe { libc::syscall(SYS_MSEAL, at, SIZE, 0) })?;
    look(move || {
        must_be_filled(at, SIZE);
        // SAFETY: this must fail.
        same(
            "taking it away",
            unsafe { libc::munmap(at.cast(), SIZE) },
            -1,
        );
    })
}

fn named(_: &Path) -> Result<Check, Absent> {
    const PR_SET_VMA: i32 = 0x5356_4d41;
    let at = map(SIZE, libc::MAP_PRIVATE, -1)?;
    fill(at, SIZE);
    // SAFETY: the name is a literal, the mapping ours.
    let r = unsafe { libc::prctl(PR_SET_VMA, 0, at, SIZE, c"a name of mine".as_ptr()) };
    offered("PR_SET_VMA_ANON_NAME", r.into())?;
    look(move || {
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap_or_default();
        same("its name", maps.contains("[anon:a name of mine]"), true);
    })
}

fn policy(at: Option<*mut u8>) -> i32 {
    let mut mode = 0;
    let (address, flags) = at.map_or((std::ptr::null_mut(), 0), |a| (a, 2));
    let none = std::ptr::null_mut::<u64>();
    // SAFETY: the mode is live.
    let r = unsafe {
        libc::syscall(
            libc::SYS_get_mempolicy,
            &raw mut mode,
            none,
            0,
            address,
            flags,
        )
    };
    must("get_mempolicy", r);
    mode
}

/// Preferred node 0 (`MPOL_PREFERRED`).
const PREFERRED: i32 = 1;

fn policy_of_range(_: &Path) -> Result<Check, Absent> {
    let at = map(SIZE, libc::MAP_PRIVATE, -1)?;
    let nodes = 1u64;
    // SAFETY: the set of nodes is live, the mapping ours.
    let r = unsafe {
        libc::syscall(
            libc::SYS_mbind,
            at,
            SIZE,
            PREFERRED,
            &raw const nodes,
            64,
            0,
        )
    };
    offered("mbind", r)?;
    fill(at, SIZE);
    look(move || same("its policy", policy(Some(at)), PREFERRED))
}

fn policy_of_thread(_: &Path) -> Result<Check, Absent> {
    let nodes = 1u64;
    // SAFETY: the set of nodes is live.
    let r = unsafe { libc::syscall(libc::SYS_set_mempolicy, PREFERRED, &raw const nodes, 64) };
    offered("set_mempolicy", r)?;
    look(move || same("its policy", policy(None), PREFERRED))
}

fn protection_key(_: &Path) -> Result<Check, Absent> {
    // SAFETY: only numbers are passed.
    let key = offered("pkey_alloc", unsafe {
        libc::syscall(libc::SYS_pkey_alloc, 0, 0)
    })?;
    let at = map(SIZE, libc::MAP_PRIVATE, -1)?;
    fill(at, SIZE);
    let access = libc::PROT_READ | libc::PROT_WRITE;
    // SAFETY: the mapping is ours.
    must("pkey_mprotect", unsafe {
        libc::syscall(libc::SYS_pkey_mprotect, at, SIZE, access, key)
    });
    let before = codes(at);
    look(move || {
        must_be_filled(at, SIZE);
        same("its flags", codes(at), before);
        // SAFETY: only a number is passed: a key in use can be given back.
        must("pkey_free", unsafe {
            libc::syscall(libc::SYS_pkey_free, key)
        });
    })
}

fn protection_key_unused(_: &Path) -> Result<Check, Absent> {
    // SAFETY: only numbers are passed.
    let key = offered("pkey_alloc", unsafe {
        libc::syscall(libc::SYS_pkey_alloc, 0, 0)
    })?;
    look(move || {
        // SAFETY: as above.
        let freed = unsafe { libc::syscall(libc::SYS_pkey_free, key) };
        must("pkey_free", freed);
    })
}

fn userfault_registered(_: &Path) -> Result<Check, Absent> {
    const UFFDIO_API: u64 = 0xc018_aa3f;
    const UFFDIO_REGISTER: u64 = 0xc020_aa00;
    let at = map(SIZE, libc::MAP_PRIVATE, -1)?;
    fill(at, SIZE);
    // SAFETY: the structures are live and of the sizes that the request numbers tell.
    unsafe {
        let fd = libc::syscall(libc::SYS_userfaultfd, libc::O_NONBLOCK | 1);
        let fd = offered("userfaultfd", fd)? as i32;
        let mut api = [0xaau64, 0, 0];
        must("UFFDIO_API", libc::ioctl(fd, UFFDIO_API, api.as_mut_ptr()));
        let mut register = [at as u64, SIZE as u64, 1, 0];
        must(
            "UFFDIO_REGISTER",
            libc::ioctl(fd, UFFDIO_REGISTER, register.as_mut_ptr()),
        );
    }
    look(move || {
        must_be_filled(at, SIZE);
        same("that it is registered", has(at, "um"), true);
    })
}

fn ring_of_packets(_: &Path) -> Result<Check, Absent> {
    const PACKET_RX_RING: i32 = 5;
    // SAFETY: the request is live.
    unsafe {
        let fd = libc::socket(libc::AF_PACKET, libc::SOCK_RAW, 0);
        let fd = offered("AF_PACKET", fd.into())? as i32;
        let request = [SIZE as u32, 1, 2048, SIZE as u32 / 2048];
        let r = libc::setsockopt(
            fd,
            libc::SOL_PACKET,
            PACKET_RX_RING,
            request.as_ptr().cast(),
            16,
        );
        offered("PACKET_RX_RING", r.into())?;
        let at = map(SIZE, libc::MAP_SHARED, fd)?;
        look(move || same("that it can be read", at.read_volatile(), 0))
    }
}

fn ring_of_io(_: &Path) -> Result<Check, Absent> {
    let mut parameters = [0u32; 30];
    // SAFETY: the structure has 120 bytes; only numbers otherwise.
    unsafe {
        let fd = libc::syscall(libc::SYS_io_uring_setup, 4, parameters.as_mut_ptr());
        let fd = offered("io_uring_setup", fd)? as i32;
        let at = map(PAGE, libc::MAP_SHARED, fd)?;
        must("close", libc::close(fd));
        look(move || {
            let _ = at.read_volatile();
        })
    }
}

fn ring_of_samples(_: &Path) -> Result<Check, Absent> {
    let mut attributes = [0u32; 32];
    (attributes[0], attributes[1], attributes[2]) = (1, 128, 1);
    // SAFETY: the structure has 128 bytes, as it says.
    unsafe {
        let fd = libc::syscall(libc::SYS_perf_event_open, attributes.as_ptr(), 0, -1, -1, 0);
        let fd = offered("perf_event_open", fd)? as i32;
        let at = map(2 * PAGE, libc::MAP_SHARED, fd)?;
        must("close", libc::close(fd));
        look(move || {
            let _ = at.read_volatile();
        })
    }
}

fn moved(_: &Path) -> Result<Check, Absent> {
    let (from, to) = (
        map(SIZE, libc::MAP_PRIVATE, -1)?,
        map(SIZE, libc::MAP_PRIVATE, -1)?,
    );
    fill(from, SIZE);
    let how = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
    // SAFETY: both mappings are ours; the first is not used again.
    let at = unsafe { libc::mremap(from.cast(), SIZE, SIZE, how, to) }.cast::<u8>();
    must("mremap", at as i64);
    look(move || must_be_filled(at, SIZE))
}

fn hole(_: &Path) -> Result<Check, Absent> {
    let at = map(SIZE, libc::MAP_PRIVATE, -1)?;
    fill(at, SIZE);
    // SAFETY: the pages are ours and are not used again.
    unsafe {
        must("munmap", libc::munmap(at.add(2 * PAGE).cast(), PAGE));
        must(
            "madvise",
            libc::madvise(at.add(5 * PAGE).cast(), PAGE, libc::MADV_DONTNEED),
        );
    }
    look(move || {
        must_be_filled(at, 2 * PAGE);
        // SAFETY: the page is ours.
        same(
            "what was given back",
            unsafe { at.add(5 * PAGE).read_volatile() },
            0,
        );
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap_or_default();
        same(
            "the hole",
            maps.contains(&format!("{:x}-", at as usize + 2 * PAGE)),
            false,
        );
    })
}
