//! Large areas are filled with pages that the kernel does not clear before.
//!
//! Whoever writes to new memory has the kernel clear each page first, only to overwrite it: 40 % of the
//! processor time of a restore of 1 GiB. A page that is handed over by `UFFDIO_COPY` is not cleared.
//!
//! # Rules
//! - Only private anonymous memory that has no pages yet; not where the kernel would make huge pages,
//!   which are worth more.
//! - Only to be faster: where it cannot be had, the pages are written.
//! - The process does nothing in these areas meanwhile: it would wait for ever.

use super::lazy::held;
use super::space::Runs;
use super::stub::{Stub, step};
use crate::ProcessError;
use crate::bootstrap;
use crate::resources::memory::{AreaKind, MemoryState};
use outlive_linux::Errno;
use outlive_linux::demand::{FLAGS, PageServer};
use outlive_linux::maps::VmFlags;

/// Bytes of an area from which it is worth while.
const WORTH: u64 = 1 << 20;
/// In which memory the kernel makes huge pages unasked.
const HUGE_PAGES: &str = "/sys/kernel/mm/transparent_hugepage/enabled";

/// Fills areas of one process.
#[derive(Debug)]
pub struct Filler {
    server: PageServer,
    /// Its number in the process.
    number: u64,
    areas: Vec<(u64, u64)>,
}

/// The areas of which the epoch holds much, in order.
pub fn choose(state: &MemoryState, runs: &Runs) -> Vec<(u64, u64)> {
    let huge = std::fs::read_to_string(HUGE_PAGES).is_ok_and(|all| all.contains("[always]"));
    let plain = state.areas.iter().filter(|area| {
        let flags = area.vm_flags();
        let small_pages = !flags.has(VmFlags::HUGEPAGE) && !huge;
        area.kind == AreaKind::Anonymous && small_pages && !flags.has(VmFlags::GROWS_DOWN)
    });
    let large = plain.filter(|area| held(area, runs) >= WORTH);
    large.map(|area| (area.start, area.end)).collect()
}

impl Filler {
    /// `None` where there is nothing to fill, or it cannot be had.
    pub fn begin(stub: &mut Stub, areas: Vec<(u64, u64)>) -> Result<Option<Self>, ProcessError> {
        if areas.is_empty() {
            return Ok(None);
        }
        let (target, arena) = (&stub.target, &stub.arena);
        let made = bootstrap::make_userfault(target, &mut stub.threads[0], arena, FLAGS)?;
        let Ok((fd, number)) = made else {
            return Ok(None);
        };
        let server = PageServer::new(fd).and_then(|server| {
            let mut all = areas.iter();
            all.try_for_each(|&(start, end)| server.register(start, end))?;
            Ok(server)
        });
        match server {
            Ok(server) => Ok(Some(Self {
                server,
                number,
                areas,
            })),
            // Closed, it has nothing registered.
            Err(_) => close(stub, number).map(|()| None),
        }
    }

    /// Fills from `at` on, within one area; returns how many bytes of it are still to be written.
    pub fn fill(&self, mut at: u64, mut bytes: &[u8]) -> usize {
        let first = self.areas.partition_point(|area| area.1 <= at);
        if self.areas.get(first).is_none_or(|area| area.0 > at) {
            return bytes.len();
        }
        while !bytes.is_empty() {
            match self.server.copy(at, bytes) {
                Ok(done) => {
                    at += done;
                    bytes = bytes.get(done as usize..).unwrap_or_default();
                }
                Err(Errno::AGAIN | Errno::INTR) => {}
                Err(_) => break,
            }
        }
        bytes.len()
    }

    /// Missing pages are zeros from now on.
    pub fn end(self, stub: &mut Stub) -> Result<(), ProcessError> {
        drop(self.server);
        close(stub, self.number)
    }
}

fn close(stub: &mut Stub, number: u64) -> Result<(), ProcessError> {
    let close = step(libc::SYS_close, [number], "closing a userfaultfd");
    stub.steps(vec![close]).map(drop)
}
