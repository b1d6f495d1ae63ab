//! Holds patterns in every register of the processor, and looks at them all the time.
//!
//! One thread for each part of the register file: general registers, the direction flag (set, as
//! a backward copy sets it), x87 with its control word and MXCSR, vector registers as wide as the
//! processor has them with the mask registers, the base of GS, protection keys. Each loads its
//! pattern once and then only compares; what the loop does not need holds the pattern too.
//!
//! # Safety
//! The assembly functions save what the C calling convention wants saved, touch only the memory
//! that their arguments point to, and return when a register does not hold its pattern. The
//! callers pass pointers to live blocks of the sizes that are stated.
#![allow(unsafe_code)]

use outlive_test_programs::{
    await_report_order, await_report_order_patiently, block, fail, mix, say,
};
use std::arch::global_asm;
use std::sync::atomic::{AtomicU64, Ordering};

// rdi: 16 words, of which r15 r14 r13 r12 r11 r10 r9 r8 rdi rsi rbp rbx rdx hold 0 to 12;
// rsi: where to count. rax counts; rcx is the frame: it holds the block's address.
global_asm!(
    "hold_general:",
    "push rbx; push rbp; push r12; push r13; push r14; push r15",
    "push rsi",
    "mov rcx, rdi",
    "mov r15, [rcx]; mov r14, [rcx + 8]; mov r13, [rcx + 16]; mov r12, [rcx + 24]",
    "mov r11, [rcx + 32]; mov r10, [rcx + 40]; mov r9, [rcx + 48]; mov r8, [rcx + 56]",
    "mov rdi, [rcx + 64]; mov rsi, [rcx + 72]; mov rbp, [rcx + 80]; mov rbx, [rcx + 88]",
    "mov rdx, [rcx + 96]",
    "xor eax, eax",
    "2:",
    "cmp r15, [rcx]; jne 3f",
    "cmp r14, [rcx + 8]; jne 3f",
    "cmp r13, [rcx + 16]; jne 3f",
    "cmp r12, [rcx + 24]; jne 3f",
    "cmp r11, [rcx + 32]; jne 3f",
    "cmp r10, [rcx + 40]; jne 3f",
    "cmp r9, [rcx + 48]; jne 3f",
    "cmp r8, [rcx + 56]; jne 3f",
    "cmp rdi, [rcx + 64]; jne 3f",
    "cmp rsi, [rcx + 72]; jne 3f",
    "cmp rbp, [rcx + 80]; jne 3f",
    "cmp rbx, [rcx + 88]; jne 3f",
    "cmp rdx, [rcx + 96]; jne 3f",
    // The count in memory is that of the register, one round ago.
    "xchg rcx, [rsp]",
    "cmp rax, [rcx]; jne 4f",
    "inc rax",
    "mov [rcx], rax",
    "xchg rcx, [rsp]",
    "jmp 2b",
    "4: xchg rcx, [rsp]",
    "3:",
    "pop rsi",
    "pop r15; pop r14; pop r13; pop r12; pop rbp; pop rbx",
    "ret",
);

// rdi: where to count. The direction flag, carry and overflow stay set.
global_asm!(
    "hold_flags:",
    "std",
    "2:",
    "pushfq",
    "pop rax",
    "test eax, 0x400",
    "jz 3f",
    "inc qword ptr [rdi]",
    "jmp 2b",
    "3: cld",
    "ret",
);

// rdi: pattern of 32 * 64 + 64 bytes; rsi: as much room; rdx: where to count.
global_asm!(
    "hold_zmm:",
    "mov r8, rdi; mov r9, rsi; mov r10, rdx",
    ".irp n, 0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23,24,25,26,27,28,29,30,31",
    "vmovdqu64 zmm\\n, [r8 + \\n * 64]",
    ".endr",
    ".irp n, 0,1,2,3,4,5,6,7",
    "kmovq k\\n, [r8 + 2048 + \\n * 8]",
    ".endr",
    "2:",
    ".irp n, 0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23,24,25,26,27,28,29,30,31",
    "vmovdqu64 [r9 + \\n * 64], zmm\\n",
    ".endr",
    ".irp n, 0,1,2,3,4,5,6,7",
    "kmovq [r9 + 2048 + \\n * 8], k\\n",
    ".endr",
    "mov rsi, r8; mov rdi, r9; mov ecx, 264",
    "repe cmpsq",
    "jne 3f",
    "inc qword ptr [r10]",
    "jmp 2b",
    "3: vzeroupper",
    "ret",
);

// As above with 16 registers of 32 bytes.
global_asm!(
    "hold_ymm:",
    "mov r8, rdi; mov r9, rsi; mov r10, rdx",
    ".irp n, 0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15",
    "vmovdqu ymm\\n, [r8 + \\n * 32]",
    ".endr",
    "2:",
    ".irp n, 0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15",
    "vmovdqu [r9 + \\n * 32], ymm\\n",
    ".endr",
    "mov rsi, r8; mov rdi, r9; mov ecx, 64",
    "repe cmpsq",
    "jne 3f",
    "inc qword ptr [r10]",
    "jmp 2b",
    "3: vzeroupper",
    "ret",
);

// rdi: pattern: 16 xmm registers, then 8 doubles, the control word and MXCSR at 320 and 324;
// rsi: two rooms of 512 bytes, aligned; rdx: where to count. The first fxsave is the pattern:
// control, status and tag words, MXCSR with its mask, x87 and xmm registers.
global_asm!(
    "hold_x87:",
    "mov r8, rdi; mov r9, rsi; mov r10, rdx",
    "fninit",
    ".irp n, 0,1,2,3,4,5,6,7",
    "fld qword ptr [r8 + 256 + \\n * 8]",
    ".endr",
    "fldcw [r8 + 320]",
    "ldmxcsr [r8 + 324]",
    ".irp n, 0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15",
    "movdqu xmm\\n, [r8 + \\n * 16]",
    ".endr",
    "fxsave64 [r9]",
    "2:",
    "fxsave64 [r9 + 512]",
    // Control, status and tag words without the last instruction's address.
    "mov eax, [r9]; cmp eax, [r9 + 512]; jne 3f",
    "mov al, [r9 + 4]; cmp al, [r9 + 516]; jne 3f",
    "lea rsi, [r9 + 24]; lea rdi, [r9 + 536]; mov ecx, 49",
    "repe cmpsq",
    "jne 3f",
    "inc qword ptr [r10]",
    "jmp 2b",
    "3: fninit",
    "mov dword ptr [r9], 0x1f80",
    "ldmxcsr [r9]",
    "ret",
);

// rdi: the pattern; rsi: where to count. GS points to the pattern.
global_asm!(
    "hold_gs:",
    "2: mov rax, gs:[0]",
    "cmp rax, [rdi]",
    "jne 3f",
    "inc qword ptr [rsi]",
    "jmp 2b",
    "3: ret",
);

// edi: the keys' rights; rsi: where to count.
global_asm!(
    "hold_keys:",
    "mov r8d, edi",
    "mov eax, edi; xor ecx, ecx; xor edx, edx",
    "wrpkru",
    "2: xor ecx, ecx",
    "rdpkru",
    "cmp eax, r8d",
    "jne 3f",
    "inc qword ptr [rsi]",
    "jmp 2b",
    "3: ret",
);

unsafe extern "C" {
    fn hold_general(pattern: *const u64, count: *const u64);
    fn hold_flags(count: *const u64);
    fn hold_zmm(pattern: *const u64, room: *mut u64, count: *const u64);
    fn hold_ymm(pattern: *const u64, room: *mut u64, count: *const u64);
    fn hold_x87(pattern: *const u64, room: *mut u64, count: *const u64);
    fn hold_gs(pattern: *const u64, count: *const u64);
    fn hold_keys(rights: u32, count: *const u64);
}

/// Room for two images that `fxsave` writes; only the assembly looks into it.
#[repr(C, align(64))]
struct Aligned {
    room: [u64; 128],
}

fn pattern<const WORDS: usize>(seed: u64) -> Box<[u64; WORDS]> {
    let mut words = Box::new([0; WORDS]);
    for (i, word) in words.iter_mut().enumerate() {
        *word = mix(seed * 1000 + i as u64);
    }
    words
}

struct Part {
    name: &'static str,
    hold: fn(*const u64),
}

fn general(count: *const u64) {
    let pattern = pattern::<16>(1);
    // SAFETY: 16 words, and a live counter.
    unsafe { hold_general(pattern.as_ptr(), count) }
}

fn flags(count: *const u64) {
    // SAFETY: a live counter; the flag is cleared before the return.
    unsafe { hold_flags(count) }
}

fn vectors(count: *const u64) {
    let (pattern, mut room) = (pattern::<264>(2), pattern::<264>(3));
    // SAFETY: both blocks have 264 words; the processor has these registers.
    unsafe {
        if wide() {
            hold_zmm(pattern.as_ptr(), room.as_mut_ptr(), count);
        } else {
            hold_ymm(pattern.as_ptr(), room.as_mut_ptr(), count);
        }
    }
}

fn wide() -> bool {
    is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512bw")
}

fn x87(count: *const u64) {
    let mut pattern = pattern::<41>(4);
    for (i, word) in pattern[32..40].iter_mut().enumerate() {
        *word = (1.0 / (i as f64 + 3.0)).to_bits();
    }
    // All exceptions masked, rounding towards zero, double precision; the same for MXCSR, with
    // flush-to-zero, denormals-are-zero and two sticky flags.
    pattern[40] = 0x0e7f | 0xffe1 << 32;
    let mut room = Box::new(Aligned { room: [0; 128] });
    // SAFETY: 41 words, two aligned rooms of 512 bytes and a live counter.
    unsafe { hold_x87(pattern.as_ptr(), room.room.as_mut_ptr(), count) }
}

fn gs(count: *const u64) {
    const ARCH_SET_GS: usize = 0x1001;
    let pattern = pattern::<2>(5);
    // SAFETY: nothing else in this program uses GS; the pattern is live until the return.
    unsafe {
        let at = pattern.as_ptr() as usize;
        outlive_test_programs::sys(libc::SYS_arch_prctl, [ARCH_SET_GS, at, 0, 0, 0, 0]);
        hold_gs(pattern.as_ptr(), count);
    }
}

fn keys(count: *const u64) {
    // All but key 0 denied in turns of access and write.
    // SAFETY: no memory of this program has a key other than 0, which stays open.
    unsafe { hold_keys(0x9999_9998, count) }
}

fn has_keys() -> bool {
    std::arch::x86_64::__cpuid_count(7, 0).ecx & 1 << 4 != 0
}

fn main() {
    block(&[libc::SIGUSR1]);
    let mut parts = vec![
        Part {
            name: "general",
            hold: general,
        },
        Part {
            name: "flags",
            hold: flags,
        },
        Part {
            name: "x87",
            hold: x87,
        },
        Part {
            name: "gs",
            hold: gs,
        },
    ];
    if is_x86_feature_detected!("avx2") {
        parts.push(Part {
            name: if wide() { "zmm" } else { "ymm" },
            hold: vectors,
        });
    }
    if has_keys() {
        parts.push(Part {
            name: "keys",
            hold: keys,
        });
    }
    let counts: Vec<(&str, &'static AtomicU64)> = parts
        .into_iter()
        .map(|part| {
            let count: &'static AtomicU64 = Box::leak(Box::new(AtomicU64::new(0)));
            std::thread::spawn(move || {
                // Busy threads leave the processors to whoever stops them.
                // SAFETY: only numbers are passed; 0 means the calling thread.
                unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, 15) };
                (part.hold)(count.as_ptr());
                fail(&format!("the pattern of {} was lost", part.name));
            });
            (part.name, count)
        })
        .collect();
    let before: Vec<u64> = counts.iter().map(|c| c.1.load(Ordering::Relaxed)).collect();
    say("ready");
    if std::env::args().nth(1).as_deref() == Some("patient") {
        await_report_order_patiently();
    } else {
        await_report_order();
    }
    for ((name, count), before) in counts.iter().zip(before) {
        let now = count.load(Ordering::Relaxed);
        say(&format!("{name} {now}"));
        if now <= before {
            fail(&format!("no progress in {name}"));
        }
    }
}
