//! What programs are made of beside their computing: where they begin, and how they say something.
//!
//! Nothing here knows that the machine may be reset.
//!
//! # Safety
//! These functions run as programs: with a stack and 16 pages of their own, all zeros when they begin.
#![allow(unsafe_code)]

use crate::mixer::Mixer;
use crate::primes::Primes;
use crate::processor::{DI, IP, PAGE, PAGES, PROGRAM, REGISTERS, SP};
use core::arch::asm;

// What a program has in its memory leaves half of it to its stack.
const _: () = assert!(size_of::<Primes>() < PAGES * PAGE * 3 / 4);
const _: () = assert!(size_of::<Mixer>() < PAGES * PAGE * 3 / 4);

/// Says two numbers.
fn say(a: u64, b: u64) {
    // SAFETY: an interrupt that programs may ask for; it comes back with all registers as they were.
    unsafe { asm!("int 0x80", in("rdi") a, in("rsi") b, options(nostack)) };
}

/// # Safety
/// `memory` is a program's own, and zeros or what it left there.
unsafe extern "C" fn primes(memory: *mut Primes) -> ! {
    // SAFETY: it is large enough (checked above), aligned to a page, used by nobody else.
    let primes = unsafe { &mut *memory };
    loop {
        let (which, prime) = primes.next();
        if which.is_multiple_of(50) {
            say(which, prime);
        }
    }
}

/// # Safety
/// As for `primes`.
unsafe extern "C" fn mixer(memory: *mut Mixer) -> ! {
    // SAFETY: as for `primes`.
    let mixer = unsafe { &mut *memory };
    loop {
        let (round, state) = mixer.next();
        say(round, state);
    }
}

/// The registers with which a program begins.
pub fn beginning(program: u64) -> [u64; REGISTERS] {
    let mut registers = [0; REGISTERS];
    let code = match program {
        crate::state::PRIMES => primes as *const (),
        _ => mixer as *const (),
    };
    registers[IP] = code.addr() as u64;
    registers[DI] = PROGRAM;
    // As if it had been called.
    registers[SP] = PROGRAM + (PAGES * PAGE) as u64 - 8;
    registers
}
