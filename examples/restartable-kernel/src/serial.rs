//! What the kernel says, on the first serial line.
//!
//! # Rules
//! A line ends with ` .`: one that does not was cut short by a reset, and counts for nothing.
//!
//! # Safety
//! The ports are those of the serial line that every machine of this kind has; writing to them harms no
//! memory.
#![allow(unsafe_code)]

use crate::processor::{inb, outb};
use core::fmt;

const PORT: u16 = 0x3f8;
/// The line can take another byte.
const READY: u8 = 0x20;

/// The serial line.
pub struct Serial;

impl fmt::Write for Serial {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for byte in text.bytes() {
            // SAFETY: ports of the serial line.
            unsafe {
                while inb(PORT + 5) & READY == 0 {}
                outb(PORT, byte);
            }
        }
        Ok(())
    }
}

/// Says a line.
macro_rules! say {
    ($($what:tt)*) => {{
        use core::fmt::Write;
        let _ = write!($crate::serial::Serial, $($what)*);
        let _ = $crate::serial::Serial.write_str(" .\n");
    }};
}
pub(crate) use say;
