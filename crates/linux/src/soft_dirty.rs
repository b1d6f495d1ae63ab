//! Soft-dirty bits: the kernel's older way to say which pages were written (kernel documentation
//! `admin-guide/mm/soft-dirty.rst`), where it was built with `CONFIG_MEM_SOFT_DIRTY`.
//!
//! All bits of a process are cleared at once, by a write to `/proc/PID/clear_refs`; a bit is set
//! when a page is written, moved or made anew. Reading and clearing are two steps: what is written
//! in between by a program that runs is lost to who reads first.

use crate::Errno;
use crate::pagemap::{Pagemap, Query, SOFT_DIRTY};
use rustix::fs::{Mode, OFlags, open};

/// Clears the bits of all pages of a process.
///
/// # Errors
/// [`Errno::ACCESS`] where it belongs to another user.
pub fn clear(pid: u32) -> Result<(), Errno> {
    let path = format!("/proc/{pid}/clear_refs");
    let file = open(path, OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty())?;
    rustix::io::write(&file, b"4").map(drop)
}

/// Whether this kernel has them: a page that we have just written must carry the bit.
#[must_use]
pub fn is_there() -> bool {
    let page = vec![1u8; 2 * PAGE as usize];
    let at = std::hint::black_box(page.as_ptr() as u64).next_multiple_of(PAGE);
    let query = Query {
        all_of: SOFT_DIRTY,
        ..Query::default()
    };
    let mut found = false;
    let asked = Pagemap::open(std::process::id())
        .and_then(|map| map.entries(at, at + PAGE, query, |_| found = true));
    asked.is_ok() && found
}

const PAGE: u64 = 4096;

#[cfg(test)]
mod tests {
    use super::*;

    /// What the kernel was built with, where it says so.
    fn configured() -> Option<bool> {
        let config = std::process::Command::new("zcat")
            .arg("/proc/config.gz")
            .output()
            .ok()
            .filter(|o| o.status.success())?;
        let text = String::from_utf8_lossy(&config.stdout).into_owned();
        Some(text.lines().any(|l| l == "CONFIG_MEM_SOFT_DIRTY=y"))
    }

    #[test]
    fn the_probe_agrees_with_the_configuration_of_the_kernel() {
        let expected = configured().expect("this kernel does not show its configuration");
        assert_eq!(is_there(), expected);
    }
}
