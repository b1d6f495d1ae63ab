//! What survives: the types of the heap.

use crate::processor::{PAGE, PAGES, REGISTERS};
use crate::user;
use resilient_heap::{Error, PBox, PVec, Persist, Tx};

/// A task of the kernel that counts in the heap.
pub const TALLY: u64 = 0;
/// A program that finds primes.
pub const PRIMES: u64 = 1;
/// A program that stirs numbers.
pub const MIXER: u64 = 2;
/// A task of the kernel that flips bits, and looks whether they are found.
pub const RAY: u64 = 3;

/// What the tasks are, in the order in which they run.
pub const TASKS: [u64; 5] = [TALLY, PRIMES, RAY, MIXER, TALLY];

/// Numbers that are written once and read for ever: where rays go.
pub const ARCHIVE: usize = 8192;

/// The root.
#[derive(Persist)]
#[repr(C)]
pub struct Kept<'h> {
    /// The kernel's code that the registers and stacks of programs belong to.
    pub build: u64,
    /// How often the machine came up.
    pub boots: u64,
    /// How many lines tasks have said.
    pub said: u64,
    /// Where the dice of the rays are.
    pub dice: u64,
    /// Lines that were said, and that may not have been printed yet.
    pub unprinted: PVec<'h, Said>,
    /// The processes.
    pub processes: PVec<'h, Process<'h>>,
    /// See [`ARCHIVE`].
    pub archive: PVec<'h, u64>,
}

/// A line that a task said.
#[derive(Clone, Copy, Persist)]
#[repr(C)]
pub struct Said {
    /// Counted from 1, over all tasks.
    pub number: u64,
    /// Which task.
    pub task: u64,
    /// What it said.
    pub words: [u64; 2],
}

/// A process.
#[derive(Persist)]
#[repr(C)]
pub struct Process<'h> {
    /// What it runs.
    pub program: u64,
    /// How often it had its turn.
    pub counter: u64,
    /// Its registers.
    pub registers: [u64; REGISTERS],
    /// Those for broken numbers.
    pub vectors: [u64; 64],
    /// Its memory; nothing for tasks of the kernel.
    pub memory: PVec<'h, PBox<'h, [u64; PAGE / 8]>>,
}

/// What number `i` of the archive is.
pub fn archived(i: u64) -> u64 {
    (i + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(29)
}

/// Everything, as it is when the machine comes up for the first time.
pub fn first<'h>(tx: &Tx<'h>, build: u64) -> Result<Kept<'h>, Error> {
    let mut processes = PVec::new();
    for program in TASKS {
        let mut memory = PVec::new();
        if matches!(program, PRIMES | MIXER) {
            for _ in 0..PAGES {
                memory.push(tx, PBox::new(tx, [0; PAGE / 8])?)?;
            }
        }
        let mut vectors = [0; 64];
        // As the processor has them after a reset: all exceptions masked.
        vectors[0] = 0x37f;
        vectors[3] = 0x1f80;
        let process = Process {
            program,
            counter: 0,
            registers: user::beginning(program),
            vectors,
            memory,
        };
        processes.push(tx, process)?;
    }
    let mut archive = PVec::new();
    archive.reserve(tx, ARCHIVE)?;
    for i in 0..ARCHIVE {
        archive.push(tx, archived(i as u64))?;
    }
    Ok(Kept {
        build,
        boots: 0,
        said: 0,
        dice: 1,
        unprinted: PVec::new(),
        processes,
        archive,
    })
}
