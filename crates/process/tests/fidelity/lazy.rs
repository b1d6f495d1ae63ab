//! Epochs of programs that run before all their memory is there.

use crate::store::{Epoch, Store};
use crate::support::{
    Program, adopt_orphans, alone, bring_back, clean_up, last_epoch, may_run, moving, times, track,
    unseen_epoch,
};
use crate::view::View;
use outlive_epoch::{
    Content, EpochId, EpochReader, EpochWriter, Order, Run, SpaceId, StoreError, VisitError,
};
use outlive_process::{Launched, Lazy, RestoreOptions, Source, TrackOptions, Tracked, restore};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

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
