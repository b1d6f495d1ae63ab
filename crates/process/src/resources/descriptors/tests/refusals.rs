//! What is refused, by its usual name.

use super::*;
use rustix::fs::{MemfdFlags, Mode, OFlags};
use rustix::net::{AddressFamily, SocketType, socket};
use std::fs::File;

fn assert_refused(fd: &impl AsRawFd, name: &str) {
    let refusals = refused(&[number(fd)]);
    assert_eq!(refusals.len(), 1);
    let refusal = &refusals[0];
    assert!(refusal.what.starts_with(name), "{name}: {refusal}");
    assert_eq!(refusal.place, format!("fd {}", fd.as_raw_fd()));
    assert!(!refusal.remedy.is_empty());
}

/// Says that something could not be tried here, so that it is not passed over silently.
fn skip(what: &str, why: impl std::fmt::Display) {
    println!("skipped: {what}: {why}");
}

#[test]
fn objects_without_a_path() {
    match rustix::fs::memfd_create("x", MemfdFlags::CLOEXEC | MemfdFlags::HUGETLB) {
        Ok(memory) => assert_refused(&memory, "memory of a special kind"),
        Err(e) => skip("memfd on huge pages", e),
    }
    let pidfd = pidfd_open(Pid::INIT, PidfdFlags::empty()).unwrap();
    assert_refused(&pidfd, "pidfd");
    let (r, _w) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).unwrap();
    assert_refused(&r, "pipe to another process");
    let dir = tempfile::tempdir().unwrap();
    let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
    match rustix::fs::open(dir.path(), flags, Mode::RUSR) {
        Ok(file) => {
            // Given a name again: what the link says is no more.
            let link = format!("/proc/self/fd/{}", file.as_raw_fd());
            let (here, follow) = (rustix::fs::CWD, rustix::fs::AtFlags::SYMLINK_FOLLOW);
            rustix::fs::linkat(here, link, here, dir.path().join("name"), follow).unwrap();
            assert_refused(&file, "deleted file");
        }
        Err(e) => skip("O_TMPFILE", e),
    }
    for (link, name) in [
        ("net", "network namespace"),
        ("mnt", "mount namespace"),
        ("uts", "UTS namespace"),
        ("user", "user namespace"),
        ("pid", "PID namespace"),
    ] {
        assert_refused(&File::open(format!("/proc/self/ns/{link}")).unwrap(), name);
    }
}

#[test]
fn sockets_that_are_not_saved() {
    let cases = [
        (
            AddressFamily::INET,
            SocketType::DGRAM,
            Some(rustix::net::ipproto::ICMP),
            "IP datagram socket that is not UDP",
        ),
        (
            AddressFamily::NETLINK,
            SocketType::RAW,
            None,
            "netlink socket",
        ),
        (
            AddressFamily::PACKET,
            SocketType::DGRAM,
            None,
            "packet socket",
        ),
        (
            AddressFamily::INET,
            SocketType::RAW,
            Some(rustix::net::ipproto::ICMP),
            "raw IP socket",
        ),
        (AddressFamily::VSOCK, SocketType::STREAM, None, "VM socket"),
        (
            AddressFamily::INET,
            SocketType::STREAM,
            Some(rustix::net::ipproto::MPTCP),
            "multipath",
        ),
        (
            AddressFamily::from_raw(libc::AF_ALG as u16),
            SocketType::SEQPACKET,
            None,
            "kernel crypto",
        ),
    ];
    for (family, kind, protocol, name) in cases {
        match socket(family, kind, protocol) {
            Ok(fd) => assert_refused(&fd, name),
            Err(e) => skip(name, e),
        }
    }
}

#[test]
fn files_that_are_not_saved() {
    let dir = tempfile::tempdir().unwrap();
    let fifo = dir.path().join("fifo");
    rustix::fs::mkfifoat(rustix::fs::CWD, &fifo, Mode::RUSR | Mode::WUSR).unwrap();
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let fd = rustix::fs::open(&fifo, flags, Mode::empty()).unwrap();
    assert_refused(&fd, "named pipe");
    let path = dir.path().join("file");
    std::fs::write(&path, b"abc").unwrap();
    let file = File::options().write(true).open(&path).unwrap();
    std::fs::remove_file(&path).unwrap();
    rustix::fs::ftruncate(&file, (256 << 20) + 1).unwrap();
    assert_refused(&file, "a deleted file of more than 256 MiB");
    let link = dir.path().join("link");
    std::os::unix::fs::symlink("nowhere", &link).unwrap();
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let fd = rustix::fs::open(&link, flags, Mode::empty()).unwrap();
    assert_refused(&fd, "path of a symbolic link");
    assert_refused(
        &File::open("/proc/self/maps").unwrap(),
        "file about a process",
    );
    std::fs::remove_dir_all(dir.path()).unwrap();
    let gone = tempfile::tempdir().unwrap();
    let fd = File::open(gone.path()).unwrap();
    gone.close().unwrap();
    assert_refused(&fd, "deleted file");
}

#[test]
fn devices_that_are_not_saved() {
    for (path, name) in [
        ("/dev/net/tun", "network tunnel"),
        ("/dev/fuse", "FUSE connection"),
        ("/dev/kvm", "KVM"),
        ("/dev/loop-control", "loop device control"),
        ("/dev/kmsg", "character device"),
        ("/dev/loop0", "block device"),
    ] {
        let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
        match rustix::fs::open(path, flags, Mode::empty()) {
            Ok(fd) => assert_refused(&fd, name),
            Err(e) => skip(path, e),
        }
    }
}

#[test]
fn all_refusals_are_found_at_once() {
    let a = File::open("/proc/self/ns/net").unwrap();
    let b = pidfd_open(Pid::INIT, PidfdFlags::empty()).unwrap();
    let c = File::open("/dev/null").unwrap();
    assert_eq!(refused(&[number(&a), number(&b), number(&c)]).len(), 2);
}
