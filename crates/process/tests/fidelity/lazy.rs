//! Epochs of programs that run before all their memory is there.

use crate::store::{Epoch, Store};
use crate::support::{
    NoFiles, Program, adopt_orphans, alone, bring_back, clean_up, last_epoch, may_run, moving,
    times, track, unseen_epoch,
};
use crate::view::View;
use outlive_epoch::{
    Content, EpochId, EpochReader, EpochWriter, Order, Run, SpaceId, StoreError, VisitError,
};
use outlive_process::{
    Launched, Lazy, ProcessError, RestoreOptions, Source, TrackOptions, Tracked, restore,
};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// An epoch of which only pages come that somebody waits for, until it is let go.
struct Held {
    epoch: Epoch,
    go: AtomicBool,
}

impl EpochReader for Held {
    fn id(&self) -> EpochId {
        EpochReader::id(&self.epoch)
    }

    fn groups(&self) -> Vec<String> {
        self.epoch.groups()
    }

    fn tree(&self, group: &str) -> Result<Option<Vec<u8>>, StoreError> {
        self.epoch.tree(group)
    }

    fn runs(&self) -> Vec<Run> {
        self.epoch.runs()
    }

    fn pages_in(
        &self,
        wanted: &[Run],
        order: Order,
        visit: &mut dyn FnMut(Run, Content<'_>) -> Result<(), VisitError>,
    ) -> Result<(), VisitError> {
        while order == Order::LatestFirst && !self.go.load(Ordering::Acquire) {
            std::thread::sleep(Duration::from_millis(1));
        }
        self.epoch.pages_in(wanted, order, visit)
    }
}

/// A program whose memory comes later.
struct Late {
    held: Arc<Held>,
    tracked: Tracked,
    lazy: Lazy,
}

impl Late {
    fn begin(program: &mut Program, epoch: &Epoch) -> Self {
        let (epoch, go) = (epoch.clone(), AtomicBool::new(false));
        let held = Arc::new(Held { epoch, go });
        let options = RestoreOptions {
            track: Some(TrackOptions::default()),
            lazy: Some(Source(held.clone())),
            ..RestoreOptions::default()
        };
        let ready = restore(&held.epoch as &dyn EpochReader, &options);
        let ready = ready.unwrap_or_else(|e| panic!("restoring it: {e}"));
        let Launched { tracked, lazy, .. } = ready.launch().expect("letting it run");
        program.was_restored();
        Self {
            held,
            tracked: tracked.expect("it is tracked"),
            lazy: lazy.expect("pages come later"),
        }
    }

    fn let_come(&self) {
        self.held.go.store(true, Ordering::Release);
    }

    /// Begins an epoch that comes to nothing.
    fn fail(&mut self, given_up: bool, program: &Program, store: &mut Store) {
        let mut writer = store.begin();
        let failed = |e| -> ! { panic!("{e}; {}", program.story()) };
        let ahead = self.tracked.precopy(&mut *writer, &mut || false);
        ahead.unwrap_or_else(|e| failed(e));
        let limit = given_up.then_some(Duration::from_nanos(1));
        match self.tracked.stop(&mut *writer, limit) {
            Err(ProcessError::TooLong { .. }) if limit.is_some() => return,
            Err(e) => failed(e),
            Ok(_) if limit.is_some() => panic!("it had no time"),
            Ok((stopped, captured)) => {
                stopped.resume().expect("it runs on");
                captured.write(&mut *writer).expect("writing the epoch");
            }
        }
        self.tracked.forget_progress();
    }

    /// Takes an epoch while pages are missing, and ends the program. What stood is looked at when the
    /// epoch has been written, and everything is there.
    fn end_in_the_midst(mut self, program: &mut Program, store: &mut Store) -> View {
        let mut writer = store.begin();
        let failed = |e| -> ! { panic!("{e}; {}", program.story()) };
        let ahead = self.tracked.precopy(&mut *writer, &mut || false);
        ahead.unwrap_or_else(|e| failed(e));
        let stopped = self.tracked.stop(&mut *writer, None);
        let (stopped, captured) = stopped.unwrap_or_else(|e| failed(e));
        captured.write(&mut *writer).expect("writing the epoch");
        assert!(self.lazy.elapsed().is_none(), "everything was there");
        self.held.go.store(true, Ordering::Release);
        while self.lazy.elapsed().is_none() {
            std::thread::sleep(Duration::from_millis(1));
        }
        let seen = View::take(program.pid, &moving(&writer.epoch));
        captured.sync_files().expect("syncing files");
        writer.commit(captured.facts).expect("the commit");
        stopped.end().expect("the end");
        program.was_ended();
        seen
    }
}

/// How many of the pages of the newest epoch were taken anew for it, and of how many.
fn put(program: &Program, store: &Store) -> (usize, usize) {
    let (space, newest) = (SpaceId(program.pid), store.newest());
    let all = newest.pages.keys().filter(|k| k.0 == space).count();
    (newest.put.get(&space).copied().unwrap_or(0), all)
}

#[test]
fn epochs_come_while_pages_are_missing() {
    let _alone = alone();
    if !may_run("epochs_come_while_pages_are_missing") {
        return;
    }
    adopt_orphans();
    let mut program = Program::start("paging", &["24", "{dir}/rounds", "{dir}/end"]);
    let mut store = Store::default();
    let tracked = track(&program);
    let mut seen = last_epoch(&mut program, tracked, &mut store);
    for life in 0..times(4, 40) {
        clean_up();
        let newest = store.newest().clone();
        // What was seen at the end of the last life is what the next one has.
        if life % 2 == 1 {
            bring_back(&mut program, &newest, &seen);
            program.kill();
        }
        let mut late = Late::begin(&mut program, &newest);
        for n in 0..life {
            let taken = unseen_epoch(&mut late.tracked, &mut store);
            taken.unwrap_or_else(|e| panic!("{e}; {}", program.story()));
            std::thread::sleep(Duration::from_millis(n as u64 % 20));
            program.must_be_well();
        }
        seen = late.end_in_the_midst(&mut program, &mut store);
    }
    clean_up();
    bring_back(&mut program, store.newest(), &seen);
    std::thread::sleep(Duration::from_millis(50));
    program.must_be_well();
    program.kill();
    clean_up();
}

/// A program that does little: its epochs hold little, while pages are missing and when all are there.
#[test]
fn what_is_missing_is_not_taken() {
    let _alone = alone();
    if !may_run("what_is_missing_is_not_taken") {
        return;
    }
    adopt_orphans();
    let words = ["32", "{dir}/rounds", "{dir}/end", "still"];
    let mut program = Program::start("paging", &words);
    let mut store = Store::default();
    let tracked = track(&program);
    last_epoch(&mut program, tracked, &mut store);
    clean_up();
    let newest = store.newest().clone();
    let mut late = Late::begin(&mut program, &newest);
    for n in 0..6 {
        if n == 2 {
            late.let_come();
            late.lazy.finish().expect("all of it");
        }
        let taken = unseen_epoch(&mut late.tracked, &mut store);
        taken.unwrap_or_else(|e| panic!("{e}; {}", program.story()));
        program.must_be_well();
        let (put, all) = put(&program, &store);
        assert!(put < all / 8, "epoch {n}: {put} of {all} pages were taken");
    }
    let seen = last_epoch(&mut program, late.tracked, &mut store);
    clean_up();
    bring_back(&mut program, store.newest(), &seen);
    // It looks at every page then.
    std::fs::write(program.dir.path().join("end"), "").expect("a file");
    program.must_end_with(7);
    clean_up();
}

/// Each child takes a descriptor of ours as long as memory is missing. Where there is none left, who makes
/// children waits, and they have what they must have.
#[test]
fn children_beyond_our_descriptors_wait() {
    let _alone = alone();
    if !may_run("children_beyond_our_descriptors_wait") {
        return;
    }
    adopt_orphans();
    let words = ["4", "{dir}/rounds", "{dir}/end", "still"];
    let mut program = Program::start("paging", &words);
    let mut store = Store::default();
    let tracked = track(&program);
    last_epoch(&mut program, tracked, &mut store);
    clean_up();
    let newest = store.newest().clone();
    let mut late = Late::begin(&mut program, &newest);
    let file = |name: &str| {
        let path = program.dir.path().join(name);
        std::fs::write(path, "").expect("a file");
    };
    file("rounds.crowd");
    let few = NoFiles::but_a_few(16);
    let patient = Instant::now() + Duration::from_secs(60);
    while std::fs::File::open("/dev/null").is_ok() {
        assert!(Instant::now() < patient, "there is always a descriptor");
        std::thread::sleep(Duration::from_millis(1));
    }
    // It is tried again and again meanwhile.
    std::thread::sleep(Duration::from_millis(50));
    assert!(late.lazy.elapsed().is_none(), "everything was there");
    late.let_come();
    late.lazy.finish().expect("all of it");
    drop(few);
    file("rounds.alone");
    program.await_word("alone again");
    let taken = unseen_epoch(&mut late.tracked, &mut store);
    taken.unwrap_or_else(|e| panic!("{e}; {}", program.story()));
    let seen = last_epoch(&mut program, late.tracked, &mut store);
    clean_up();
    bring_back(&mut program, store.newest(), &seen);
    std::fs::write(program.dir.path().join("end"), "").expect("a file");
    program.must_end_with(7);
    clean_up();
}

/// What a failed epoch had taken is taken again, where it was missing too; it comes while the program runs,
/// and not at the stop.
#[test]
fn an_epoch_that_fails_while_pages_are_missing_costs_none_of_them() {
    let _alone = alone();
    if !may_run("an_epoch_that_fails_while_pages_are_missing_costs_none_of_them") {
        return;
    }
    adopt_orphans();
    let words = ["24", "{dir}/rounds", "{dir}/end", "still"];
    let mut program = Program::start("paging", &words);
    let mut store = Store::default();
    let tracked = track(&program);
    last_epoch(&mut program, tracked, &mut store);
    clean_up();
    let newest = store.newest().clone();
    let mut late = Late::begin(&mut program, &newest);
    for given_up in [true, false] {
        let taken = unseen_epoch(&mut late.tracked, &mut store);
        taken.unwrap_or_else(|e| panic!("{e}; {}", program.story()));
        late.fail(given_up, &program, &mut store);
        program.must_be_well();
        assert!(late.lazy.elapsed().is_none(), "everything was there");
    }
    // The next one takes all of it, once that is there.
    late.let_come();
    let space = SpaceId(program.pid);
    let mut writer = store.begin();
    let failed = |e| -> ! { panic!("{e}; {}", program.story()) };
    let ahead = late.tracked.precopy(&mut *writer, &mut || false);
    ahead.unwrap_or_else(|e| failed(e));
    assert!(late.lazy.elapsed().is_some(), "pages are missing");
    let before = writer.epoch.put.get(&space).copied().unwrap_or(0);
    let stopped = late.tracked.stop(&mut *writer, None);
    let (stopped, captured) = stopped.unwrap_or_else(|e| failed(e));
    captured.write(&mut *writer).expect("writing the epoch");
    let all = writer.epoch.put.get(&space).copied().unwrap_or(0);
    let seen = View::take(program.pid, &moving(&writer.epoch));
    stopped.resume().expect("it runs on");
    assert!(
        all >= 24 * 256 && all - before < all / 8,
        "{all} pages, {before} of them before the stop"
    );
    captured.sync_files().expect("syncing files");
    writer.commit(captured.facts).expect("the commit");
    drop(late);
    program.kill();
    clean_up();
    bring_back(&mut program, store.newest(), &seen);
    std::fs::write(program.dir.path().join("end"), "").expect("a file");
    program.must_end_with(7);
    clean_up();
}
