//! Thin, safe, typed wrappers for the Linux interfaces that Outlive needs and that `rustix` does
//! not give.
//!
//! This is the only crate with raw system calls. `unsafe` is denied here too and opened file by
//! file, under a `# Safety` heading that says what the file relies on. Policy, and any knowledge
//! of what a program's state means, belongs to the crates above.

#[cfg(not(all(target_os = "linux", target_arch = "x86_64")))]
compile_error!("outlive runs on x86-64 Linux only");

pub mod area;
mod aside;
pub mod cachestat;
pub mod clock;
pub mod demand;
pub mod descriptors;
pub mod inherited;
pub mod inotify;
pub mod kcmp;
pub mod keys;
pub mod maps;
pub mod memory;
pub mod mounts;
pub mod pagemap;
pub mod pid_namespace;
pub mod private_root;
pub mod processor;
pub mod ptrace;
pub mod remote;
pub mod signals;
pub mod single;
pub mod sockopt;
pub mod soft_dirty;
pub mod spawn;
pub mod sysv;
pub mod tcp;
pub mod terminal;
pub mod thread;
pub mod userfault;
pub mod witness;

pub use rustix::io::Errno;

/// The error of the last failed C library call of this thread.
pub(crate) fn last_error() -> Errno {
    let raw = std::io::Error::last_os_error()
        .raw_os_error()
        .unwrap_or(libc::EIO);
    Errno::from_raw_os_error(raw)
}
