//! Power cuts at every boundary of a small history of a pool and of its owners' files, with every fate of
//! what was not flushed; and cuts while a pool is opened after one.
//!
//! The oracle: what is found is the state after the last step that returned, or after the one under way;
//! every extent holds what was flushed to it, and nothing else; no page is free and owned, or neither; free
//! pages that are thought to be zeros are; and whoever gets all that is free finds zeros.
#![allow(clippy::unwrap_used, reason = "all of this is test code")]

use outlive_media::{
    Access, BLOCK, Directory, Fate, Fault, Medium, Op, Pending, SimDisk, power_off,
};
use outlive_nvpool::{Error, PAGE, Pool, Request, Run, Shape, State};
use std::collections::BTreeMap;
use std::sync::Arc;

const SHAPE: Shape = Shape {
    pages: 160,
    journal: 16,
    tables: 80,
    zone: 16,
    log: 4,
};

/// What the pages of extents hold, by extent and page; a page that is missing was never written.
type Contents = BTreeMap<(u64, u64), u8>;

/// What a pool is after a step: owners and extents as text, and what they hold.
#[derive(Clone, Debug, Default, PartialEq)]
struct Model {
    text: String,
    contents: Contents,
}

fn disk() -> SimDisk {
    let disk = SimDisk::new();
    // Nothing is zeros by chance.
    disk.set_dirt(&vec![0xd1; (SHAPE.pages * PAGE) as usize]);
    let dir = disk.directory();
    let medium = dir.create("pool").unwrap();
    medium.reserve(SHAPE.pages * PAGE).unwrap();
    medium.flush().unwrap();
    dir.sync().unwrap();
    disk
}

fn medium(disk: &SimDisk) -> Arc<dyn Medium> {
    disk.directory().open("pool", Access::Write).unwrap()
}

fn ask(owner: &str, pages: u64, thin: bool) -> Request {
    Request {
        owner: owner.to_owned(),
        pages,
        thin,
        below: None,
        quota: None,
        file: None,
    }
}

/// Writes to pages of an extent; what is in the model is durable.
fn fill(pool: &Pool, contents: &mut Contents, id: u64, pages: Run, byte: u8) -> Result<(), Error> {
    let extent = pool.extent(id)?;
    let bytes = vec![byte; BLOCK * pages.len as usize];
    extent.write(pages.start * PAGE, &bytes)?;
    extent.flush()?;
    contents.extend((pages.start..pages.end()).map(|page| ((id, page), byte)));
    Ok(())
}

const STEPS: u64 = 13;

/// The step after so many others.
fn step(pool: &Pool, disk: &SimDisk, contents: &mut Contents, n: u64) -> Result<(), Error> {
    let files = disk.directory();
    match n {
        0 => drop(pool.allocate(&ask("a", 5, false))?),
        1 => fill(pool, contents, 1, Run::new(0, 5), 1)?,
        2 => drop(pool.allocate(&ask("b", 9, true))?),
        3 => fill(pool, contents, 2, Run::new(3, 2), 2)?,
        4 => {
            pool.extent(2)?.discard(4 * PAGE, 2 * PAGE)?;
            contents.remove(&(2, 4));
        }
        5 => {
            pool.release(1)?;
            contents.retain(|(id, _), _| *id != 1);
        }
        6 => drop(pool.allocate(&ask("c", 20, false))?),
        7 => fill(pool, contents, 3, Run::new(18, 2), 3)?,
        8 => pool.page_out("b", &files, "b.paged", false)?,
        9 => drop(pool.allocate(&ask("d", 10, false))?),
        10 => drop(pool.scrub()?),
        // Into pages that are zeros, and thought to be.
        11 => pool.page_in("b", &files, "b.paged")?,
        _ => {
            pool.release(3)?;
            contents.retain(|(id, _), _| *id != 3);
        }
    }
    Ok(())
}

/// All that must be exactly as some step left it. Which pages are dirty is judged by what they hold, and
/// thin extents get pages before what is written to them counts.
fn text(pool: &Pool) -> String {
    let ledger = pool.ledger();
    let mut text = String::new();
    for (name, owner) in ledger.owners() {
        // The number of a file that is not there yet is no other state.
        let number = match owner.state {
            State::PagedOut => owner.generation,
            State::Running(_) | State::Stopped => 0,
        };
        text += &format!("{name} {:?} {number}; ", owner.state);
    }
    for extent in ledger.extents() {
        text += &format!("{} {} {}", extent.id, extent.owner, extent.pages);
        text += if extent.pieces.is_empty() {
            "; "
        } else {
            " filled; "
        };
    }
    text
}

/// Runs the history as far as the disk goes; gives how many steps returned.
fn history(disk: &SimDisk) -> u64 {
    let mut done = 0;
    let mut contents = Contents::new();
    let run = || -> Result<(), Error> {
        let pool = Pool::open(medium(disk), Access::Write)?;
        for n in 0..STEPS {
            step(&pool, disk, &mut contents, n)?;
            done = n + 1;
        }
        Ok(())
    };
    match { run }() {
        Err(Error::Medium(_)) | Ok(()) => done,
        Err(error) => panic!("{error}"),
    }
}

fn models(disk: &SimDisk) -> Vec<Model> {
    let disk = disk.fork();
    let pool = Pool::open(medium(&disk), Access::Write).unwrap();
    let mut model = Model {
        text: text(&pool),
        contents: Contents::new(),
    };
    let mut all = vec![model.clone()];
    for n in 0..STEPS {
        step(&pool, &disk, &mut model.contents, n).unwrap();
        model.text = text(&pool);
        all.push(model.clone());
    }
    all
}

/// What is wrong with what an extent holds, after `done` steps or one more.
fn wrong_contents(pool: &Pool, models: &[&Model]) -> Option<String> {
    for extent in pool.ledger().extents() {
        if pool.ledger().owner(&extent.owner).unwrap().state == State::PagedOut {
            continue;
        }
        let medium = pool.extent(extent.id).unwrap();
        for page in 0..extent.pages {
            let key = (extent.id, page);
            let mut allowed = models.iter().map(|model| model.contents.get(&key).copied());
            let first = allowed.next().flatten();
            if allowed.any(|other| other.flatten_to() != first.flatten_to()) {
                continue; // It is being written.
            }
            let mut bytes = vec![0; BLOCK];
            medium.read(page * PAGE, &mut bytes).unwrap();
            if bytes.iter().any(|byte| *byte != first.unwrap_or(0)) {
                return Some(format!(
                    "page {page} of extent {} holds {:x}",
                    extent.id, bytes[0]
                ));
            }
        }
    }
    None
}

/// A page that was not written holds zeros.
trait Flatten {
    fn flatten_to(self) -> u8;
}

impl Flatten for Option<u8> {
    fn flatten_to(self) -> u8 {
        self.unwrap_or(0)
    }
}

/// What is wrong with a pool that is found after a crash, if anything; and which state it is in.
fn judge(disk: &SimDisk, done: u64, models: &[Model]) -> Result<u64, String> {
    let pool = Pool::open(medium(disk), Access::Write).map_err(|e| format!("not opened: {e}"))?;
    let found = text(&pool);
    let next = (done + 1).min(STEPS);
    let near = [done, next].map(|n| &models[n as usize]);
    let thin = |text: &str| text.replace(" filled", "");
    if !near.iter().any(|model| thin(&model.text) == thin(&found)) {
        return Err(format!("after {done} steps there is: {found}"));
    }
    let state = if near[0].text == found { done } else { next };
    let verified = pool.verify(true).map_err(|e| e.to_string())?;
    if !verified.tables.lost.is_empty() || !verified.tables.corrected.is_empty() {
        return Err(format!("the tables are damaged: {:?}", verified.tables));
    }
    if !verified.unscrubbed.is_empty() {
        return Err(format!("thought to be zeros: {:?}", verified.unscrubbed));
    }
    if let Some(wrong) = wrong_contents(&pool, &near) {
        return Err(wrong);
    }
    // Every page that nobody has is free: one owner can get them all, and they are zeros.
    let ledger = pool.ledger();
    let owned: u64 = ledger
        .extents()
        .map(outlive_nvpool::Extent::populated)
        .sum();
    let free = ledger.space().len - owned;
    if ledger.owner("b").is_ok_and(|b| b.state == State::PagedOut) {
        pool.page_in("b", &disk.directory(), "b.paged")
            .map_err(|e| format!("page in: {e}"))?;
        if let Some(wrong) = wrong_contents(&pool, &near) {
            return Err(format!("paged in: {wrong}"));
        }
        return Ok(state);
    }
    let id = pool
        .allocate(&ask("z", free, false))
        .map_err(|e| format!("leaked: {e}"))?;
    let mut bytes = vec![1; (free * PAGE) as usize];
    pool.extent(id).unwrap().read(0, &mut bytes).unwrap();
    if bytes.iter().any(|byte| *byte != 0) {
        return Err("a new extent shows what somebody wrote".to_owned());
    }
    Ok(state)
}

/// A sequence of numbers that look random.
fn next(seed: &mut u64) -> u64 {
    *seed = seed
        .wrapping_mul(6364136223846793005)
        .wrapping_add(1442695040888963407);
    *seed >> 17
}

fn long() -> bool {
    std::env::var_os("OUTLIVE_LONG").is_some()
}

/// All cuts that are tried for so many pending changes: all subsets up to 5 (12 in the long run), else each
/// alone and missing alone; each torn, and as garbage, zeros and stale; and mixed ones chosen by a seed.
fn cuts(pending: &[Pending], seed: u64) -> Vec<Vec<Fate>> {
    let n = pending.len();
    let keep = |on: bool| if on { Fate::Keep } else { Fate::Drop };
    let mut cuts: Vec<Vec<Fate>> = Vec::new();
    if n <= if long() { 12 } else { 5 } {
        cuts.extend((0..1u64 << n).map(|set| (0..n).map(|i| keep(set >> i & 1 == 1)).collect()));
    } else {
        cuts.extend([vec![Fate::Keep; n], vec![Fate::Drop; n]]);
        for one in 0..n {
            cuts.push((0..n).map(|i| keep(i == one)).collect());
            cuts.push((0..n).map(|i| keep(i != one)).collect());
        }
    }
    let mut seed = seed + 99;
    for i in 0..n {
        let half = next(&mut seed) % 8;
        let others = keep(next(&mut seed).is_multiple_of(2));
        let fates = [
            Fate::Torn((1 << half) - 1),
            Fate::Torn(!0 << half),
            Fate::Trash(next(&mut seed)),
            Fate::Zero,
            Fate::Stale(next(&mut seed)),
        ];
        for fate in fates {
            let mut cut = vec![others; n];
            cut[i] = fate;
            cuts.push(cut);
        }
    }
    for _ in 0..if long() { 200 } else { 4 } {
        let fate = |seed: &mut u64| match next(seed) % 6 {
            0 => Fate::Keep,
            1 => Fate::Drop,
            2 => Fate::Torn(next(seed)),
            3 => Fate::Words(next(seed)),
            4 => Fate::Stale(next(seed)),
            _ => Fate::Trash(next(seed)),
        };
        cuts.push((0..n).map(|_| fate(&mut seed)).collect());
    }
    cuts
}

/// The operations that change something or flush: cutting before a read is no other case.
fn boundaries(trace: &[Op]) -> Vec<u64> {
    let changes = trace.iter().enumerate().filter(|(_, op)| **op != Op::Read);
    let changes = changes.map(|(i, _)| i as u64);
    changes.chain([trace.len() as u64]).collect()
}

fn cut_at(at: u64) -> Option<Fault> {
    Some(Fault {
        at,
        lasting: true,
        error: power_off(),
        applied: false,
    })
}

/// A disk with an empty pool.
fn with_pool() -> SimDisk {
    let disk = disk();
    Pool::create(medium(&disk), SHAPE, [5; 16], false, true).unwrap();
    // Its clock of operations begins with the history.
    disk.power_cut(&mut |_, _| Fate::Keep)
}

#[test]
fn a_power_cut_anywhere_leaves_no_leak_no_double_owner_and_nothing_unscrubbed() {
    let start = with_pool();
    let models = models(&start);
    let whole = start.fork();
    assert_eq!(history(&whole), STEPS);
    let (mut states, mut later) = (0u64, 0u64);
    for at in boundaries(&whole.trace()) {
        let disk = start.fork();
        disk.fault(cut_at(at));
        let done = history(&disk);
        for cut in cuts(&disk.pending(), at) {
            let after = disk.power_cut(&mut |i, _| cut[i]);
            let found = judge(&after, done, &models)
                .unwrap_or_else(|wrong| panic!("cut at {at}, {cut:?}: {wrong}"));
            states += 1;
            later += u64::from(found > done);
        }
    }
    println!("{states} states, {later} with the next step");
    assert!(
        states > 1_000 && later > 50,
        "{states} states, {later} with the next step"
    );
}

#[test]
fn a_power_cut_while_a_pool_is_opened_changes_nothing() {
    let start = with_pool();
    let models = models(&start);
    let whole = start.fork();
    history(&whole);
    let mut states = 0u64;
    let all = boundaries(&whole.trace());
    for at in all.iter().copied().step_by(if long() { 1 } else { 7 }) {
        let disk = start.fork();
        disk.fault(cut_at(at));
        let done = history(&disk);
        let cuts_here = cuts(&disk.pending(), at);
        for cut in cuts_here.iter().step_by(1 + cuts_here.len() / 3) {
            let after = disk.power_cut(&mut |i, _| cut[i]);
            let found = judge(&after.fork(), done, &models).unwrap();
            let opened = after.fork();
            drop(Pool::open(medium(&opened), Access::Write).unwrap());
            for again in boundaries(&opened.trace()) {
                let second = after.fork();
                second.fault(cut_at(again));
                drop(Pool::open(medium(&second), Access::Write));
                for cut in cuts(&second.pending(), again).iter().step_by(3) {
                    let third = second.power_cut(&mut |i, _| cut[i]);
                    let then = judge(&third, done, &models);
                    assert_eq!(then, Ok(found), "cut at {at}, again at {again}, {cut:?}");
                    states += 1;
                }
            }
        }
    }
    assert!(states > 200, "{states} states");
}

#[test]
fn a_pool_is_made_whole_or_not_at_all() {
    let whole = disk();
    let from = whole.trace().len() as u64;
    Pool::create(medium(&whole), SHAPE, [5; 16], false, true).unwrap();
    let (mut made, mut none) = (0, 0);
    for at in boundaries(&whole.trace())
        .into_iter()
        .filter(|at| *at >= from)
    {
        let disk = disk();
        disk.fault(cut_at(at));
        // Where it is opened the power may be off already.
        let opened = disk.directory().open("pool", Access::Write);
        let created =
            opened.is_ok_and(|medium| Pool::create(medium, SHAPE, [5; 16], false, true).is_ok());
        for cut in cuts(&disk.pending(), at) {
            let after = disk.power_cut(&mut |i, _| cut[i]);
            match Pool::open(medium(&after), Access::Write) {
                Ok(pool) => {
                    assert_eq!(pool.ledger().free().pages(), SHAPE.space().unwrap().len);
                    assert!(pool.verify(true).unwrap().unscrubbed.is_empty());
                    made += 1;
                }
                Err(Error::NoPool { .. }) => {
                    assert!(!created, "cut at {at}, {cut:?}");
                    none += 1;
                }
                // A superblock of which a part is there.
                Err(Error::Damaged { what, .. }) if what.contains("superblock") => none += 1,
                Err(error) => panic!("cut at {at}, {cut:?}: {error}"),
            }
        }
    }
    assert!(made > 20 && none > 100, "{made} made, {none} not");
}

#[test]
fn a_failing_medium_is_named_and_nothing_is_half_done() {
    let start = with_pool();
    let models = models(&start);
    let whole = start.fork();
    history(&whole);
    for at in 0..whole.trace().len() as u64 {
        let disk = start.fork();
        let error = std::io::ErrorKind::Other;
        disk.fault(Some(Fault {
            at,
            lasting: false,
            error,
            applied: false,
        }));
        let opened = disk.directory().open("pool", Access::Write);
        let Ok(opened) = opened else { continue };
        let mut done = 0;
        if let Ok(pool) = Pool::open(opened, Access::Write) {
            let mut contents = Contents::new();
            for n in 0..STEPS {
                match step(&pool, &disk, &mut contents, n) {
                    Ok(()) => done = n + 1,
                    Err(Error::Medium(_)) => break,
                    Err(error) => panic!("at {at}: {error}"),
                }
            }
        }
        disk.fault(None);
        judge(&disk, done, &models).unwrap_or_else(|wrong| panic!("failure at {at}: {wrong}"));
    }
}

/// What is done when the failure comes.
#[derive(Clone, Copy, Debug)]
enum Act {
    Discard,
    PageOut,
    PageIn,
    Scrub,
}

/// How it fails: the operation is done in spite of it; a flush forgets what it was to keep; a write says so to
/// whoever flushes next.
#[derive(Clone, Copy, Debug, PartialEq)]
enum How {
    Refused,
    Applied,
    Forgetful,
    Deferred,
}

/// One failure of the pool's medium, after which everybody goes on as if nothing were; what they were told
/// afterwards to be durable is there after a power cut. Gives whether the failure came at all.
fn go_on(act: Act, at: u64, how: How) -> bool {
    let (disk, other) = (with_pool(), SimDisk::new());
    let files = other.directory();
    let pool = Pool::open(medium(&disk), Access::Write).unwrap();
    let mut contents = Contents::new();
    let ids = ["a", "b"].map(|owner| pool.allocate(&ask(owner, 8, false)).unwrap());
    fill(&pool, &mut contents, ids[0], Run::new(0, 8), 1).unwrap();
    if matches!(act, Act::PageIn) {
        pool.page_out("a", &files, "a.paged", false).unwrap();
    }
    let neighbour = pool.extent(ids[1]).unwrap();
    neighbour.write(0, &[50; 8 * BLOCK]).unwrap();
    disk.forget_on_failed_flush(how == How::Forgetful);
    disk.defer_errors(how == How::Deferred);
    let begin = disk.trace().len() as u64;
    disk.fault(Some(Fault {
        at: begin + at,
        lasting: false,
        error: std::io::ErrorKind::Other,
        applied: how == How::Applied,
    }));
    let done = match act {
        Act::Discard => pool
            .extent(ids[0])
            .and_then(|extent| extent.discard(0, 4 * PAGE)),
        Act::PageOut => pool.page_out("a", &files, "a.paged", false),
        Act::PageIn => pool.page_in("a", &files, "a.paged"),
        Act::Scrub => pool.scrub().map(drop),
    };
    let came = begin + at < disk.trace().len() as u64;
    drop(pool.allocate(&ask("c", 20, false)));
    let mut told = [false; 8];
    for (page, told) in (0..).zip(&mut told) {
        *told = fill(&pool, &mut Contents::new(), ids[0], Run::new(page, 1), 100).is_ok();
    }
    let neighbour_told = neighbour.flush().is_ok();

    let after = disk.power_cut(&mut |_, _| Fate::Drop);
    let pool = Pool::open(medium(&after), Access::Write).unwrap();
    if pool.ledger().owner("a").unwrap().state == State::PagedOut {
        assert!(told.iter().all(|told| !told), "{act:?} at {at}: written");
        pool.page_in("a", &files, "a.paged").unwrap();
    }
    let extent = pool.extent(ids[0]).unwrap();
    for (page, told) in (0..).zip(told) {
        let mut bytes = vec![0; BLOCK];
        extent.read(page * PAGE, &mut bytes).unwrap();
        let allowed: &[u8] = match act {
            _ if told => &[100],
            Act::Discard if page < 4 && done.is_ok() => &[0, 100],
            Act::Discard if page < 4 => &[0, 1, 100],
            _ => &[1, 100],
        };
        assert!(
            allowed.contains(&bytes[0]) && bytes.iter().all(|byte| *byte == bytes[0]),
            "{act:?} at {at}: page {page} holds {}, not one of {allowed:?}",
            bytes[0]
        );
    }
    let mut bytes = vec![0; 8 * BLOCK];
    let neighbour = pool.extent(ids[1]).unwrap();
    neighbour.read(0, &mut bytes).unwrap();
    let whole = bytes.iter().all(|byte| *byte == 50);
    assert!(
        whole || !neighbour_told,
        "{act:?} at {at}: a flush said what is not so"
    );
    came
}

#[test]
fn what_is_acknowledged_after_a_failure_is_there_later() {
    for act in [Act::Discard, Act::PageOut, Act::PageIn, Act::Scrub] {
        for how in [How::Refused, How::Applied, How::Forgetful, How::Deferred] {
            let came = (0..).take_while(|at| go_on(act, *at, how)).count();
            // Its record, the flush, and the way home at least.
            assert!(came > 2, "{act:?}, {how:?}: {came} failures");
        }
    }
}
