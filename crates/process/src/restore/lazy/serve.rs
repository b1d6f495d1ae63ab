//! The two threads that serve missing pages: one to who waits, one all others.
//!
//! # Rules
//! - Events are read, and pages copied in, under one lock: once an event was read, nothing that it
//!   made obsolete is served any more. While one is unread, the kernel refuses to copy
//!   ([`Errno::AGAIN`]).
//! - A page counts as served when the kernel said so.
//! - The descriptors are closed only when nothing is missing, or when the program is dead; those by which
//!   memory is tracked, too, when its tracker is done with them ([`super::filling`]).
//! - A page comes clean only where it belongs at this address: elsewhere the epochs do not have it.

use super::filling::pages;
use super::holder::Holder;
use super::pending::{Part, Pending};
use super::{Served, Source};
use crate::family;
use crate::interval::IntervalSet;
use crate::lodger::Lodger;
use outlive_epoch::{Content, Order, PAGE_SIZE, Run, SpaceId, VisitError};
use outlive_linux::Errno;
use outlive_linux::demand::{Event, Guard, PageServer};
use outlive_linux::maps::{self, FlagsReader, VmFlags};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::fd::OwnedFd;
use rustix::process::{Signal, pidfd_send_signal};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

const PAGE: u64 = PAGE_SIZE as u64;
/// How long it may take until nobody waits at a descriptor that is to be closed.
const LETS_GO_WITHIN: Duration = Duration::from_secs(2);
/// Neighbours that come with a page somebody waits for, bytes, aligned.
const AROUND: u64 = 64 * 1024;
/// What is copied while somebody may be kept waiting, bytes.
const AT_ONCE: usize = 128 * 1024;
/// What is asked for again in one go, bytes …
pub(super) const AGAIN: u64 = 1 << 20;
/// … and in how many parts.
const PARTS: usize = 64;
/// How long a thread waits that has to be asked for again.
pub(super) const A_MOMENT: Duration = Duration::from_millis(1);
/// How often nothing comes of asking again before it is given up.
pub(super) const TRIES: u32 = 10_000;

/// One address space with missing pages.
pub struct Space {
    pub(super) server: Arc<PageServer>,
    pub(super) id: SpaceId,
    /// The process, where it is one that was restored, and what tells of its mappings when it makes a
    /// child: that takes the last descriptor there is, perhaps.
    pub(super) pid: Option<u32>,
    flags: Option<FlagsReader>,
    pub(super) pending: Pending,
    /// Addresses that somebody waits for and that could not be served yet.
    waiting: Vec<u64>,
    pub(super) ended: bool,
    /// Somebody tracks it by the same descriptor …
    pub(super) tracked: bool,
    /// … and has not heard yet that mappings were moved to these pages.
    pub(super) moved: IntervalSet,
    /// The thread that holds on to the missing pages.
    pub(super) lodger: Lodger,
}

impl Space {
    /// With these pages missing.
    pub fn new(server: PageServer, id: SpaceId, pid: u32, pending: Pending) -> Self {
        Self {
            pid: Some(pid),
            flags: FlagsReader::open(pid).ok(),
            ..Self::of(Arc::new(server), id, pending)
        }
    }

    /// Of no process that is known, which nobody tracks.
    fn of(server: Arc<PageServer>, id: SpaceId, pending: Pending) -> Self {
        Self {
            server,
            id,
            pid: None,
            flags: None,
            pending,
            waiting: Vec::new(),
            ended: false,
            tracked: false,
            moved: IntervalSet::default(),
            lodger: Lodger::default(),
        }
    }

    /// The missing pages, as the epoch has them.
    pub fn runs(&self) -> Vec<Run> {
        let run = |p: Part| Run::new(self.id, p.origin / PAGE, (p.end - p.start) / PAGE);
        self.pending.all().filter_map(run).collect()
    }

    /// Bytes that are missing.
    pub fn bytes(&self) -> u64 {
        self.pending.bytes()
    }

    /// Missing pages are zeros from now on.
    fn let_go(&self) {
        let mappings = self.pid.and_then(|pid| maps::read_with_flags(pid).ok());
        for (m, flags) in mappings.into_iter().flatten() {
            if flags.has(VmFlags::MISSING) {
                let _ = self.server.unregister(m.start, m.end);
            }
        }
    }

    /// A child that was made meanwhile, and misses nothing any more: neither does any that it makes.
    fn is_whole_child(&self) -> bool {
        self.pid.is_none() && self.pending.all().next().is_none()
    }

    /// A child has none of the memory that is not for children (`MADV_WIPEONFORK` after the restore).
    fn wipe(&self, pending: &mut Pending) -> std::io::Result<()> {
        let mappings = match (&self.flags, self.pid) {
            (Some(flags), _) => flags.read(),
            (None, Some(pid)) => maps::read_with_flags(pid),
            (None, None) => return Ok(()),
        };
        let gone =
            |e: &std::io::Error| matches!(e.raw_os_error(), Some(libc::ESRCH | libc::ENOENT));
        let mappings = match mappings {
            Err(e) if gone(&e) => return Ok(()),
            read => read?,
        };
        for (m, flags) in mappings {
            if flags.has(VmFlags::WIPE_ON_FORK) {
                pending.remove(m.start, m.end);
            }
        }
        Ok(())
    }

    fn over(&mut self) {
        self.ended = true;
        self.pending = Pending::default();
        self.waiting.clear();
    }

    /// Copies contents, which the epoch has at `origin`, to where they are missing. What cannot be served
    /// now stays missing; the error says why.
    fn put(
        &mut self,
        (at, origin): (u64, u64),
        length: u64,
        content: Content<'_>,
    ) -> Result<u64, Errno> {
        let clean = self.tracked && at == origin;
        let mut done = 0;
        let (mut failed, mut single) = (None, false);
        while done < length {
            let (start, end) = (
                at + done,
                if single {
                    at + done + PAGE
                } else {
                    at + length
                },
            );
            let put = match content {
                Content::Bytes(b) => {
                    let bytes = &b[done as usize..(end - at) as usize];
                    self.server.copy(start, bytes, clean)
                }
                Content::Zero => self.server.zero(start, end),
            };
            match put {
                Ok(bytes) => {
                    self.pending.remove(start, start + bytes);
                    done += bytes;
                    single = false;
                }
                Err(Errno::EXIST) => {
                    self.pending.remove(start, start + PAGE);
                    let _ = self.server.wake(start, start + PAGE);
                    done += PAGE;
                }
                Err(Errno::SRCH) => {
                    self.over();
                    return Err(Errno::SRCH);
                }
                // It is not all in one mapping: page by page.
                Err(Errno::NOENT) if end - start > PAGE => single = true,
                Err(e @ Errno::NOENT) => {
                    failed = Some(e);
                    done += PAGE;
                }
                Err(e) => return Err(e),
            }
        }
        failed.map_or(Ok(done), Err)
    }
}

#[derive(Default)]
pub struct State {
    pub(super) spaces: Vec<Space>,
    served: Served,
    /// Everything is there.
    pub(super) filled: bool,
    /// Nobody needs to be served any more, or the program is dead.
    over: bool,
    /// Why the program had to be ended.
    pub(super) failed: Option<String>,
}

impl State {
    /// Once everything is there, only trackers need what is left.
    fn tidy(&mut self) {
        if self.filled {
            self.spaces.retain(|s| s.tracked && !s.ended);
            self.over |= self.spaces.is_empty();
        }
    }
}

/// What the threads have in common.
pub struct Common {
    state: Mutex<State>,
    source: Source,
    /// The root, and descriptors of the program's processes, once they are to be served.
    program: OnceLock<(u32, Vec<OwnedFd>)>,
    /// Somebody waits for a page: whoever brings others lets go of the lock.
    urgent: AtomicBool,
    /// Written to when there is something else to do than to serve.
    bell: OwnedFd,
}

impl Common {
    /// Of these address spaces, whose pages come from there.
    pub fn new(spaces: Vec<Space>, source: Source) -> Result<Arc<Self>, Errno> {
        Ok(Arc::new(Self {
            state: Mutex::new(State {
                spaces,
                ..State::default()
            }),
            source,
            program: OnceLock::new(),
            urgent: AtomicBool::new(false),
            bell: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
        }))
    }

    /// The state; whoever brings pages that nobody waits for lets go of it.
    pub(super) fn urgently(&self) -> MutexGuard<'_, State> {
        self.urgent.store(true, Ordering::Relaxed);
        let state = self.lock();
        self.urgent.store(false, Ordering::Relaxed);
        state
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn ring(&self) {
        let _ = rustix::io::write(&self.bell, &1u64.to_ne_bytes());
    }

    /// Lets go of address spaces in which nothing is missing; when this returns, the kernel has, too.
    pub(super) fn let_go_of(&self, is_one: impl Fn(&Space) -> bool) {
        let whole = |s: &mut Space| is_one(s) && s.pending.bytes() == 0;
        let leaving: Vec<Space> = {
            let mut state = self.lock();
            let leaving = state.spaces.extract_if(.., whole).collect();
            state.tidy();
            leaving
        };
        self.ring();
        let deadline = Instant::now() + LETS_GO_WITHIN;
        for space in leaving {
            // The thread that serves may just be waiting at it.
            while Arc::strong_count(&space.server) > 1 && Instant::now() < deadline {
                std::thread::sleep(A_MOMENT / 20);
            }
        }
    }

    /// Ends the program: a page of it cannot be served.
    pub(super) fn give_up(&self, state: &mut State, why: String) {
        if let Some((root, program)) = self.program.get() {
            for kin in family::list(*root, &[]) {
                let _ = outlive_linux::thread::kill(kin.pid);
            }
            for process in program {
                let _ = pidfd_send_signal(process, Signal::KILL);
            }
        }
        state.failed.get_or_insert(why);
    }
}

/// The threads.
pub struct Server {
    common: Arc<Common>,
    /// Serves who waits.
    pages: Option<JoinHandle<()>>,
    /// Brings all others.
    bring: Option<JoinHandle<()>>,
}

impl Server {
    /// Begins to serve who waits, in a program with this root and these processes.
    pub fn begin(common: Arc<Common>, (root, program): (u32, Vec<OwnedFd>)) -> Result<Self, Errno> {
        let _ = common.program.set((root, program));
        let ours = common.clone();
        let named = std::thread::Builder::new().name("outlive-pages".into());
        let thread = named.spawn(move || serve(&ours));
        let thread = thread.map_err(|_| Errno::AGAIN)?;
        Ok(Self {
            common,
            pages: Some(thread),
            bring: None,
        })
    }

    /// The program's processes.
    pub fn program(&self) -> &[OwnedFd] {
        self.common
            .program
            .get()
            .map_or(&[], |(_, program)| program)
    }

    /// What tells of the thread that holds on to the missing pages of a process.
    pub fn lodger(&self, id: u32) -> Lodger {
        let state = self.common.lock();
        let space = state
            .spaces
            .iter()
            .find(|s| s.id.0 == id && s.pid.is_some());
        space.map(|s| s.lodger.clone()).unwrap_or_default()
    }

    /// Brings all of this; the guard goes when it is there. Returns a descriptor that is readable
    /// then.
    pub fn bring(
        &mut self,
        wanted: Vec<Run>,
        (guard, holders): (Guard, Vec<Holder>),
        began: Instant,
    ) -> std::io::Result<OwnedFd> {
        let (done, alive) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)?;
        let ours = self.common.clone();
        let named = std::thread::Builder::new().name("outlive-bring".into());
        self.bring = Some(named.spawn(move || {
            bring_all(&ours, &wanted);
            let done = ours.lock().failed.is_none();
            let left = holders.iter().filter(|h| done && !h.end()).count();
            let mut state = ours.lock();
            if left > 0 {
                // Somebody traces them: nobody is to wait for what is served no more.
                state.spaces.iter().for_each(Space::let_go);
            }
            state.served.resident_us = began.elapsed().as_micros() as u64;
            if state.failed.is_none() {
                state.filled = true;
                state.tidy();
                ours.ring();
            }
            drop((state, guard, alive));
        })?);
        Ok(done)
    }

    /// Waits until everything is there; why the program had to be ended. A tracker may still need who
    /// serves.
    pub fn join(&mut self) -> Result<Served, String> {
        if let Some(thread) = self.bring.take() {
            let _ = thread.join();
        }
        let failed = self.common.lock().failed.is_some();
        if failed || self.common.lock().over {
            let _ = self.pages.take().map(JoinHandle::join);
        }
        let state = self.common.lock();
        state.failed.clone().map_or(Ok(state.served), Err)
    }

    /// How long it took, once everything is there.
    pub fn elapsed(&self) -> Option<Duration> {
        let state = self.common.lock();
        let done = state.filled || state.over;
        done.then(|| Duration::from_micros(state.served.resident_us))
    }
}

impl Drop for Server {
    /// Only a program that never ran is left without its server: then it is dead by now, or will be.
    fn drop(&mut self) {
        if self.bring.is_none() && !self.common.lock().filled {
            self.common.lock().over = true;
            self.common.ring();
        }
        let _ = self.join();
    }
}

/// Serves who waits, until it is over.
fn serve(common: &Common) {
    loop {
        let (servers, waiting) = {
            let mut state = common.lock();
            let failed = state.failed.is_some();
            // A program may make many children meanwhile: none keeps its descriptor longer than it needs it.
            state.spaces.retain(|s| !s.ended && !s.is_whole_child());
            if failed {
                state.over |= state.spaces.is_empty();
            }
            state.tidy();
            if state.over {
                return;
            }
            let alive = state.spaces.iter().filter(|s| !s.ended);
            let servers: Vec<Arc<PageServer>> = alive.map(|s| s.server.clone()).collect();
            let waiting = failed || state.spaces.iter().any(|s| !s.waiting.is_empty());
            (servers, waiting)
        };
        let mut set: Vec<PollFd<'_>> = servers
            .iter()
            .map(|s| PollFd::new(s, PollFlags::IN))
            .collect();
        set.push(PollFd::new(&common.bell, PollFlags::IN));
        let moment = Timespec {
            tv_sec: 0,
            tv_nsec: A_MOMENT.as_nanos() as i64,
        };
        let _ = poll(&mut set, waiting.then_some(&moment));
        let _ = rustix::io::read(&common.bell, &mut [0; 8]);
        drop(set);
        drop(servers);
        let mut state = common.urgently();
        let mut at = 0;
        let mut room = true;
        // Children that are made meanwhile come behind.
        while at < state.spaces.len() {
            room &= attend(common, &mut state, at);
            at += 1;
        }
        drop(state);
        if !room {
            // Others bring what children miss, who need no descriptor then.
            std::thread::sleep(A_MOMENT);
        }
    }
}

/// Reads all events of one space, and serves who waits in it. Says whether there was room for the
/// descriptors of its children; where there was not, the kernel tells of them again, and copies nothing
/// into this space until then.
pub(super) fn attend(common: &Common, state: &mut State, at: usize) -> bool {
    let mut room = true;
    loop {
        let event = match state.spaces[at].server.event() {
            Ok(Some(event)) => event,
            Ok(None) => break,
            Err(Errno::MFILE | Errno::NFILE | Errno::NOMEM) => {
                room = false;
                break;
            }
            Err(_) => {
                state.spaces[at].over();
                break;
            }
        };
        let space = &mut state.spaces[at];
        match event {
            Event::Missing(address) => space.waiting.push(address),
            Event::Gone(start, end) => drop(space.pending.remove(start, end)),
            Event::Moved(from, to, length) => {
                space.pending.moved(from, to, length);
                if space.tracked {
                    let (first, end) = pages((to, to.saturating_add(length)));
                    space.moved.insert(first, end);
                }
            }
            Event::Fork(server) => {
                let pending = space.pending.clone();
                let mut child = Space::of(Arc::new(server), space.id, pending);
                let wiped = space.wipe(&mut child.pending);
                state.spaces.push(child);
                if let Err(e) = wiped {
                    let why = format!("what a child has of its memory cannot be told: {e}");
                    common.give_up(state, format!("the program was ended, because {why}"));
                }
            }
        }
    }
    for address in std::mem::take(&mut state.spaces[at].waiting) {
        if state.failed.is_some() {
            let space = &mut state.spaces[at];
            match space.server.poison(address, address + PAGE) {
                Ok(_) => {}
                Err(Errno::SRCH) => space.over(),
                Err(_) => drop(space.server.wake(address, address + PAGE)),
            }
            continue;
        }
        state.served.waits += 1;
        if let Err(why) = serve_one(common, state, at, address) {
            common.give_up(state, why);
        }
    }
    if state.failed.is_some() {
        // Nothing is mapped there: asks whether it is dead.
        let space = &mut state.spaces[at];
        if space.server.poison(PAGE, 2 * PAGE) == Err(Errno::SRCH) {
            space.over();
        }
    }
    room
}

/// Serves one page and its neighbours. What cannot be served yet waits on.
fn serve_one(common: &Common, state: &mut State, at: usize, address: u64) -> Result<(), String> {
    let space = &mut state.spaces[at];
    let Some(whole) = space.pending.around(address) else {
        // Never written, given back, or served meanwhile.
        match space.server.zero(address, address + PAGE) {
            Ok(_) => {}
            Err(Errno::AGAIN) => space.waiting.push(address),
            Err(Errno::SRCH) => space.over(),
            Err(_) => drop(space.server.wake(address, address + PAGE)),
        }
        return Ok(());
    };
    let from = address / AROUND * AROUND;
    let Some(part) = whole.within(from, from + AROUND) else {
        return Ok(());
    };
    fetch(common, state, at, part)?;
    let space = &mut state.spaces[at];
    if space.pending.around(address).is_some() {
        let _ = space.server.wake(address, address + PAGE);
    }
    state.served.on_demand += part.end - part.start;
    Ok(())
}

/// Brings one part from the medium. What cannot be put now stays missing, because of what is
/// returned.
pub(super) fn fetch(
    common: &Common,
    state: &mut State,
    at: usize,
    part: Part,
) -> Result<Option<Errno>, String> {
    let pages = (part.end - part.start) / PAGE;
    let space = &mut state.spaces[at];
    let Some(run) = Run::new(space.id, part.origin / PAGE, pages) else {
        return Err(format!("pages at {:x} make no sense", part.origin));
    };
    let (mut bytes, mut failed) = (0, None);
    let read = common
        .source
        .0
        .pages_in(&[run], Order::Fastest, &mut |run, content| {
            let to = part.start + (run.address() - part.origin);
            match space.put((to, run.address()), run.bytes(), content) {
                Ok(done) => bytes += done,
                Err(e) => failed = Some(e),
            }
            Ok(())
        });
    state.served.bytes += bytes;
    read.map(|()| failed).map_err(damaged)
}

fn damaged(e: VisitError) -> String {
    format!(
        "the program was ended, because a page of it cannot be read: {e}; another epoch may be \
         intact (`outlive verify`, `restore --epoch K`)"
    )
}

/// Brings all missing pages: first in the order of the medium, then whatever is left.
fn bring_all(common: &Common, wanted: &[Run]) {
    let stop = || VisitError::Visitor("it is over".into());
    let mut over = false;
    let walked = common
        .source
        .0
        .pages_in(wanted, Order::LatestFirst, &mut |run, content| {
            let mut from = 0;
            while from < run.bytes() {
                let length = (run.bytes() - from).min(AT_ONCE as u64);
                let (start, end) = (run.address() + from, run.address() + from + length);
                while common.urgent.load(Ordering::Relaxed) {
                    std::thread::yield_now();
                }
                let mut state = common.lock();
                if state.failed.is_some() {
                    over = true;
                    return Err(stop());
                }
                bring(&mut state, (run, start, end), content);
                from += length;
            }
            Ok(())
        });
    if over {
        return;
    }
    if let Err(e) = walked {
        // Perhaps nobody misses these pages any more; of those that are missed it is told once more.
        tracing::warn!("reading missing pages: {e}");
    }
    if let Err(why) = bring_rest(common, &|_| true) {
        common.give_up(&mut common.lock(), why);
        common.ring();
    }
}

/// Brings what could not be put in place when it came by: it was moved, or belongs to a child.
pub(super) fn bring_rest(common: &Common, is_one: &dyn Fn(&Space) -> bool) -> Result<(), String> {
    let mut tries = 0;
    loop {
        let mut state = common.lock();
        let left = |s: &State| {
            let wanted = s.spaces.iter().filter(|s| is_one(s));
            wanted.map(|s| s.pending.bytes()).sum::<u64>()
        };
        let before = left(&state);
        if before == 0 || state.failed.is_some() {
            return Ok(());
        }
        for at in 0..state.spaces.len() {
            if !is_one(&state.spaces[at]) {
                continue;
            }
            let next: Vec<Part> = state.spaces[at].pending.all().take(PARTS).collect();
            for part in next {
                let part = part.within(part.start, part.start + AGAIN).unwrap_or(part);
                let failed = fetch(common, &mut state, at, part)?;
                if tries == TRIES && failed == Some(Errno::NOENT) {
                    // It is no memory of ours any more: nobody will ask us for it.
                    state.spaces[at].pending.remove(part.start, part.end);
                } else if tries == TRIES && failed.is_some_and(|e| e != Errno::AGAIN) {
                    let why =
                        "the program was ended, because pages of it could not be put in place";
                    return Err(format!("{why} at {:x}: {failed:?}", part.start));
                }
            }
        }
        tries = if left(&state) < before { 0 } else { tries + 1 };
        drop(state);
        if tries > 0 {
            std::thread::sleep(A_MOMENT);
        }
    }
}

/// Puts part of a run wherever it is missing at its own address.
fn bring(state: &mut State, (run, start, end): (Run, u64, u64), content: Content<'_>) {
    let mut bytes = 0;
    for space in state.spaces.iter_mut().filter(|s| s.id == run.space()) {
        for part in space.pending.parts(start, end) {
            if part.origin != part.start {
                continue;
            }
            let content = match content {
                Content::Bytes(b) => {
                    let at = |address: u64| (address - run.address()) as usize;
                    Content::Bytes(&b[at(part.start)..at(part.end)])
                }
                Content::Zero => Content::Zero,
            };
            bytes += space
                .put((part.start, part.start), part.end - part.start, content)
                .unwrap_or(0);
        }
    }
    state.served.bytes += bytes;
}
