//! What the processor says of itself: `CPUID`, and the register states that the kernel switched on.
//!
//! # Safety
//! `CPUID` exists on every x86-64 processor and touches no memory. `XGETBV` is executed only where
//! `CPUID` says that the kernel switched it on.
#![allow(unsafe_code)]

use std::arch::x86_64;

/// The answer to a question: EAX, EBX, ECX, EDX.
pub type Answer = [u32; 4];

/// Asks the processor. A leaf that it does not have is answered with zeros.
#[must_use]
#[allow(unused_unsafe, reason = "safe in newer compilers only")]
pub fn cpuid(leaf: u32, subleaf: u32) -> Answer {
    // SAFETY: every x86-64 processor has the instruction.
    let highest = unsafe { x86_64::__cpuid(leaf & 0x8000_0000) }.eax;
    if leaf > highest {
        return [0; 4];
    }
    // SAFETY: as above.
    let r = unsafe { x86_64::__cpuid_count(leaf, subleaf) };
    [r.eax, r.ebx, r.ecx, r.edx]
}

/// The register states that programs may use (`XCR0`); 0 where the kernel does without `XSAVE`.
#[must_use]
pub fn enabled_states() -> u64 {
    const OSXSAVE: u32 = 1 << 27;
    if cpuid(1, 0)[2] & OSXSAVE == 0 {
        return 0;
    }
    // SAFETY: OSXSAVE, checked above, says that XGETBV may be executed and that register 0 exists.
    unsafe { xgetbv() }
}

/// # Safety
/// The kernel must have switched `XSAVE` on.
#[target_feature(enable = "xsave")]
unsafe fn xgetbv() -> u64 {
    // SAFETY: the caller's promise.
    unsafe { x86_64::_xgetbv(0) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_x86_64_processor_has_sse2_and_no_absurd_leaf() {
        assert_ne!(cpuid(1, 0)[3] & 1 << 26, 0);
        assert_eq!(cpuid(0x7fff_fff0, 0), [0; 4]);
    }

    #[test]
    fn x87_and_sse_are_switched_on_where_anything_is() {
        let enabled = enabled_states();
        assert!(enabled == 0 || enabled & 3 == 3, "{enabled:x}");
    }
}
