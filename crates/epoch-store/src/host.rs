//! What a store needs to know from the world besides its medium.

use std::io;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

/// Clocks and identities; a test gives its own.
pub trait Host: Send + Sync {
    /// Nanoseconds since the Unix epoch.
    fn realtime_ns(&self) -> u64;

    /// Microseconds since some moment in the past; never goes backwards.
    fn monotonic_us(&self) -> u64;

    /// Sixteen bytes that no other file has.
    fn uuid(&self) -> [u8; 16];

    /// Fills it with bytes that nobody can guess, for keys.
    ///
    /// # Errors
    /// What the kernel says, if it gives none: nothing takes their place.
    fn random(&self, into: &mut [u8]) -> io::Result<()> {
        let mut filled = 0;
        while filled < into.len() {
            filled += rustix::rand::getrandom(
                &mut into[filled..],
                rustix::rand::GetRandomFlags::empty(),
            )?;
        }
        Ok(())
    }
}

/// The real world.
#[derive(Debug)]
pub struct SystemHost {
    start: Instant,
}

impl Default for SystemHost {
    fn default() -> Self {
        Self {
            start: Instant::now(),
        }
    }
}

impl Host for SystemHost {
    fn realtime_ns(&self) -> u64 {
        let since = SystemTime::now().duration_since(UNIX_EPOCH);
        since.map_or(0, |d| u64::try_from(d.as_nanos()).unwrap_or(u64::MAX))
    }

    fn monotonic_us(&self) -> u64 {
        u64::try_from(self.start.elapsed().as_micros()).unwrap_or(u64::MAX)
    }

    /// From the kernel's random numbers; should they fail, from clock and process, which tell
    /// files of one machine apart as well.
    fn uuid(&self) -> [u8; 16] {
        let mut uuid = [0; 16];
        if rustix::rand::getrandom(&mut uuid, rustix::rand::GetRandomFlags::empty()) != Ok(16) {
            uuid[..8].copy_from_slice(&self.realtime_ns().to_le_bytes());
            uuid[8..12].copy_from_slice(&std::process::id().to_le_bytes());
        }
        uuid
    }
}
