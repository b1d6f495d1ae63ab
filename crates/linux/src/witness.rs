//! A process without any privilege that waits to be looked at, and whether there is Landlock.
//!
//! It runs a program of some fifty instructions that lies in memory, so that it needs no file of the
//! machine, and has nothing of this process. Where the machine runs nothing from memory
//! (`vm.memfd_noexec`), it runs `/bin/cat`.
//!
//! # Safety
//! Between `fork` and `exec` only system calls with numbers and a literal are made. The machine code is only copied,
//! never run, by this process; its bytes lie between two symbols of this file's assembly.
#![allow(unsafe_code)]

use rustix::fs::{MemfdFlags, memfd_create};
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};

/// `SECBIT_NOROOT`: user 0 gains nothing by beginning a program.
const NOROOT: libc::c_ulong = 1;
/// What it is called.
const NAME: &str = "outlive-witness";
/// What is begun where no program may be in memory.
const ELSEWHERE: &str = "/bin/cat";

std::arch::global_asm!(
    ".pushsection .rodata.outlive_witness,\"a\",@progbits",
    ".globl outlive_witness_begin",
    ".globl outlive_witness_end",
    "outlive_witness_begin:",
    // prctl(PR_SET_NAME)
    "mov eax, 157",
    "mov edi, 15",
    "lea rsi, [rip + 4f]",
    "syscall",
    "2:",
    // What it reads, a byte at a time, it writes, until there is no more.
    "xor eax, eax",
    "xor edi, edi",
    "lea rsi, [rsp - 8]",
    "mov edx, 1",
    "syscall",
    "cmp rax, 1",
    "jne 3f",
    "mov eax, 1",
    "mov edi, 1",
    "syscall",
    "jmp 2b",
    "3:",
    // exit_group(0)
    "mov eax, 231",
    "xor edi, edi",
    "syscall",
    "4:",
    ".asciz \"outlive-witness\"",
    "outlive_witness_end:",
    ".popsection",
);

unsafe extern "C" {
    static outlive_witness_begin: u8;
    static outlive_witness_end: u8;
}

/// The smallest program that answers: a header, one segment, and the code (`elf(5)`).
fn program() -> Vec<u8> {
    const AT: u64 = 0x40_0000;
    const HEADERS: u64 = 64 + 56;
    let (begin, end) = (
        &raw const outlive_witness_begin,
        &raw const outlive_witness_end,
    );
    // SAFETY: both symbols enclose the read-only bytes assembled above, in this order.
    let code = unsafe { std::slice::from_raw_parts(begin, end as usize - begin as usize) };
    let size = HEADERS + code.len() as u64;
    let mut elf = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
    // An executable file (2) for x86-64 (62), version 1.
    elf.extend([2, 0, 62, 0, 1, 0, 0, 0]);
    // Where it begins, and where its segments and its sections are described.
    for field in [AT + HEADERS, 64, 0] {
        elf.extend(field.to_le_bytes());
    }
    // Flags; sizes and numbers: of this header, of one segment, of no section.
    elf.extend([0; 4]);
    for field in [64u16, 56, 1, 0, 0, 0] {
        elf.extend(field.to_le_bytes());
    }
    // To be loaded (1), to be read and executed (4 and 1).
    elf.extend([1, 0, 0, 0, 5, 0, 0, 0]);
    for field in [0, AT, AT, size, size, 4096] {
        elf.extend(field.to_le_bytes());
    }
    elf.extend(code);
    elf
}

/// The program in memory of its own: it takes no file of the machine.
fn in_memory() -> io::Result<File> {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::EXEC;
    let mut file = File::from(memfd_create(NAME, flags)?);
    file.write_all(&program())?;
    Ok(file)
}

/// Its descriptor for the list of keys that its user may see (`/proc/keys`), where there is one.
pub const LIST_OF_KEYS: i32 = libc::STDERR_FILENO;

/// Starts a process of this user and group, without capabilities and in a session of its own, that is
/// ready to be looked at by whoever has them too. It ends once its standard input is closed.
///
/// # Errors
/// Where it could not be made, or has ended at once.
pub fn start(user: u32, group: u32) -> io::Result<Child> {
    let in_memory = in_memory().and_then(|file| {
        let path = format!("/proc/self/fd/{}", file.as_raw_fd());
        begin(&path, user, group)
    });
    in_memory.or_else(|error| {
        begin(ELSEWHERE, user, group).map_err(|e| {
            let text = format!("a program in memory: {error}; {ELSEWHERE}: {e}");
            io::Error::new(error.kind(), text)
        })
    })
}

fn begin(program: &str, user: u32, group: u32) -> io::Result<Child> {
    let mut command = Command::new(program);
    if program != ELSEWHERE {
        command.arg0(NAME);
    }
    command.env_clear().current_dir("/").uid(user).gid(group);
    command.stdin(Stdio::piped()).stdout(Stdio::piped());
    let forgo = || {
        // SAFETY: only numbers and a literal are passed. Who has no privilege may not forgo any, and has
        // none.
        unsafe {
            libc::setsid();
            libc::prctl(libc::PR_SET_SECUREBITS, NOROOT, 0, 0, 0);
            let clear = libc::PR_CAP_AMBIENT_CLEAR_ALL;
            libc::prctl(libc::PR_CAP_AMBIENT, clear, 0, 0, 0);
            let keys = libc::open(c"/proc/keys".as_ptr(), libc::O_RDONLY | libc::O_CLOEXEC);
            if keys >= 0 {
                libc::dup2(keys, LIST_OF_KEYS);
            }
        }
        Ok(())
    };
    // SAFETY: it makes system calls with numbers and a literal only.
    unsafe { command.pre_exec(forgo) };
    let mut child = command.stderr(Stdio::null()).spawn()?;
    // Once it answers, nothing of this process is left in it.
    let answer = (child.stdin.as_mut()).zip(child.stdout.as_mut()).map_or(
        Err(io::ErrorKind::BrokenPipe.into()),
        |(to, from)| {
            to.write_all(b"\n")?;
            from.read_exact(&mut [0])
        },
    );
    if let Err(e) = answer {
        let _ = child.kill();
        let _ = child.wait();
        return Err(e);
    }
    Ok(child)
}

/// Whether the kernel has Landlock, and is to ask it (`landlock_create_ruleset(2)`).
#[must_use]
pub fn has_landlock() -> bool {
    /// `LANDLOCK_CREATE_RULESET_VERSION`
    const VERSION: libc::c_uint = 1;
    let nothing = std::ptr::null::<u8>();
    // SAFETY: without attributes, only its version is asked for.
    let version = unsafe { libc::syscall(libc::SYS_landlock_create_ruleset, nothing, 0, VERSION) };
    version >= 1
        || !matches!(
            crate::last_error(),
            crate::Errno::NOSYS | crate::Errno::OPNOTSUPP
        )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_has_no_capability_and_ends_with_its_input() {
        let (user, group) = (rustix::process::getuid(), rustix::process::getgid());
        let mut child = start(user.as_raw(), group.as_raw()).unwrap();
        let status = std::fs::read_to_string(format!("/proc/{}/status", child.id())).unwrap();
        let line = |name: &str| status.lines().find(|l| l.starts_with(name)).unwrap();
        let program = std::fs::read_link(format!("/proc/{}/exe", child.id())).unwrap();
        let program = program.to_string_lossy().into_owned();
        assert!(program.contains("memfd:outlive-witness"), "{program}");
        assert_eq!(line("Name"), "Name:\toutlive-witness");
        for set in ["CapPrm", "CapEff"] {
            assert_eq!(
                line(set).split_whitespace().nth(1),
                Some("0000000000000000")
            );
        }
        assert_eq!(
            line("Uid").split_whitespace().nth(2),
            Some(&user.as_raw().to_string()[..])
        );
        drop(child.stdin.take());
        assert!(child.wait().unwrap().success());
    }
}
