//! Names and remedies for what no kind claims.

use super::probe::Probe;
use crate::ProcessError;
use rustix::fs::FileType;
use rustix::net::{AddressFamily, SocketType};

/// Links of objects without a path: how the link begins, the usual name, what the user can do.
const ANONYMOUS: &[(&str, &str, &str)] = &[
    (
        "anon_inode:[fanotify]",
        "fanotify",
        "run the program without watching files",
    ),
    (
        "anon_inode:[io_uring]",
        "io_uring",
        "have the program use another I/O method",
    ),
    (
        "anon_inode:[userfaultfd]",
        "userfaultfd",
        "run the program without userfaultfd",
    ),
    (
        "anon_inode:bpf",
        "BPF object",
        "have the program close its BPF objects",
    ),
    (
        "anon_inode:btf",
        "BPF type information",
        "have the program close its BPF objects",
    ),
    (
        "anon_inode:[perf_event]",
        "perf event",
        "stop profiling first",
    ),
    (
        "anon_inode:kvm",
        "KVM virtual machine",
        "save the virtual machine with its own means",
    ),
    (
        "anon_inode:[seccomp",
        "seccomp listener",
        "end the seccomp supervision first",
    ),
    (
        "anon_inode:[landlock",
        "Landlock rules under construction",
        "try again in a moment",
    ),
    (
        "anon_inode:[fscontext]",
        "file system under construction",
        "try again in a moment",
    ),
    (
        "anon_inode:[timens",
        "time namespace",
        "have the program close it",
    ),
    (
        "anon_inode:sync_file",
        "GPU fence",
        "close the program's graphics context first",
    ),
    (
        "anon_inode:[vfio",
        "device passed through (VFIO)",
        "run the program without the device",
    ),
    (
        "anon_inode:iommufd",
        "I/O memory mapping",
        "run the program without the device",
    ),
    (
        "anon_inode:[liveupdate",
        "live update session",
        "finish the update first",
    ),
    (
        "/secretmem",
        "secret memory",
        "run the program without secret memory",
    ),
    (
        "/dmabuf:",
        "dma-buf",
        "close the program's graphics context first",
    ),
    ("mnt:[", "mount namespace", "have the program close it"),
    ("net:[", "network namespace", "have the program close it"),
    ("pid:[", "PID namespace", "have the program close it"),
    (
        "pid_for_children:[",
        "PID namespace",
        "have the program close it",
    ),
    ("user:[", "user namespace", "have the program close it"),
    ("uts:[", "UTS namespace", "have the program close it"),
    ("ipc:[", "IPC namespace", "have the program close it"),
    ("cgroup:[", "cgroup namespace", "have the program close it"),
    ("time:[", "time namespace", "have the program close it"),
];

/// Character devices with a name of their own.
const DEVICES: &[(u32, Option<u32>, &str, &str)] = &[
    (
        10,
        Some(200),
        "network tunnel (tun/tap)",
        "have the program close the tunnel",
    ),
    (
        10,
        Some(229),
        "FUSE connection",
        "unmount the file system that the program serves",
    ),
    (
        10,
        Some(232),
        "KVM",
        "save the virtual machine with its own means",
    ),
    (
        10,
        Some(237),
        "loop device control",
        "have the program close it",
    ),
    (13, None, "input device", "have the program close it"),
    (116, None, "sound device", "stop playing first"),
    (195, None, "GPU", "run the program without the GPU"),
    (226, None, "GPU", "run the program without the GPU"),
];

/// The refusal of a descriptor that no kind claims.
pub(crate) fn by_name(probe: &Probe<'_>) -> Result<ProcessError, ProcessError> {
    let link = probe.shown();
    if let Some(facts) = probe.socket()? {
        let (what, remedy) = socket(facts.family, facts.kind, facts.protocol);
        return Ok(probe.refuse(format!("{what} ({link})"), remedy));
    }
    if link.starts_with("socket:[") {
        return Ok(probe.refuse(format!("socket ({link})"), "have the program close it"));
    }
    if link.starts_with("pipe:[") {
        return Ok(probe.refuse(
            format!("pipe to another process ({link})"),
            "start both programs together, or have this one close it",
        ));
    }
    if let Some((_, what, remedy)) = ANONYMOUS.iter().find(|(start, ..)| link.starts_with(start)) {
        return Ok(probe.refuse(format!("{what} ({link})"), *remedy));
    }
    if !probe.has_path() {
        return Ok(probe.refuse(
            format!("object of an unknown kind ({link})"),
            "have it closed",
        ));
    }
    let (what, remedy) = by_type(probe)?;
    Ok(probe.refuse(format!("{what} ({link})"), remedy))
}

fn by_type(probe: &Probe<'_>) -> Result<(&'static str, &'static str), ProcessError> {
    let stat = probe.stat()?;
    Ok(match probe.file_type()? {
        FileType::Fifo => (
            "named pipe to another process",
            "start both programs together, or have this one close it",
        ),
        FileType::BlockDevice => ("block device", "have the program use a file"),
        FileType::Socket => (
            "path of a socket file (O_PATH)",
            "have the program close it",
        ),
        FileType::Symlink => (
            "path of a symbolic link (O_PATH)",
            "have the program close it",
        ),
        FileType::CharacterDevice => DEVICES
            .iter()
            .find(|(major, minor, ..)| {
                stat.stx_rdev_major == *major && minor.is_none_or(|m| m == stat.stx_rdev_minor)
            })
            .map_or(
                ("character device", "have the program close it"),
                |&(.., what, remedy)| (what, remedy),
            ),
        _ => ("file of an unknown kind", "have the program close it"),
    })
}

fn socket(family: AddressFamily, kind: SocketType, protocol: u32) -> (&'static str, &'static str) {
    const CLOSE: &str = "have the program close it";
    match (family, kind) {
        (AddressFamily::INET | AddressFamily::INET6, SocketType::DGRAM) => {
            ("IP datagram socket that is not UDP (ping, mostly)", CLOSE)
        }
        (AddressFamily::INET | AddressFamily::INET6, SocketType::RAW) => ("raw IP socket", CLOSE),
        (AddressFamily::INET | AddressFamily::INET6, _) if protocol == 262 => {
            ("multipath TCP socket", "run the program with plain TCP")
        }
        (AddressFamily::INET | AddressFamily::INET6, _) if protocol == 132 => {
            ("SCTP socket", "run the program without SCTP")
        }
        (AddressFamily::INET | AddressFamily::INET6, _) => {
            ("IP socket of an unknown protocol", CLOSE)
        }
        (AddressFamily::UNIX, _) => ("bound unix socket that does not listen", CLOSE),
        (AddressFamily::NETLINK, _) => ("netlink socket", CLOSE),
        (AddressFamily::PACKET, _) => ("packet socket", "stop capturing packets first"),
        (AddressFamily::VSOCK, _) => ("VM socket (vsock)", CLOSE),
        (AddressFamily::BLUETOOTH, _) => ("Bluetooth socket", CLOSE),
        (AddressFamily::CAN, _) => ("CAN socket", CLOSE),
        (AddressFamily::XDP, _) => ("XDP socket", CLOSE),
        (family, _) if family.as_raw() == libc::AF_ALG as u16 => ("kernel crypto socket", CLOSE),
        (family, _) if family.as_raw() == libc::AF_TIPC as u16 => ("TIPC socket", CLOSE),
        _ => ("socket of an unknown family", CLOSE),
    }
}
