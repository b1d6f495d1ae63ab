//! Stopping all threads of a process, and letting them go on as if nothing had happened.
//!
//! # Rules
//! - A thread that is let go, in whatever way (also by an error on our side), gets back exactly
//!   the registers and the signal mask that it had, unless the caller says otherwise.
//! - Nobody stays seized: seize, work, detach.

use crate::target::{Status, Target};
use crate::{ProcessError, preflight};
use outlive_linux::Errno;
use outlive_linux::ptrace::{Halted, Registers, Running, Stop, WaitError};
use outlive_linux::remote::{Arena, Batch, InFlight, RemoteError, Rescue, Results, restarted};
use outlive_linux::single::Site;
use std::borrow::BorrowMut;
use std::collections::{BTreeMap, VecDeque};
use std::time::{Duration, Instant};

/// A stopped thread.
#[derive(Debug)]
pub struct Held {
    /// The thread.
    pub tid: u32,
    /// Its registers at the stop.
    pub registers: Registers,
    /// The registers that it goes on with: those at the stop, unless an interrupted call is to be
    /// made again.
    pub go_on: Registers,
    /// Its signal mask at the stop; what it goes on with.
    pub mask: u64,
    halted: Option<Halted>,
    /// Remote calls were made: registers and mask must be put back.
    touched: bool,
}

impl Held {
    /// Takes charge of a stopped thread.
    pub fn new(halted: Halted) -> Result<Self, Errno> {
        let registers = halted.registers()?;
        let mask = halted.signal_mask()?;
        Ok(Self {
            tid: halted.tid(),
            registers,
            go_on: registers,
            mask,
            halted: Some(halted),
            touched: false,
        })
    }

    /// Whether it stands at an instruction that faulted and is to be made again: the processor notes
    /// that, in a flag that it clears for everything else but repeated instructions.
    #[must_use]
    pub fn is_at_fault(&self) -> bool {
        /// The resume flag.
        const RESUME: u64 = 1 << 16;
        self.registers.eflags & RESUME != 0
    }

    /// The stopped thread, for reading more of it.
    pub fn halted(&self) -> Result<&Halted, RemoteError> {
        self.halted
            .as_ref()
            .ok_or(RemoteError::Wait(WaitError::Ended { tid: self.tid }))
    }

    /// The stopped thread, for changing it.
    pub fn halted_mut(&mut self) -> Result<&mut Halted, RemoteError> {
        self.halted
            .as_mut()
            .ok_or(RemoteError::Wait(WaitError::Ended { tid: self.tid }))
    }

    fn take(&mut self) -> Result<Halted, RemoteError> {
        self.touched = true;
        self.halted
            .take()
            .ok_or(RemoteError::Wait(WaitError::Ended { tid: self.tid }))
    }

    fn rescue(&self) -> Rescue {
        Rescue {
            registers: self.go_on,
            mask: self.mask,
        }
    }

    /// Makes one system call where there is no working memory.
    pub fn single(
        &mut self,
        site: Site,
        number: i64,
        args: [u64; 6],
    ) -> Result<Result<u64, Errno>, RemoteError> {
        let rescue = self.rescue();
        let (halted, result) = site.call(self.take()?, number, args, &rescue)?;
        self.halted = Some(halted);
        Ok(result)
    }

    /// Leaves the place of a single call, and tidies it up.
    pub fn vacate(&mut self, site: Site) -> Result<(), Errno> {
        let (registers, mask) = (restarted(self.go_on), self.mask);
        match &mut self.halted {
            Some(halted) => {
                put_back(halted, &registers, Some(mask))?;
                site.clear(self.tid)
            }
            // It has ended, or nobody knows where it is.
            None => Ok(()),
        }
    }

    /// Sends the thread into a batch; for a process that is being made. It is not held until
    /// [`Held::finish`].
    pub fn begin(&mut self, arena: &Arena, batch: Batch) -> Result<InFlight, RemoteError> {
        arena.begin(self.take()?, 0, batch, None)
    }

    /// Waits until a batch is done, and holds the thread again.
    pub fn finish(&mut self, arena: &Arena, flight: InFlight) -> Result<Results, RemoteError> {
        let (halted, results) = arena.finish(flight)?;
        self.halted = Some(halted);
        Ok(results)
    }

    /// Runs a batch of system calls.
    pub fn run(&mut self, arena: &Arena, batch: Batch) -> Result<Results, RemoteError> {
        let rescue = self.rescue();
        let (halted, results) = arena.run(self.take()?, batch, Some(&rescue))?;
        self.halted = Some(halted);
        Ok(results)
    }

    /// Takes the thread out of a group of remote calls' hands: it is not restored when dropped.
    /// For a process that is being made.
    pub fn into_halted(mut self) -> Option<Halted> {
        self.halted.take()
    }

    /// Puts registers and mask back now: from here on nothing of the working memory is needed to let
    /// the thread go on, whoever does that.
    pub fn settle(&mut self) -> Result<(), Errno> {
        match &mut self.halted {
            Some(halted) => put_back(halted, &self.go_on, Some(self.mask)),
            None => Ok(()),
        }
    }

    /// Registers and mask are to be put back in any case.
    pub fn touch(&mut self) {
        self.touched = true;
    }

    /// Lets the thread go on.
    pub fn release(mut self) -> Result<(), Errno> {
        match self.halted.take() {
            Some(mut halted) => {
                put_back(&mut halted, &self.go_on, self.touched.then_some(self.mask))?;
                halted.detach()
            }
            None => Ok(()),
        }
    }
}

fn put_back(halted: &mut Halted, registers: &Registers, mask: Option<u64>) -> Result<(), Errno> {
    // In this order: who is left with other registers helps itself.
    let done = match mask {
        Some(mask) => halted.set_signal_mask(mask),
        None => Ok(()),
    };
    match done.and_then(|()| halted.set_registers(registers)) {
        // Killed meanwhile: nothing to put back.
        Err(Errno::SRCH) => Ok(()),
        r => r,
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        if let Some(halted) = &mut self.halted {
            let _ = put_back(halted, &self.go_on, self.touched.then_some(self.mask));
        }
    }
}

/// Runs one batch in each of some threads, as many at the same time as the arena has slots.
pub fn run_all<H: BorrowMut<Held>>(
    arena: &Arena,
    threads: &mut [H],
    batch_of: impl FnMut(&Held) -> Batch,
) -> Result<Vec<Results>, RemoteError> {
    run_all_while(arena, threads, batch_of, || {})
}

/// The same, and does something while the first of them are at it.
pub fn run_all_while<H: BorrowMut<Held>>(
    arena: &Arena,
    threads: &mut [H],
    mut batch_of: impl FnMut(&Held) -> Batch,
    meanwhile: impl FnOnce(),
) -> Result<Vec<Results>, RemoteError> {
    let mut all = Vec::with_capacity(threads.len());
    let mut meanwhile = Some(meanwhile);
    for group in threads.chunks_mut(arena.slots()) {
        let mut flights = Vec::with_capacity(group.len());
        for (slot, held) in group.iter_mut().enumerate() {
            let held = held.borrow_mut();
            let (batch, rescue) = (batch_of(held), held.rescue());
            flights.push(arena.begin(held.take()?, slot, batch, Some(&rescue))?);
        }
        if let Some(meanwhile) = meanwhile.take() {
            meanwhile();
        }
        // Every thread is brought back before an error is passed on.
        let mut failed = None;
        let landings: Vec<_> = flights.into_iter().map(|f| arena.call_back(f)).collect();
        for (held, landing) in group.iter_mut().zip(landings) {
            match landing.and_then(|landing| arena.land(landing)) {
                Ok((halted, results)) => {
                    held.borrow_mut().halted = Some(halted);
                    all.push(results);
                }
                Err(e) => failed = failed.or(Some(e)),
            }
        }
        if let Some(e) = failed {
            return Err(e);
        }
    }
    Ok(all)
}

/// Stops every thread of a process; its leader comes first. New threads that appear meanwhile are
/// stopped too: when a listing shows no new one while all known ones stand still, all are held.
///
/// If that fails, those that stand go on as they were: `prepare` is called with each, so that a
/// call which the stop interrupted is made again.
pub fn freeze(
    target: &Target,
    timeout: Duration,
    prepare: &mut dyn FnMut(&mut Held),
) -> Result<Vec<Held>, ProcessError> {
    let mut stopping = Stopping::default();
    let stopped = stopping
        .stop_all(target, timeout)
        .and_then(|()| stopping.leader_first(target));
    stopped.inspect_err(|_| stopping.give_up(prepare))
}

/// Threads on their way to a stop.
#[derive(Default)]
struct Stopping {
    held: BTreeMap<u32, Held>,
    /// Ordered to stop, and not seen to stand.
    fresh: VecDeque<Running>,
    /// The one that could not be waited for.
    stuck: Option<Running>,
}

impl Stopping {
    fn stop_all(&mut self, target: &Target, timeout: Duration) -> Result<(), ProcessError> {
        let deadline = Instant::now() + timeout;
        loop {
            for tid in target.threads()? {
                if !self.held.contains_key(&tid) {
                    self.fresh.extend(seize(target, tid)?);
                }
            }
            if self.fresh.is_empty() {
                return Ok(());
            }
            while let Some(running) = self.fresh.pop_front() {
                let tid = running.tid();
                match await_stop(target, running, deadline) {
                    Ok(halted) => {
                        refuse_group_stop(target, &halted)?;
                        let h =
                            Held::new(halted).map_err(|e| target.kernel("reading registers", e))?;
                        self.held.insert(tid, h);
                    }
                    Err((_, WaitError::Ended { .. })) if tid != target.pid => {}
                    Err((stuck, e)) => {
                        self.stuck = stuck;
                        return Err(wait_failed(target, timeout, e));
                    }
                }
            }
        }
    }

    fn leader_first(&mut self, target: &Target) -> Result<Vec<Held>, ProcessError> {
        let Some(leader) = self.held.remove(&target.pid) else {
            return Err(ProcessError::Gone {
                pid: target.pid,
                what: "its leading thread has ended while others run".into(),
            });
        };
        let rest = std::mem::take(&mut self.held).into_values();
        Ok([leader].into_iter().chain(rest).collect())
    }

    /// Lets all go on. Those that were ordered to stop will, and mostly at once.
    fn give_up(&mut self, prepare: &mut dyn FnMut(&mut Held)) {
        const SOON: Duration = Duration::from_millis(100);
        let deadline = Instant::now() + SOON;
        let mut release = |mut held: Held| {
            prepare(&mut held);
            // It may have been killed meanwhile.
            let _ = held.release();
        };
        // Those that stand do not wait for the others.
        let held = std::mem::take(&mut self.held);
        held.into_values().for_each(&mut release);
        // The last thread that is waited for is the leading one, where all were killed.
        for running in self.fresh.drain(..).chain(self.stuck.take()) {
            // One that does not stop is let go when it comes back from the kernel.
            if let Ok(halted) = running.wait_interrupted(deadline)
                && let Ok(held) = Held::new(halted)
            {
                release(held);
            }
        }
    }
}

/// Waits for a thread that was ordered to stop. The leading thread of a process that was killed
/// cannot be waited for before all others were: that it has ended is looked up now and then.
fn await_stop(
    target: &Target,
    mut running: Running,
    deadline: Instant,
) -> Result<Halted, (Option<Running>, WaitError)> {
    const NOW_AND_THEN: Duration = Duration::from_millis(20);
    loop {
        let soon = deadline.min(Instant::now() + NOW_AND_THEN);
        match running.wait_interrupted(soon) {
            Err((Some(waiting), WaitError::Timeout { tid })) => {
                if Status::tells_end(target.pid, tid) {
                    return Err((Some(waiting), WaitError::Ended { tid }));
                }
                if Instant::now() >= deadline {
                    return Err((Some(waiting), WaitError::Timeout { tid }));
                }
                running = waiting;
            }
            done => return done,
        }
    }
}

fn seize(target: &Target, tid: u32) -> Result<Option<Running>, ProcessError> {
    let running = match Running::seize(tid, target.own_child && tid == target.pid) {
        Ok(running) => running,
        // The thread ended between the listing and now, or is a zombie.
        Err(Errno::SRCH) => return Ok(None),
        Err(Errno::PERM) if Status::tells_end(target.pid, tid) => return Ok(None),
        Err(Errno::PERM) => {
            let status = Status::read(target.pid, tid).ok();
            let traced = status.map(|status| preflight::of_thread(target, tid, &status));
            return Err(match traced {
                Some(refusals) if !refusals.is_empty() => ProcessError::Refused(refusals),
                _ => target.kernel(format!("tracing thread {tid}"), Errno::PERM),
            });
        }
        Err(e) => return Err(target.kernel(format!("tracing thread {tid}"), e)),
    };
    match running.interrupt() {
        Ok(()) => Ok(Some(running)),
        Err(Errno::SRCH) => Ok(None),
        Err(e) => Err(target.kernel(format!("stopping thread {tid}"), e)),
    }
}

fn refuse_group_stop(target: &Target, halted: &Halted) -> Result<(), ProcessError> {
    match halted.stop() {
        Stop::Event(signal) if signal != libc::SIGTRAP => {
            let what = format!("the program is stopped by signal {signal} (job control)");
            let r = target.refusal("", what, "let it continue (SIGCONT) and try again");
            Err(ProcessError::Refused(vec![r]))
        }
        _ => Ok(()),
    }
}

fn wait_failed(target: &Target, timeout: Duration, e: WaitError) -> ProcessError {
    match e {
        WaitError::Timeout { tid } => ProcessError::NotStopped {
            pid: target.pid,
            tid,
            waited_ms: timeout.as_millis() as u64,
        },
        WaitError::Ended { .. } => ProcessError::Gone {
            pid: target.pid,
            what: "ended meanwhile".into(),
        },
        WaitError::Kernel { source, .. } => target.kernel("waiting for it to stop", source),
    }
}

/// A remote call failed.
pub fn remote_failed(target: &Target, e: RemoteError) -> ProcessError {
    match e {
        RemoteError::Wait(e) => wait_failed(target, Duration::from_secs(60), e),
        RemoteError::Kernel { source, what, .. } => target.kernel(what, source),
        e => target.kernel(e.to_string(), std::io::Error::other("remote calls failed")),
    }
}
