//! Character devices that hold nothing: null, zero, full, random, urandom.

use super::Descriptor;
use super::context::{About, Around, CheckContext, CollectContext, RecreateContext};
use super::file::look_up;
use super::probe::{Probe, failed};
use crate::ProcessError;
use outlive_state_tree::{StateNode, StateValue};
use rustix::fs::{AtFlags, FileType, Mode, OFlags, StatxFlags};
use std::os::fd::{AsRawFd, OwnedFd};

/// Major number of the memory devices.
const MEMORY: u32 = 1;

/// Which device.
#[derive(StateValue, Debug, Clone, Copy, PartialEq, Eq)]
pub enum DeviceKind {
    /// `/dev/null`
    Null,
    /// `/dev/zero`
    Zero,
    /// `/dev/full`
    Full,
    /// `/dev/random`
    Random,
    /// `/dev/urandom`
    Urandom,
}

impl DeviceKind {
    fn of_minor(minor: u32) -> Option<Self> {
        match minor {
            3 => Some(Self::Null),
            5 => Some(Self::Zero),
            7 => Some(Self::Full),
            8 => Some(Self::Random),
            9 => Some(Self::Urandom),
            _ => None,
        }
    }

    fn path(self) -> &'static str {
        match self {
            Self::Null => "/dev/null",
            Self::Zero => "/dev/zero",
            Self::Full => "/dev/full",
            Self::Random => "/dev/random",
            Self::Urandom => "/dev/urandom",
        }
    }
}

/// An open device.
#[derive(StateNode, Debug, Clone, PartialEq)]
#[state(compatible = "outlive,fd-device-v1")]
pub struct DeviceState {
    /// Which device.
    pub device: DeviceKind,
}

fn kind_of(fd: &OwnedFd) -> Option<DeviceKind> {
    let stat = rustix::fs::statx(fd, c"", AtFlags::EMPTY_PATH, StatxFlags::TYPE).ok()?;
    (FileType::from_raw_mode(stat.stx_mode.into()) == FileType::CharacterDevice
        && stat.stx_rdev_major == MEMORY)
        .then(|| DeviceKind::of_minor(stat.stx_rdev_minor))?
}

impl Descriptor for DeviceState {
    const NAME: &'static str = "device";

    fn claims(probe: &Probe<'_>, _: &Around) -> Result<bool, ProcessError> {
        if !probe.has_path() || probe.file_type()? != FileType::CharacterDevice {
            return Ok(false);
        }
        let stat = probe.stat()?;
        Ok(stat.stx_rdev_major == MEMORY && DeviceKind::of_minor(stat.stx_rdev_minor).is_some())
    }

    fn collect(probe: &Probe<'_>, _: &mut CollectContext<'_>) -> Result<Self, ProcessError> {
        let device = DeviceKind::of_minor(probe.stat()?.stx_rdev_minor);
        device
            .map(|device| Self { device })
            .ok_or_else(|| probe.refuse("character device", "have the program close it"))
    }

    fn check(&self, about: &About, cx: &mut CheckContext<'_>) -> Result<(), ProcessError> {
        let path = self.device.path();
        match look_up(path.as_bytes()) {
            Ok(fd) if kind_of(&fd) == Some(self.device) => {
                cx.hold(about, fd);
                Ok(())
            }
            _ => Err(cx.refuse(
                about,
                format!("device {path} is missing here"),
                "restore where /dev has it",
            )),
        }
    }

    fn recreate(&self, about: &About, cx: &mut RecreateContext) -> Result<OwnedFd, ProcessError> {
        let held = cx.take(about)?;
        let kept = OFlags::ACCMODE | OFlags::PATH;
        let flags = (OFlags::from_bits_retain(about.flags) & kept) | OFlags::CLOEXEC;
        rustix::fs::open(
            format!("/proc/self/fd/{}", held.as_raw_fd()),
            flags,
            Mode::empty(),
        )
        .map_err(|errno| {
            failed(
                cx.pid,
                format!("open {} for fd {}", self.device.path(), about.number),
                errno,
            )
        })
    }
}
