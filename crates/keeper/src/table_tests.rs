//! The table, as keepers leave it that come one after the other.

use super::*;

fn place() -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join(FILE);
    (dir, path)
}

fn counts(n: u64) -> Counts {
    Counts {
        epochs: n,
        bytes_written: 4096 * n,
        failures: 1,
        violations: 2,
        violated_ns: 3,
        events: 4,
        events_late: 1,
        event_longest_ns: n,
        ..Counts::default()
    }
}

/// A keeper that counts so much and ends.
fn keep(path: &Path, counted: Counts, failure: Option<&str>) {
    let table = Table::open_at(path.to_owned());
    table.tell(counted, failure);
}

/// Waits until the table shows something.
fn shown(table: &Table) -> Totals {
    loop {
        if let Some(totals) = table.totals() {
            return totals;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn keepers_add_up_and_the_last_failure_stays() {
    let (dir, path) = place();
    assert_eq!(read(dir.path()), None);
    keep(&path, counts(5), Some("the disk was full"));
    let first = read(dir.path()).unwrap();
    assert_eq!((first.keepers, first.counts), (1, counts(5)));
    assert_eq!(first.last_failure.as_deref(), Some("the disk was full"));
    assert!(first.since_ns <= first.time_ns);
    keep(&path, counts(2), None);
    let both = read(dir.path()).unwrap();
    assert_eq!(both.keepers, 2);
    assert_eq!(both.counts, counts(5).and(counts(2)));
    assert_eq!((both.counts.epochs, both.counts.event_longest_ns), (7, 5));
    assert_eq!(both.since_ns, first.since_ns);
    assert_eq!(both.last_failure, first.last_failure);
}

#[test]
fn what_is_shown_is_in_the_file() {
    let (dir, path) = place();
    keep(&path, counts(5), None);
    let table = Table::open_at(path.clone());
    table.tell(Counts::default(), None);
    let totals = shown(&table);
    assert_eq!((totals.keepers, totals.counts.epochs), (2, 5));
    // The file has one writer, and whoever looks meanwhile asks the keeper.
    assert_eq!(read(dir.path()), None);
    let left = dir.path().join("left");
    fs::create_dir(&left).unwrap();
    fs::copy(&path, left.join(FILE)).unwrap();
    assert_eq!(read(&left), Some(totals));
}

#[test]
fn a_file_that_cannot_be_read_is_put_aside_and_one_that_is_gone_is_made_again() {
    let rubbish = |path: &Path| fs::write(path, vec![0xa5u8; 40_000]).unwrap();
    let cut = |path: &Path| {
        let half = fs::metadata(path).unwrap().len() / 2;
        fs::OpenOptions::new()
            .write(true)
            .open(path)
            .unwrap()
            .set_len(half)
            .unwrap();
    };
    let long = |path: &Path| fs::write(path, vec![0u8; LARGEST + 1]).unwrap();
    let harms: [&dyn Fn(&Path); 3] = [&rubbish, &cut, &long];
    for harm in harms {
        let (dir, path) = place();
        keep(&path, counts(5), None);
        harm(&path);
        let bad = fs::read(&path).unwrap();
        assert_eq!(read(dir.path()), None);
        assert_eq!(fs::read(&path).unwrap(), bad, "looking changes nothing");
        keep(&path, counts(2), None);
        let anew = read(dir.path()).unwrap();
        assert_eq!((anew.keepers, anew.counts), (1, counts(2)));
        assert_eq!(fs::read(dir.path().join(ASIDE)).unwrap(), bad);
        fs::remove_file(&path).unwrap();
        keep(&path, counts(3), None);
        assert_eq!(read(dir.path()).unwrap().counts, counts(3));
    }
}

#[test]
fn harm_while_a_keeper_runs_costs_nothing_that_it_knows() {
    for how in ["gone", "cut"] {
        let (dir, path) = place();
        keep(&path, counts(5), Some("no"));
        let table = Table::open_at(path.clone());
        table.tell(Counts::default(), None);
        shown(&table);
        match how {
            "gone" => fs::remove_file(&path).unwrap(),
            _ => fs::write(&path, b"").unwrap(),
        }
        table.tell(counts(2), None);
        drop(table);
        let totals = read(dir.path()).unwrap();
        assert_eq!(
            (totals.keepers, totals.counts),
            (2, counts(5).and(counts(2))),
            "{how}"
        );
        assert_eq!(totals.last_failure.as_deref(), Some("no"));
    }
}

/// The next thing to be written, by a desk whose last attempt was so long ago.
fn desk(last: Option<Counts>, ago: Duration) -> Desk {
    let told = last.map(|counts| Told {
        counts,
        last_failure: None,
    });
    Desk {
        papers: Mutex::new(Papers {
            told: told.clone().unwrap_or_default(),
            shown: None,
            tried: (told, Instant::now() - ago),
            now: false,
            busy: false,
            parked: false,
            closed: false,
        }),
        changed: Condvar::new(),
    }
}

#[test]
fn it_is_written_between_epochs_and_best_when_one_has_ended() {
    let table = |last, ago| Table {
        desk: Arc::new(desk(last, ago)),
        writer: None,
    };
    let is_now = |table: &Table| {
        let papers = table.desk.papers();
        papers.now && !papers.busy
    };
    let before = counts(1);
    let later = Counts {
        epochs: 2,
        ..before
    };
    let rare = Counts {
        failures: 2,
        ..later
    };
    for (last, ago, told, wanted) in [
        (None, Duration::ZERO, Counts::default(), true),
        (Some(before), LATER, before, false),
        (Some(before), LATER / 2, later, false),
        (Some(before), LATER, later, true),
        (Some(before), SOON / 2, rare, false),
        (Some(before), SOON, rare, true),
    ] {
        let table = table(last, ago);
        table.epoch_begins();
        assert!(!is_now(&table));
        table.tell(told, None);
        assert_eq!(is_now(&table), wanted, "{last:?}, {ago:?}, {told:?}");
        table.epoch_begins();
        assert!(!is_now(&table), "the next epoch comes first");
    }
    // However long it is due, an epoch that lasts comes first; the keeper's end does not wait.
    let late = Arc::new(desk(None, LATER));
    late.papers().busy = true;
    let theirs = Arc::clone(&late);
    let writer = std::thread::spawn(move || theirs.next());
    while !late.papers().parked {
        std::thread::sleep(Duration::from_millis(1));
    }
    assert!(!writer.is_finished());
    late.papers().closed = true;
    late.changed.notify_one();
    assert_eq!(writer.join().unwrap(), Some(Told::default()));
    // Where no epoch ends, it is written all the same.
    assert_eq!(desk(None, GRACE).next(), Some(Told::default()));
}

#[test]
fn another_layout_and_what_is_no_file_are_put_aside() {
    let (dir, path) = place();
    let memory = WrittenFile::open(&path, LARGEST).unwrap();
    drop(options().open::<u64>(memory, |_| Ok(7)).unwrap());
    assert_eq!(read(dir.path()), None);
    keep(&path, counts(2), None);
    assert_eq!(read(dir.path()).unwrap().counts, counts(2));
    let other = WrittenFile::open(dir.path().join(ASIDE), LARGEST).unwrap();
    let heap = options().open::<u64>(other, |_| Ok(0)).unwrap();
    assert_eq!(heap.read(|n, _| Ok(*n)), Ok(7));
    fs::remove_file(&path).unwrap();
    rustix::fs::mkfifoat(rustix::fs::CWD, &path, rustix::fs::Mode::RWXU).unwrap();
    assert_eq!(read(dir.path()), None);
    keep(&path, counts(3), None);
    assert_eq!(read(dir.path()).unwrap().counts, counts(3));
}

#[test]
fn whatever_bit_flips_and_wherever_it_is_cut_a_keeper_goes_on() {
    let (dir, path) = place();
    keep(&path, counts(5), Some("no"));
    let good = fs::read(&path).unwrap();
    let wanted = read(dir.path()).unwrap();
    for round in 0..64 {
        let mut bad = good.clone();
        let at = scattered(round) % bad.len();
        bad[at] ^= 1 << (round % 8);
        fs::write(&path, &bad).unwrap();
        assert_eq!(read(dir.path()), Some(wanted.clone()), "bit at {at}");
        bad.truncate(at);
        fs::write(&path, &bad).unwrap();
        let _ = read(dir.path());
        keep(&path, counts(1), None);
        let totals = read(dir.path()).unwrap();
        assert!([1, 2].contains(&totals.keepers), "cut at {at}: {totals:?}");
    }
}

/// Numbers all over the place.
fn scattered(round: usize) -> usize {
    (round + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 20
}

#[test]
fn where_no_file_can_be_there_are_no_totals_and_no_harm() {
    let (dir, path) = place();
    fs::create_dir(&path).unwrap();
    keep(&path, counts(5), None);
    assert_eq!(read(dir.path()), None);
    let nowhere = dir.path().join("nowhere").join(FILE);
    keep(&nowhere, counts(5), None);
    assert!(!nowhere.exists());
}

#[test]
fn texts_are_cut_at_a_character_and_sums_saturate() {
    assert_eq!(beginning("ends"), "ends");
    assert_eq!(beginning(""), "");
    let long = "ä".repeat(LONGEST_TEXT);
    assert_eq!(beginning(&long), &long[..LONGEST_TEXT]);
    let odd = format!("x{long}");
    assert_eq!(beginning(&odd).len(), LONGEST_TEXT - 1);
    let most = Counts {
        epochs: u64::MAX,
        ..counts(1)
    };
    assert_eq!(most.and(most).epochs, u64::MAX);
    let (dir, path) = place();
    keep(&path, most, Some(&odd));
    keep(&path, most, None);
    let totals = read(dir.path()).unwrap();
    assert_eq!(totals.counts.epochs, u64::MAX);
    assert_eq!(totals.last_failure.unwrap().len(), LONGEST_TEXT - 1);
}
