//! Making lines durable by instructions of the processor, for memory that is itself persistent.
//!
//! `clwb` where the processor has it, else `clflushopt`, else `clflush`; then `sfence`. Only x86-64 yet.
//!
//! # Safety
//! The instructions change no contents. They take any address that is mapped; which ones the processor
//! has, `cpuid` is asked before the first is used.
#![allow(unsafe_code)]

/// Whether this processor can do it.
pub fn offered() -> bool {
    cfg!(target_arch = "x86_64")
}

#[cfg(target_arch = "x86_64")]
mod instructions {
    use crate::code::LINE;
    use core::arch::asm;
    use core::arch::x86_64::{__cpuid_count, _mm_clflush, _mm_sfence};
    use core::sync::atomic::{AtomicU8, Ordering};

    const CLFLUSH: u8 = 1;
    const CLFLUSHOPT: u8 = 2;
    const CLWB: u8 = 3;

    /// 0: not asked yet.
    static BEST: AtomicU8 = AtomicU8::new(0);

    fn best() -> u8 {
        match BEST.load(Ordering::Relaxed) {
            0 => {
                #[allow(unused_unsafe, reason = "safe in newer compilers")]
                // SAFETY: every x86-64 processor has `cpuid`; a leaf that it lacks has no such bits.
                let bits = unsafe { __cpuid_count(7, 0) }.ebx;
                let best = match (bits >> 24 & 1, bits >> 23 & 1) {
                    (1, _) => CLWB,
                    (_, 1) => CLFLUSHOPT,
                    _ => CLFLUSH,
                };
                BEST.store(best, Ordering::Relaxed);
                best
            }
            best => best,
        }
    }

    /// Begins to write back the lines of a range.
    ///
    /// # Safety
    /// The range is mapped.
    pub unsafe fn flush(at: *const u8, len: usize) {
        let (mut next, end) = (at.addr() / LINE * LINE, at.addr() + len);
        let best = best();
        while next < end {
            let line = at.with_addr(next);
            next += LINE;
            // SAFETY: the line is mapped, since a part of it is; `best` asked for the instruction.
            unsafe {
                match best {
                    CLWB => asm!("clwb [{}]", in(reg) line, options(nostack, preserves_flags)),
                    CLFLUSHOPT => {
                        asm!("clflushopt [{}]", in(reg) line, options(nostack, preserves_flags));
                    }
                    _ => _mm_clflush(line),
                }
            }
        }
    }

    /// Waits until what was written back has arrived.
    pub fn fence() {
        #[allow(unused_unsafe, reason = "safe in newer compilers")]
        // SAFETY: every x86-64 processor has it.
        unsafe {
            _mm_sfence();
        }
    }
}

#[cfg(target_arch = "x86_64")]
pub use instructions::{fence, flush};

/// Elsewhere [`offered`] says no.
///
/// # Safety
/// None is needed.
#[cfg(not(target_arch = "x86_64"))]
pub unsafe fn flush(_: *const u8, _: usize) {}

/// Elsewhere [`offered`] says no.
#[cfg(not(target_arch = "x86_64"))]
pub fn fence() {}
