//! Event counters (`eventfd(2)`).

use super::Descriptor;
use super::context::{About, Around, CheckContext, CollectContext, RecreateContext};
use super::probe::{Probe, failed};
use crate::ProcessError;
use outlive_state_tree::StateNode;
use rustix::event::{EventfdFlags, eventfd};
use std::os::fd::OwnedFd;

/// An event counter.
#[derive(StateNode, Debug, Clone, PartialEq)]
#[state(compatible = "outlive,fd-eventfd-v1")]
pub struct EventFdState {
    /// Its value.
    pub count: u64,
    /// Whether a read takes one instead of all.
    pub semaphore: bool,
}

impl Descriptor for EventFdState {
    const NAME: &'static str = "eventfd";

    fn claims(probe: &Probe<'_>, _: &Around) -> Result<bool, ProcessError> {
        Ok(probe.link == b"anon_inode:[eventfd]")
    }

    fn collect(probe: &Probe<'_>, _: &mut CollectContext<'_>) -> Result<Self, ProcessError> {
        Ok(Self {
            count: probe.number_field("eventfd-count", 16)?,
            semaphore: probe.number_field("eventfd-semaphore", 10)? != 0,
        })
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
