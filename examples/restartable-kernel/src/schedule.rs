//! Who runs when, and what of it is kept: after each turn of a task, everything, in one transaction.
//!
//! # Rules
//! - What a task does in its turn becomes durable all at once: its counter, its registers, the pages of
//!   its memory that it changed, and the lines that it said.
//! - A line is printed after it is durable, never before. The lines of the last turn are still in the heap
//!   when the machine comes up, and are printed again, as such: nothing that was durable goes unsaid.
//! - What flips in the memory is reported, and what is lost ends the kernel.

use crate::processor::{
    self, DEVICES, Frames, IP, PAGES, REGISTERS, SI, TIMER, VECTOR, WISH, changed, heard, set_timer,
};
use crate::serial::say;
use crate::state::{self, Kept, RAY, Said, TALLY};
use crate::survivor::{Survivor, shoot};
use crate::{processor::DI, report};
use alloc::boxed::Box;
use alloc::string::{String, ToString};
use alloc::vec::Vec;
use resilient_heap::{Error, Heap, Options};

/// How long a program may run in its turn, in microseconds.
const TURN: u32 = 3000;
/// How many lines a program may say in its turn.
const LINES: usize = 40;
/// Data pages of the heap's zones.
const ZONE: u64 = 256;

/// A program as it runs: a copy of what is in the heap.
struct Program {
    registers: [u64; REGISTERS],
    vectors: [u64; 64],
    frames: Box<Frames>,
}

/// All tasks.
pub struct Schedule {
    heap: Heap<Kept<'static>>,
    programs: Vec<Option<Program>>,
    /// Where the archive is in the memory that survives: rays go there.
    archive: usize,
    /// A ray was shot, and its hit was not looked for yet.
    hit: bool,
}

fn words(error: Error) -> String {
    error.to_string()
}

impl Schedule {
    /// Opens the heap, says what became of it, and makes the copies anew.
    ///
    /// # Errors
    /// What cannot go on.
    pub fn begin(memory: Survivor) -> Result<Self, String> {
        let base = memory.begin();
        let build = report::fingerprint(processor::text());
        let options = Options::default().zone_pages(ZONE).identity(build | 1);
        let mut heap = options
            .open::<Kept<'_>>(memory, |tx| state::first(tx, build))
            .map_err(words)?;
        let (opened, corrected) = (heap.opened(), heap.health().corrected);
        let found = heap.scrub().map_err(words)?;
        let boots = heap
            .write(|kept, _| {
                if kept.build != build {
                    return Err(Error::Aborted("its programs belong to another build"));
                }
                kept.boots += 1;
                Ok(kept.boots)
            })
            .map_err(words)?;
        say!(
            "\nboot {boots} created {} replayed {} discarded {} corrected {corrected}",
            u8::from(opened.created),
            opened.replayed,
            u8::from(opened.discarded)
        );
        report::scrubbed(&found);
        let mut schedule = Self {
            heap,
            programs: Vec::new(),
            archive: 0,
            hit: false,
        };
        schedule.archive = schedule.look_at_the_archive()?.wrapping_sub(base);
        say!("archive {} {}", schedule.archive, state::ARCHIVE * 8);
        schedule.bring_back().map_err(words)?;
        Ok(schedule)
    }

    /// Checks every number of the archive; where it is.
    fn look_at_the_archive(&self) -> Result<usize, String> {
        let look = self.heap.read(|kept, snapshot| {
            let archive = kept.archive.as_slice(snapshot)?;
            let right = (0..).zip(archive).all(|(i, n)| *n == state::archived(i));
            Ok((
                right && archive.len() == state::ARCHIVE,
                archive.as_ptr().addr(),
            ))
        });
        match look.map_err(words)? {
            (true, at) => Ok(at),
            (false, _) => Err("the archive is wrong".to_string()),
        }
    }

    /// Copies of the programs; and the lines that may not have been printed.
    fn bring_back(&mut self) -> Result<(), Error> {
        let (programs, counters, lines) = self.heap.read(|kept, snapshot| {
            let (mut programs, mut counters) = (Vec::new(), Vec::new());
            for process in kept.processes.as_slice(snapshot)? {
                counters.push((process.program, process.counter));
                let memory = process.memory.as_slice(snapshot)?;
                if memory.is_empty() {
                    programs.push(None);
                    continue;
                }
                let mut frames = Box::new(Frames([[0; processor::PAGE / 8]; PAGES]));
                for (frame, page) in frames.0.iter_mut().zip(memory) {
                    *frame = *page.get(snapshot)?;
                }
                programs.push(Some(Program {
                    registers: process.registers,
                    vectors: process.vectors,
                    frames,
                }));
            }
            Ok((
                programs,
                counters,
                kept.unprinted.as_slice(snapshot)?.to_vec(),
            ))
        })?;
        self.programs = programs;
        for (task, (program, counter)) in counters.into_iter().enumerate() {
            say!("task {task} {program} {counter}");
        }
        print("again", &lines);
        Ok(())
    }

    /// Lets all tasks have their turns.
    ///
    /// # Errors
    /// What cannot go on.
    pub fn run_for_ever(mut self) -> Result<(), String> {
        loop {
            for (task, program) in state::TASKS.into_iter().enumerate() {
                let said = match self.programs.get_mut(task) {
                    Some(Some(running)) => turn(running)?,
                    _ => Vec::new(),
                };
                if program == RAY {
                    self.look_for_flips()?;
                }
                let said = self.keep(task, program, &said).map_err(words)?;
                print("say", &said);
            }
        }
    }

    /// Makes a turn durable. The lines that became durable with it.
    fn keep(&mut self, task: usize, program: u64, said: &[[u64; 2]]) -> Result<Vec<Said>, Error> {
        let running = self.programs.get(task).and_then(Option::as_ref);
        self.heap.write(|kept, tx| {
            // What was said before is printed by now.
            kept.unprinted.truncate(tx, 0)?;
            let process = kept.processes.get_mut(tx, task)?;
            let process = process.ok_or(Error::Aborted("a process is missing"))?;
            process.counter += 1;
            let mut lines = said.to_vec();
            if program == TALLY {
                lines.push([process.counter, 0]);
            }
            if let Some(running) = running {
                process.registers = running.registers;
                process.vectors = running.vectors;
                for (number, frame) in running.frames.0.iter().enumerate() {
                    if changed(number)
                        && let Some(page) = process.memory.get_mut(tx, number)?
                    {
                        *page.get_mut(tx)? = *frame;
                    }
                }
            }
            let mut durable = Vec::new();
            for words in lines {
                kept.said += 1;
                let task = task as u64;
                let number = kept.said;
                durable.push(Said {
                    number,
                    task,
                    words,
                });
            }
            kept.unprinted.extend_from_slice(tx, &durable)?;
            Ok(durable)
        })
    }

    /// Now and then, lets a ray hit the archive in the middle of the next commit; and looks, a turn later,
    /// whether the hit is found.
    fn look_for_flips(&mut self) -> Result<(), String> {
        let dice = self
            .heap
            .write(|kept, _| {
                kept.dice = kept
                    .dice
                    .wrapping_mul(6_364_136_223_846_793_005)
                    .wrapping_add(1);
                Ok(kept.dice >> 20)
            })
            .map_err(words)?;
        match dice % 8 {
            0 if !self.hit => {
                self.hit = true;
                let bit = (dice >> 3) as usize % (state::ARCHIVE * 64);
                let place = self.archive + bit / 8;
                // First it is announced: if the machine is reset in between, it may have hit.
                say!("ray {place} {}", bit % 8);
                shoot(place, bit);
            }
            1 => {
                self.hit = false;
                self.look_at_the_archive()?;
                let found = self.heap.scrub().map_err(words)?;
                report::scrubbed(&found);
                if !found.lost.is_empty() {
                    return Err("data is lost".to_string());
                }
            }
            _ => {}
        }
        Ok(())
    }
}

fn print(how: &str, lines: &[Said]) {
    for line in lines {
        let [a, b] = line.words;
        say!("{how} {} {} {a} {b}", line.number, line.task);
    }
}

/// A program's turn; what it said.
fn turn(program: &mut Program) -> Result<Vec<[u64; 2]>, String> {
    let mut said = Vec::new();
    processor::show(&mut program.frames);
    set_timer(TURN);
    loop {
        let (registers, vectors) = (&mut program.registers, &mut program.vectors);
        processor::run_program(&mut program.frames, registers, vectors);
        match program.registers[VECTOR] {
            WISH => {
                said.push([program.registers[DI], program.registers[SI]]);
                if said.len() == LINES {
                    return Ok(said);
                }
            }
            vector if DEVICES.contains(&vector) => {
                heard();
                if vector == TIMER {
                    return Ok(said);
                }
            }
            vector => {
                let at = program.registers[IP];
                return Err(alloc::format!("a program fell over: {vector} at {at:#x}"));
            }
        }
    }
}
