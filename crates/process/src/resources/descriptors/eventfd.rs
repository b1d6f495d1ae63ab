//! Event counters (`eventfd(2)`).

use super::Descriptor;
use super::context::{About, Around, CheckContext, CollectContext, RecreateContext};
use super::probe::{Probe, failed};
use crate::ProcessError;
use outlive_state_tree::StateNode;
use rustix::event::{EventfdFlags, eventfd};
use rustix::io::{Errno, ReadWriteFlags, preadv2};
use std::io::IoSliceMut;
use std::os::fd::{BorrowedFd, OwnedFd};

/// An event counter.
#[derive(StateNode, Debug, Clone, PartialEq)]
#[state(compatible = "outlive,fd-eventfd-v1")]
pub struct EventFdState {
    /// Its value.
    pub count: u64,
    /// Whether a read takes one instead of all.
    pub semaphore: bool,
}

/// Whether a read takes one instead of all, found out by reading from two or more; the value is
/// the same afterwards. Whoever waits for it is stopped, or looks again at what it woke for.
fn takes_one(counter: BorrowedFd<'_>, count: u64) -> Result<bool, Errno> {
    let add = |n: u64| match n {
        0 => Ok(()),
        n => rustix::io::write(counter, &n.to_ne_bytes()).map(drop),
    };
    let take = || {
        let mut value = [0u8; 8];
        // At the current position, which a counter does not have; never waiting.
        let (at, flags) = (u64::MAX, ReadWriteFlags::NOWAIT);
        preadv2(counter, &mut [IoSliceMut::new(&mut value)], at, flags)?;
        Ok::<u64, Errno>(u64::from_ne_bytes(value))
    };
    let added = 2u64.saturating_sub(count);
    add(added)?;
    let took = take()?;
    if took != 1 {
        add(count)?;
        return Ok(false);
    }
    // One of what was added is gone, or one of what was there.
    match added {
        0 => add(1)?,
        1 => {}
        _ => drop(take()?),
    }
    Ok(true)
}

impl Descriptor for EventFdState {
    const NAME: &'static str = "eventfd";

    fn claims(probe: &Probe<'_>, _: &Around) -> Result<bool, ProcessError> {
        Ok(probe.link == b"anon_inode:[eventfd]")
    }

    fn collect(probe: &Probe<'_>, cx: &mut CollectContext<'_>) -> Result<Self, ProcessError> {
        let count = probe.number_field("eventfd-count", 16)?;
        let semaphore = match probe.info.field("eventfd-semaphore") {
            Some(_) => probe.number_field("eventfd-semaphore", 10)? != 0,
            // Kernels before 6.5 do not say.
            None if cx.stopped => takes_one(probe.duplicate()?, count)
                .map_err(|e| probe.failed("find out whether a read takes one of", e))?,
            None => false,
        };
        Ok(Self { count, semaphore })
    }

    fn check(&self, about: &About, _: &mut CheckContext<'_>) -> Result<(), ProcessError> {
        // The largest value is reserved for overflows inside the kernel, and a write of it fails.
        if self.count == u64::MAX {
            return Err(ProcessError::Image(format!(
                "the counter of fd {} overflows",
                about.number
            )));
        }
        Ok(())
    }

    fn recreate(&self, about: &About, cx: &mut RecreateContext) -> Result<OwnedFd, ProcessError> {
        let make = || {
            let mut flags = EventfdFlags::CLOEXEC;
            if self.semaphore {
                flags |= EventfdFlags::SEMAPHORE;
            }
            let fd = eventfd(0, flags)?;
            if self.count != 0 {
                rustix::io::write(&fd, &self.count.to_ne_bytes())?;
            }
            Ok(fd)
        };
        make().map_err(|errno| failed(cx.pid, format!("make eventfd {}", about.number), errno))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;

    #[test]
    fn whether_a_read_takes_one_is_found_out_without_a_trace() {
        for semaphore in [false, true] {
            for count in [0u64, 1, 2, 3, 1 << 40, u64::MAX - 1] {
                let mut flags = EventfdFlags::NONBLOCK;
                flags.set(EventfdFlags::SEMAPHORE, semaphore);
                let fd = eventfd(0, flags).unwrap();
                if count > 0 {
                    rustix::io::write(&fd, &count.to_ne_bytes()).unwrap();
                }
                assert_eq!(takes_one(fd.as_fd(), count), Ok(semaphore), "{count}");
                let path = format!("/proc/self/fdinfo/{}", std::os::fd::AsRawFd::as_raw_fd(&fd));
                let info = std::fs::read_to_string(path).unwrap();
                let shown = info.lines().find_map(|l| l.strip_prefix("eventfd-count:"));
                let shown = u64::from_str_radix(shown.unwrap().trim(), 16).unwrap();
                assert_eq!(shown, count, "{semaphore}");
            }
        }
    }
}
