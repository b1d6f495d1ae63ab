//! The processor: ports, segments, interrupts, the timer, and page tables.
//!
//! # Rules
//! - The kernel is never interrupted: the interrupt flag is set in programs only.
//! - Programs see the kernel's code and constants (their own code is among it), and 16 pages at
//!   [`PROGRAM`]. All else is for the kernel.
//!
//! # Safety
//! There is one processor and the kernel is not interrupted, so nobody else uses the tables meanwhile.
//! `boot.s` makes room for each of them; what is written into them points to other such tables, to entries
//! in `boot.s`, or to memory that the caller owns.
#![allow(unsafe_code)]

use crate::say;
use core::arch::{asm, global_asm};
use core::ptr::{addr_of, addr_of_mut};

global_asm!(include_str!("boot.s"), options(att_syntax));

/// Where a program has its memory.
pub const PROGRAM: u64 = 1 << 30;
/// How many pages.
pub const PAGES: usize = 16;
/// Bytes of a page.
pub const PAGE: usize = 4096;

/// Entries of a table: present, writable, for programs, large, changed since it was cleared.
const PRESENT: u64 = 1;
const WRITE: u64 = 2;
const USER: u64 = 4;
const CHANGED: u64 = 1 << 6;
const LARGE: u64 = 1 << 7;

/// The registers of a program, as `boot.s` saves them.
pub const REGISTERS: usize = 22;
/// Which of them are what.
pub const DI: usize = 9;
/// The second argument.
pub const SI: usize = 10;
/// Which interrupt it was.
pub const VECTOR: usize = 15;
/// The next instruction.
pub const IP: usize = 17;
/// The code segment.
pub const CS: usize = 18;
/// The flags.
pub const FLAGS: usize = 19;
/// The stack.
pub const SP: usize = 20;
/// The stack's segment.
pub const SS: usize = 21;

/// The timer's interrupt.
pub const TIMER: u64 = 32;
/// The first and last interrupt of a device.
pub const DEVICES: core::ops::RangeInclusive<u64> = 32..=47;
/// A program's wish, `int 0x80`; the number of its entry in `boot.s`.
pub const WISH: u64 = 48;

unsafe extern "C" {
    static mut gdt: [u64; 7];
    static mut tss: [u32; 28];
    static mut context: [u64; REGISTERS];
    static mut fx: [u64; 64];
    static mut pdpt: [u64; 512];
    static mut middle: [u64; 512];
    static mut table: [u64; 512];
    static mut durable: [u64; 512];
    static stubs: [[u8; 16]; 49];
    static text_begin: u8;
    static text_end: u8;
    fn enter();
}

#[repr(C, packed)]
struct Pointer {
    limit: u16,
    base: u64,
}

static mut IDT: [[u64; 2]; 256] = [[0; 2]; 256];

/// Called by `boot.s`.
#[unsafe(no_mangle)]
extern "C" fn kernel_main(info: u32) -> ! {
    match crate::run(info) {
        Ok(()) => {}
        Err(why) => say!("refused {why}"),
    }
    stop()
}

/// Called by `boot.s` when the kernel itself was interrupted: by a mistake of its own.
#[unsafe(no_mangle)]
extern "C" fn kernel_fault(frame: *const [u64; 4]) -> ! {
    // SAFETY: `boot.s` gives what was pushed: vector, error, place, segment.
    let [vector, error, at, _] = unsafe { frame.read() };
    let place: u64;
    // SAFETY: reads a register.
    unsafe { asm!("mov {}, cr2", out(reg) place, options(nomem, nostack, preserves_flags)) };
    say!("fault {vector} error {error:#x} at {at:#x} place {place:#x}");
    stop()
}

/// The end.
pub fn stop() -> ! {
    loop {
        // SAFETY: waits for ever, since interrupts are off.
        unsafe { asm!("cli", "hlt", options(nomem, nostack)) };
    }
}

/// Writes to a port.
///
/// # Safety
/// The device there must not write to memory for it.
pub unsafe fn outb(port: u16, byte: u8) {
    // SAFETY: the caller knows the device.
    unsafe { asm!("out dx, al", in("dx") port, in("al") byte, options(nostack, preserves_flags)) };
}

/// Reads from a port.
///
/// # Safety
/// The device there must not write to memory for it.
pub unsafe fn inb(port: u16) -> u8 {
    let byte;
    // SAFETY: the caller knows the device.
    unsafe { asm!("in al, dx", in("dx") port, out("al") byte, options(nostack, preserves_flags)) };
    byte
}

/// Segments, interrupts, and the memory of programs.
pub fn prepare() {
    // SAFETY: the tables of `boot.s`, each of them as long as it is declared; entries are built as the
    // processor's manual has them, and the state segment's stack is the upper end of `context`.
    unsafe {
        let state = addr_of!(tss).addr() as u64;
        let top = addr_of!(context).addr() as u64 + 8 * REGISTERS as u64;
        tss[1] = top as u32;
        tss[2] = (top >> 32) as u32;
        tss[25] = 104 << 16;
        gdt[5] = 103 | (state & 0xff_ffff) << 16 | 0x89 << 40 | (state >> 24 & 0xff) << 56;
        gdt[6] = state >> 32;
        asm!("ltr {:x}", in(reg) 0x28u16, options(nostack, preserves_flags));
        for (number, stub) in stubs.iter().enumerate() {
            let at = stub.as_ptr().addr() as u64;
            // Programs may ask for number 0x80 only.
            let (vector, gate) = if number as u64 == WISH {
                (0x80, 0xee00)
            } else {
                (number, 0x8e00)
            };
            let low = at & 0xffff | 8 << 16 | gate << 32 | (at >> 16 & 0xffff) << 48;
            IDT[vector] = [low, at >> 32];
        }
        let pointer = Pointer {
            limit: 256 * 16 - 1,
            base: addr_of!(IDT).addr() as u64,
        };
        asm!("lidt [{}]", in(reg) &raw const pointer, options(nostack, preserves_flags));
        pdpt[1] = addr_of!(middle).addr() as u64 | PRESENT | WRITE | USER;
        middle[0] = addr_of!(table).addr() as u64 | PRESENT | WRITE | USER;
        // The interrupt controllers: device `n` gives interrupt 32 + n; only the timer may.
        for (port, byte) in [
            (0x20, 0x11),
            (0xa0, 0x11),
            (0x21, 32),
            (0xa1, 40),
            (0x21, 4),
            (0xa1, 2),
            (0x21, 1),
            (0xa1, 1),
            (0x21, 0xfe),
            (0xa1, 0xff),
        ] {
            outb(port, byte);
        }
    }
}

/// Maps memory that survives, for the kernel; where it can be used.
///
/// # Errors
/// Where it does not lie within one GiB beyond the fourth, in pages of 2 MiB.
pub fn map_durable(at: u64, len: u64) -> Result<*mut u8, &'static str> {
    let giga = (at >> 30) as usize;
    let inside = at
        .checked_add(len)
        .is_some_and(|end| (end - 1) >> 30 == at >> 30);
    if !(4..512).contains(&giga) || !inside || !at.is_multiple_of(2 << 20) {
        return Err("the memory that survives lies at a strange place");
    }
    // SAFETY: the table is for this only; the memory is what the firmware says survives, and nobody else
    // uses it.
    unsafe {
        for page in (at..at + len).step_by(2 << 20) {
            durable[(page >> 21) as usize % 512] = page | PRESENT | WRITE | LARGE;
        }
        pdpt[giga] = addr_of!(durable).addr() as u64 | PRESENT | WRITE;
    }
    Ok(core::ptr::with_exposed_provenance_mut(at as usize))
}

/// The kernel's code and constants: those of programs are among them.
pub fn text() -> &'static [u8] {
    let (begin, end) = (&raw const text_begin, &raw const text_end);
    // SAFETY: the linker script puts code and constants, and nothing that changes, between these.
    unsafe { core::slice::from_raw_parts(begin, end.addr() - begin.addr()) }
}

/// The memory of a program, page by page.
#[repr(C, align(4096))]
pub struct Frames(pub [[u64; PAGE / 8]; PAGES]);

/// Gives a program its memory, unchanged so far.
pub fn show(frames: &mut Frames) {
    let at = addr_of_mut!(*frames).addr() as u64;
    let entries = addr_of_mut!(table).cast::<u64>();
    // SAFETY: the table is for this only, and has more entries; `run_program` runs nothing but the program
    // whose memory is shown. Loading `cr3` forgets the old entries.
    unsafe {
        for page in 0..PAGES {
            let entry = (at + (page * PAGE) as u64) | PRESENT | WRITE | USER;
            entries.add(page).write_volatile(entry);
        }
        asm!("mov {0}, cr3", "mov cr3, {0}", out(reg) _, options(nostack, preserves_flags));
    }
}

/// Whether the program that is shown has changed a page of its memory.
pub fn changed(page: usize) -> bool {
    // SAFETY: the processor writes to the table while programs run, which is not now.
    let entry = unsafe {
        addr_of!(table)
            .cast::<u64>()
            .add(page % PAGES)
            .read_volatile()
    };
    entry & CHANGED != 0
}

/// Sets the timer, once.
pub fn set_timer(microseconds: u32) {
    let ticks = (u64::from(microseconds) * 1_193_182 / 1_000_000).clamp(1, 0xffff) as u16;
    let [low, high] = ticks.to_le_bytes();
    // SAFETY: ports of the timer.
    unsafe {
        outb(0x43, 0x30);
        outb(0x40, low);
        outb(0x40, high);
    }
}

/// Tells the controllers that an interrupt was heard.
pub fn heard() {
    // SAFETY: a port of the first controller; the second is silent.
    unsafe { outb(0x20, 0x20) };
}

/// Lets the program with this memory, which is shown, run with these registers until it is interrupted.
///
/// What the registers say does not matter to the kernel: segments and privilege are set here.
///
/// # Panics
/// If the memory of another program is shown.
pub fn run_program(frames: &mut Frames, registers: &mut [u64; REGISTERS], vectors: &mut [u64; 64]) {
    // SAFETY: the processor writes to the table while programs run, which is not now.
    let shown = unsafe { addr_of!(table).cast::<u64>().read_volatile() };
    assert_eq!(
        shown / PAGE as u64 * PAGE as u64,
        addr_of_mut!(*frames).addr() as u64,
        "another program is shown"
    );
    // Arithmetic flags and the direction, and always: interrupts.
    registers[FLAGS] = registers[FLAGS] & 0xcd5 | 0x202;
    registers[CS] = 0x20 | 3;
    registers[SS] = 0x18 | 3;
    // An address that is none would make the kernel's own return fail.
    registers[IP] &= 0x7fff_ffff_ffff;
    // Bits of MXCSR that are none would make its loading fail.
    vectors[3] &= 0xffff;
    // SAFETY: the places are for this only; `enter` returns with all registers of the kernel as they
    // were, by its own rules, and changes nothing but these places and the program's memory, which is
    // the caller's, as was checked above.
    unsafe {
        addr_of_mut!(context).write(*registers);
        addr_of_mut!(fx).write(*vectors);
        enter();
        *registers = addr_of!(context).read();
        *vectors = addr_of!(fx).read();
    }
}
