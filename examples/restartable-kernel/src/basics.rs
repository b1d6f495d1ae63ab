//! What a Rust program expects to be there: memory to take, bytes to move, and an end for panics.
//!
//! # Safety
//! The linker script keeps `HEAP` free of all else, and it is given out once, at the beginning. The four
//! functions on bytes do what their names say in C; their callers are compiled code that keeps to that.
#![allow(unsafe_code)]

use core::arch::asm;
use core::panic::PanicInfo;
use linked_list_allocator::LockedHeap;

/// Ordinary memory that is given out, in bytes from the beginning of the machine's memory.
const HEAP: core::ops::Range<usize> = 8 << 20..64 << 20;

#[global_allocator]
static ALLOCATOR: LockedHeap = LockedHeap::empty();

/// From now on memory can be taken.
pub fn give_out_memory() {
    // SAFETY: the range is mapped by `boot.s`, used by nobody else (the linker script ends before it),
    // and this is called once.
    unsafe {
        ALLOCATOR.lock().init(
            core::ptr::with_exposed_provenance_mut(HEAP.start),
            HEAP.len(),
        );
    }
}

#[panic_handler]
fn panic(info: &PanicInfo) -> ! {
    crate::say!("panic {info}");
    crate::processor::stop()
}

/// Nothing unwinds here, but libraries that could are linked.
#[unsafe(no_mangle)]
extern "C" fn rust_eh_personality() {}

/// As above.
#[unsafe(no_mangle)]
extern "C" fn _Unwind_Resume() -> ! {
    crate::processor::stop()
}

#[unsafe(no_mangle)]
unsafe extern "C" fn memcpy(to: *mut u8, from: *const u8, len: usize) -> *mut u8 {
    // SAFETY: the caller says that `len` bytes are there at both places.
    unsafe {
        asm!("rep movsb", inout("rcx") len => _, inout("rdi") to => _, inout("rsi") from => _,
            options(nostack, preserves_flags));
    }
    to
}

#[unsafe(no_mangle)]
unsafe extern "C" fn memmove(to: *mut u8, from: *const u8, len: usize) -> *mut u8 {
    if to.addr().wrapping_sub(from.addr()) >= len {
        // SAFETY: as the caller says; going upwards, no byte is overwritten before it is read.
        return unsafe { memcpy(to, from, len) };
    }
    // SAFETY: as the caller says; downwards, from the last byte; `len` is not zero here.
    unsafe {
        asm!("std", "rep movsb", "cld", inout("rcx") len => _,
            inout("rdi") to.wrapping_add(len - 1) => _,
            inout("rsi") from.wrapping_add(len - 1) => _, options(nostack));
    }
    to
}

#[unsafe(no_mangle)]
unsafe extern "C" fn memset(to: *mut u8, byte: i32, len: usize) -> *mut u8 {
    // SAFETY: the caller says that `len` bytes are there.
    unsafe {
        asm!("rep stosb", inout("rcx") len => _, inout("rdi") to => _, in("al") byte as u8,
            options(nostack, preserves_flags));
    }
    to
}

#[unsafe(no_mangle)]
unsafe extern "C" fn memcmp(a: *const u8, b: *const u8, len: usize) -> i32 {
    for i in 0..len {
        // SAFETY: the caller says that `len` bytes are there at both places. Volatile, so that the
        // compiler does not make a call of `memcmp` of this.
        let (a, b) = unsafe { (a.add(i).read_volatile(), b.add(i).read_volatile()) };
        if a != b {
            return i32::from(a) - i32::from(b);
        }
    }
    0
}

#[unsafe(no_mangle)]
unsafe extern "C" fn bcmp(a: *const u8, b: *const u8, len: usize) -> i32 {
    // SAFETY: as the caller says.
    unsafe { memcmp(a, b, len) }
}
