//! Does to its memory whatever can be done to memory, in an order that looks random, and knows what
//! each page must hold: `paging MEGABYTES ROUNDS END [still]`; a still one writes to its first pages only. Every so often it appends a number to the
//! file `ROUNDS`. Once there is a file `ROUNDS.forks`, it makes children too; a still one makes many at once, once
//! there is a file `ROUNDS.crowd`, which live until there is a file `ROUNDS.alone`. When there is a file `END`, it looks at every page and ends with 7.
//!
//! # Safety
//! All addresses lie in blocks that were mapped at the beginning and are only ever moved or replaced
//! as a whole; nobody holds a reference into them.
#![allow(unsafe_code)]

use outlive_test_programs::{check, expect, good, mix, say};
use std::ffi::{CStr, CString};
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::PathBuf;

const PAGE: usize = 4096;
/// Pages in a block.
const PAGES: usize = 256;
const BLOCK: usize = PAGES * PAGE;
const RW: i32 = libc::PROT_READ | libc::PROT_WRITE;
/// What is done between two numbers in the file.
const ROUND: u64 = 2000;

struct Block {
    at: usize,
    /// What each page holds; 0 for zeros.
    values: Vec<u64>,
}

fn map(at: usize, protection: i32) -> usize {
    let fixed = if at == 0 { 0 } else { libc::MAP_FIXED };
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | fixed;
    // SAFETY: a fresh mapping, or one in the place of a block (see the heading).
    let at = unsafe { libc::mmap(at as *mut _, BLOCK, protection, flags, -1, 0) };
    good("mmap", at as i64) as usize
}

impl Block {
    fn address(&self, page: usize) -> usize {
        self.at + page * PAGE
    }

    fn put(&mut self, page: usize, value: u64) {
        let at = self.address(page) as *mut u64;
        self.values[page] = value;
        // SAFETY: first and last word of a page of the block.
        unsafe {
            at.write_volatile(value);
            at.add(PAGE / 8 - 1).write_volatile(value);
        }
    }

    fn look(&self, page: usize) {
        let at = self.address(page) as *const u64;
        // SAFETY: words of a page of the block.
        let words = unsafe { [at.read_volatile(), at.add(PAGE / 8 - 1).read_volatile()] };
        // SAFETY: as above.
        let middle = unsafe { at.add(PAGE / 16).read_volatile() };
        let value = self.values[page];
        check(words == [value; 2] && middle == 0, || {
            format!(
                "page {:x}: {words:x?} {middle:x}, not {value:x}",
                at as usize
            )
        });
    }

    fn give_back(&mut self, page: usize, count: usize) {
        let count = count.min(PAGES - page);
        let at = self.address(page) as *mut _;
        // SAFETY: pages of the block.
        let r = unsafe { libc::madvise(at, count * PAGE, libc::MADV_DONTNEED) };
        expect("madvise", r.into(), 0);
        self.values[page..page + count].fill(0);
    }

    fn move_away(&mut self) {
        let to = map(0, libc::PROT_NONE);
        let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
        // SAFETY: the block as a whole, to a place that was just made for it.
        let at = unsafe { libc::mremap(self.at as *mut _, BLOCK, BLOCK, flags, to) };
        if at as usize == to {
            self.at = to;
            return;
        }
        // The kernel moves one mapping at a time, and whoever looks on may have divided it just now.
        let error = std::io::Error::last_os_error().raw_os_error();
        expect("mremap", error.unwrap_or(0).into(), libc::EFAULT.into());
        // SAFETY: what was just made for it, which is in nobody's use.
        let r = unsafe { libc::munmap(to as *mut _, BLOCK) };
        expect("munmap", r.into(), 0);
    }

    fn replace(&mut self) {
        map(self.at, RW);
        self.values.fill(0);
    }

    fn protect(&self, page: usize, count: usize) {
        let length = count.min(PAGES - page) * PAGE;
        let at = self.address(page) as *mut _;
        for protection in [libc::PROT_READ, RW] {
            // SAFETY: pages of the block, which nobody writes to meanwhile.
            let r = unsafe { libc::mprotect(at, length, protection) };
            expect("mprotect", r.into(), 0);
        }
    }
}

fn pipe() -> [i32; 2] {
    let mut pipe = [0; 2];
    // SAFETY: pipe is live and has room for two.
    expect("pipe", unsafe { libc::pipe(pipe.as_mut_ptr()) }.into(), 0);
    pipe
}

/// Children in a crowd.
const CROWD: usize = 60;

/// Whether there is a file; for who may not allocate.
fn exists(path: &CStr) -> bool {
    // SAFETY: the path is live and ends with a zero.
    unsafe { libc::access(path.as_ptr(), libc::F_OK) == 0 }
}

struct Program {
    blocks: Vec<Block>,
    /// What children do not get.
    own: Block,
    pipe: [i32; 2],
    done: u64,
}

impl Program {
    /// A number that looks random.
    fn number(&self, salt: u64, below: usize) -> usize {
        (mix(mix(self.done) ^ salt) % below as u64) as usize
    }

    /// The kernel reads one page, and writes another.
    fn through_a_pipe(&mut self, from: (usize, usize), to: (usize, usize)) {
        let [reader, writer] = self.pipe;
        let source = self.blocks[from.0].address(from.1) as *const _;
        let sink = self.blocks[to.0].address(to.1) as *mut _;
        // SAFETY: whole pages of blocks; the pipe has room for one.
        let (n, m) = unsafe {
            (
                libc::write(writer, source, PAGE),
                libc::read(reader, sink, PAGE),
            )
        };
        expect("write", n as i64, PAGE as i64);
        expect("read", m as i64, PAGE as i64);
        self.blocks[to.0].values[to.1] = self.blocks[from.0].values[from.1];
        self.blocks[to.0].look(to.1);
    }

    /// A child that has all of it, and children of its own.
    fn fork(&mut self, depth: u32) {
        // SAFETY: the child looks at memory, makes system calls, and ends.
        let pid = unsafe { libc::fork() };
        if pid == 0 {
            self.done ^= u64::from(depth) << 32;
            self.pipe = pipe();
            if depth > 0 {
                self.fork(depth - 1);
            }
            for _ in 0..300 {
                self.done += 1;
                self.act(false);
            }
            // SAFETY: does not return.
            unsafe { libc::_exit(0) }
        }
        let pid = good("fork", pid.into()) as i32;
        for _ in 0..300 {
            self.done += 1;
            self.act(false);
        }
        let mut status = 0;
        // SAFETY: status is live.
        let ended = unsafe { libc::waitpid(pid, &raw mut status, 0) };
        expect("waitpid", ended.into(), pid.into());
        expect("the status of a child", status.into(), 0);
    }

    /// Many children, each with all of it but what is not for children.
    fn crowd(&mut self, go: &CStr) {
        let mut children = [0; CROWD];
        for child in &mut children {
            // SAFETY: the child looks at memory, makes system calls, and ends.
            *child = unsafe { libc::fork() };
            if *child == 0 {
                let wait = libc::timespec {
                    tv_sec: 0,
                    tv_nsec: 1_000_000,
                };
                while !exists(go) {
                    // SAFETY: the time is live.
                    unsafe { libc::nanosleep(&raw const wait, std::ptr::null_mut()) };
                }
                self.own.values.fill(0);
                self.look();
                // SAFETY: does not return.
                unsafe { libc::_exit(0) }
            }
            let _ = good("fork", (*child).into());
        }
        for child in children {
            let mut status = 0;
            // SAFETY: status is live.
            let ended = unsafe { libc::waitpid(child, &raw mut status, 0) };
            expect("waitpid", ended.into(), child.into());
            expect("the status of a child", status.into(), 0);
        }
        say("alone again");
    }

    /// Looks at every page.
    fn look(&self) {
        let all = self.blocks.iter().chain([&self.own]);
        all.for_each(|block| (0..PAGES).for_each(|p| block.look(p)));
    }

    fn act(&mut self, forks: bool) {
        let (block, page) = (self.number(1, self.blocks.len()), self.number(2, PAGES));
        let (other, beside) = (self.number(3, self.blocks.len()), self.number(4, PAGES));
        let count = 1 + self.number(5, 20);
        let value = self.done | 1 << 60;
        let what = self.number(6, 1000);
        let here = &mut self.blocks[block];
        match what {
            0..500 => here.look(page),
            500..740 => here.put(page, value),
            740..752 => here.give_back(page, count),
            752..790 => here.move_away(),
            790 if count > 15 => here.replace(),
            791..850 => here.protect(page, count),
            850..950 => self.through_a_pipe((block, page), (other, beside)),
            950..952 if forks => self.fork(1),
            _ => here.put(page, value),
        }
        self.blocks[block].look(page);
    }
}

fn main() {
    let word = |n: usize| std::env::args().nth(n).unwrap_or_default();
    let blocks: usize = word(1).parse().unwrap_or(1);
    let (end, forks) = (PathBuf::from(word(3)), word(2) + ".forks");
    let forks = PathBuf::from(forks);
    let rounds = OpenOptions::new().append(true).create(true).open(word(2));
    let mut rounds: File = rounds.unwrap_or_else(|e| panic!("{}: {e}", word(2)));
    let block = |n: usize| {
        let mut block = Block {
            at: map(0, RW),
            values: vec![0; PAGES],
        };
        (0..PAGES).for_each(|p| block.put(p, mix((n * PAGES + p) as u64) | 1));
        block
    };
    let own = block(blocks);
    // SAFETY: a block as a whole.
    let wiped = unsafe { libc::madvise(own.at as *mut _, BLOCK, libc::MADV_WIPEONFORK) };
    expect("madvise", wiped.into(), 0);
    let mut program = Program {
        blocks: (0..blocks).map(block).collect(),
        own,
        pipe: pipe(),
        done: 0,
    };
    say("ready");
    let mut round = 0;
    let crowd = PathBuf::from(word(2) + ".crowd");
    let go = CString::new(word(2) + ".alone").unwrap_or_default();
    let mut crowded = false;
    while word(4) == "still" && !end.exists() {
        if !crowded && crowd.exists() {
            crowded = true;
            program.crowd(&go);
        }
        program.done += 1;
        let page = program.done as usize % PAGES;
        program.blocks[0].put(page, program.done | 1 << 60);
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
    while !end.exists() {
        let forks = forks.exists();
        for _ in 0..ROUND {
            program.done += 1;
            program.act(forks);
        }
        round += 1;
        let written = rounds.write_all(format!("{round}\n").as_bytes());
        check(written.is_ok(), || {
            format!("the file of rounds: {written:?}")
        });
    }
    program.look();
    std::process::exit(7);
}
