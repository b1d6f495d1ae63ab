//! Stand-ins for a program and a store, for tests of the order of things.

use crate::epoch::{EpochLog, Frozen, Program, Snapshot};
use outlive_epoch::{Acked, EpochFacts, EpochId, EpochWriter, PageSink, Run, StoreError};
use outlive_epoch_store::{Ahead, CommitTimes, Scrubbed};
use outlive_process::{ProcessError, StopTimes};
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use std::{cell::RefCell, rc::Rc, time::Duration};

pub type Trace = Rc<RefCell<Vec<&'static str>>>;

/// A program that records what is done to it and fails at one chosen step.
pub struct FakeProgram {
    pub trace: Trace,
    pub fail: Rc<RefCell<Option<&'static str>>>,
    /// Ended by `Frozen::end`, where the test has a real process to stand for the program.
    pub process: Rc<RefCell<Option<std::process::Child>>>,
    /// How often a limit is reached.
    pub presses: u32,
    pub pressed: Option<(OwnedFd, OwnedFd)>,
    /// Pages that are said to have been dirty at most.
    pub most: Rc<RefCell<u64>>,
}

impl FakeProgram {
    pub fn new(fail: Option<&'static str>) -> Self {
        Self {
            trace: Trace::default(),
            fail: Rc::new(RefCell::new(fail)),
            process: Rc::default(),
            presses: 0,
            pressed: None,
            most: Rc::default(),
        }
    }

    fn step(&self, name: &'static str) -> Result<(), ProcessError> {
        step(&self.trace, &self.fail, name)
    }
}

fn step(
    trace: &Trace,
    fail: &Rc<RefCell<Option<&'static str>>>,
    name: &'static str,
) -> Result<(), ProcessError> {
    trace.borrow_mut().push(name);
    let behind = *fail.borrow();
    if name == "write" && matches!(behind, Some("behind" | "behind once")) {
        let (pid, address) = (1, 4096);
        fail.replace(behind.filter(|how| *how == "behind"));
        return Err(ProcessError::GivenBack { pid, address });
    }
    if *fail.borrow() == Some(name) {
        return Err(ProcessError::Image(format!("planted in {name}")));
    }
    Ok(())
}

pub struct FakeFrozen<'a> {
    program: &'a mut FakeProgram,
    done: bool,
}

impl Frozen for FakeFrozen<'_> {
    fn resume(mut self) -> Result<Duration, ProcessError> {
        self.done = true;
        self.program
            .step("resume")
            .map(|()| Duration::from_micros(500))
    }

    fn end(mut self) -> Result<(), ProcessError> {
        self.done = true;
        if let Some(child) = self.program.process.borrow_mut().as_mut() {
            child.kill().expect("kill");
            child.wait().expect("wait");
        }
        self.program.step("end")
    }
}

impl Drop for FakeFrozen<'_> {
    fn drop(&mut self) {
        if !self.done {
            self.program.trace.borrow_mut().push("dropped");
        }
    }
}

pub struct FakeSnapshot {
    trace: Trace,
    fail: Rc<RefCell<Option<&'static str>>>,
}

impl Snapshot for FakeSnapshot {
    fn facts(&self) -> EpochFacts {
        EpochFacts {
            taken_at_ns: 1,
            stop_us: 0,
        }
    }

    fn counts(&self) -> (u32, u32) {
        (1, 2)
    }

    fn write(&self, _: &mut dyn EpochWriter) -> Result<(), ProcessError> {
        step(&self.trace, &self.fail, "write")
    }

    fn sync_files(&self) -> Result<(), ProcessError> {
        step(&self.trace, &self.fail, "sync")
    }

    fn sync_closed_files(&self) -> Result<(), ProcessError> {
        step(&self.trace, &self.fail, "closed")
    }

    fn times(&self) -> StopTimes {
        StopTimes::default()
    }

    fn unsynced_bytes(&self) -> Option<u64> {
        None
    }
}

impl Program for FakeProgram {
    type Frozen<'a> = FakeFrozen<'a>;
    type Snapshot = FakeSnapshot;

    fn precopy(
        &mut self,
        _: &mut dyn PageSink,
        hurry: &mut dyn FnMut() -> bool,
    ) -> Result<(), ProcessError> {
        if hurry() {
            self.step("hurried")?;
        }
        self.step("precopy")
    }

    fn stop(
        &mut self,
        _: &mut dyn PageSink,
        _: Option<Duration>,
    ) -> Result<(FakeFrozen<'_>, FakeSnapshot), ProcessError> {
        self.step("stop")?;
        let snapshot = FakeSnapshot {
            trace: self.trace.clone(),
            fail: self.fail.clone(),
        };
        Ok((
            FakeFrozen {
                program: self,
                done: false,
            },
            snapshot,
        ))
    }

    fn forget_progress(&mut self) {
        self.trace.borrow_mut().push("forget");
    }

    fn owe(&mut self, _: &mut FakeSnapshot) {
        self.trace.borrow_mut().push("owe");
    }

    fn owed_pages(&self) -> u64 {
        0
    }

    fn detach(self) -> Result<(), ProcessError> {
        self.step("detach")
    }

    fn full_copy_because(&self) -> Option<String> {
        None
    }

    fn tracking(&self) -> &'static str {
        "write-protect"
    }

    fn stop_within(&mut self, timeout: Duration) -> Duration {
        timeout
    }

    fn dirty_pages(&self) -> Option<u64> {
        Some(7)
    }

    fn most_dirty(&self) -> u64 {
        *self.most.borrow()
    }

    fn exposed_pages(&self) -> u64 {
        0
    }

    fn expose(&self) {}

    fn limit_dirty(&mut self, pages: Option<u64>) {
        let what = if pages.is_some() { "limit" } else { "no limit" };
        self.trace.borrow_mut().push(what);
        self.pressed = None;
        // Pressed at once, whoever writes.
        if pages.is_some() && self.presses > 0 {
            self.presses -= 1;
            let (read, write) = rustix::pipe::pipe().expect("pipe");
            rustix::io::write(&write, b"x").expect("write");
            self.pressed = Some((read, write));
        }
    }

    fn pressure(&self) -> Vec<BorrowedFd<'_>> {
        self.pressed.iter().map(|(read, _)| read.as_fd()).collect()
    }
}

/// A store that only counts.
#[derive(Default)]
pub struct FakeLog {
    pub committed: u64,
    pub bases: u64,
    pub fail_commit: bool,
    /// So many epochs cannot be begun.
    pub fail_begin: u32,
    /// Pieces that were written ahead.
    pub ahead: u64,
    /// What checking what is stored finds, the last one first; nothing, once there are no more.
    pub scrubs: Vec<Result<Scrubbed, StoreError>>,
}

struct FakeWriter<'a> {
    log: &'a mut FakeLog,
    base: bool,
}

impl PageSink for FakeWriter<'_> {
    fn put(&mut self, _: Run, _: &[u8]) -> Result<(), StoreError> {
        Ok(())
    }

    fn absent(&mut self, _: Run) -> Result<(), StoreError> {
        Ok(())
    }
}

impl EpochWriter for FakeWriter<'_> {
    fn id(&self) -> EpochId {
        EpochId(self.log.committed + 1)
    }

    fn zero(&mut self, _: Run) -> Result<(), StoreError> {
        Ok(())
    }

    fn tree(&mut self, _: &str, _: &[u8]) -> Result<(), StoreError> {
        Ok(())
    }

    fn commit(self: Box<Self>, _: EpochFacts) -> Result<Acked, StoreError> {
        if self.log.fail_commit {
            return Err(StoreError::Full {
                place: "fake".into(),
                needed: 1,
            });
        }
        self.log.committed += 1;
        self.log.bases += u64::from(self.base);
        Ok(Acked {
            epoch: EpochId(self.log.committed),
            bytes_written: 4096,
            pages: 1,
            saved_bytes: 0,
        })
    }
}

impl EpochLog for FakeLog {
    fn begin(&mut self) -> Result<Box<dyn EpochWriter + '_>, StoreError> {
        if let Some(left) = self.fail_begin.checked_sub(1) {
            self.fail_begin = left;
            return Err(StoreError::Full {
                place: "fake".into(),
                needed: 1,
            });
        }
        Ok(Box::new(FakeWriter {
            log: self,
            base: false,
        }))
    }

    fn begin_base(&mut self) -> Result<Box<dyn EpochWriter + '_>, StoreError> {
        Ok(Box::new(FakeWriter {
            log: self,
            base: true,
        }))
    }

    fn begin_event(&mut self) -> Result<Box<dyn EpochWriter + '_>, StoreError> {
        self.begin()
    }

    fn write_ahead(&mut self, _: u64) -> Result<Ahead, StoreError> {
        self.ahead += 1;
        Ok(Ahead {
            written: 1 << 40,
            more: self.ahead < 3,
        })
    }

    fn scrub(&mut self) -> Result<Scrubbed, StoreError> {
        let nothing = Scrubbed {
            finished: true,
            ..Scrubbed::default()
        };
        self.scrubs.pop().unwrap_or(Ok(nothing))
    }

    fn newest(&self) -> u64 {
        self.committed
    }

    fn log_bytes(&self) -> u64 {
        0
    }

    fn live_bytes(&mut self) -> u64 {
        0
    }

    fn last_commit(&self) -> CommitTimes {
        CommitTimes::default()
    }

    fn free_bytes(&self) -> Option<u64> {
        None
    }
}
