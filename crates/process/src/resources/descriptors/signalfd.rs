//! Signals as descriptors (`signalfd(2)`). The signals themselves are pending in the process.

use super::Descriptor;
use super::context::{About, Around, CollectContext, RecreateContext};
use super::probe::{Probe, failed};
use crate::ProcessError;
use outlive_state_tree::StateNode;
use std::os::fd::OwnedFd;

/// A descriptor that delivers signals.
#[derive(StateNode, Debug, Clone, PartialEq)]
#[state(compatible = "outlive,fd-signalfd-v1")]
pub struct SignalFdState {
    /// Which signals; bit 0 is signal 1.
    pub mask: u64,
}

impl Descriptor for SignalFdState {
    const NAME: &'static str = "signalfd";

    fn claims(probe: &Probe<'_>, _: &Around) -> Result<bool, ProcessError> {
        Ok(probe.link == b"anon_inode:[signalfd]")
    }

    fn collect(probe: &Probe<'_>, _: &mut CollectContext<'_>) -> Result<Self, ProcessError> {
        Ok(Self {
            mask: probe.number_field("sigmask", 16)?,
        })
    }

    fn recreate(&self, about: &About, cx: &mut RecreateContext) -> Result<OwnedFd, ProcessError> {
        outlive_linux::descriptors::signalfd(self.mask)
            .map_err(|errno| failed(cx.pid, format!("make signalfd {}", about.number), errno))
    }
}
