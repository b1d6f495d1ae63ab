//! The table itself: sharing, and what a hostile image may contain.

use super::super::Description;
use super::super::epoll::EpollState;
use super::super::pipe::{PipeEndState, PipeSide};
use super::super::unix_fresh::UnixKind;
use super::super::unix_pair::UnixPairEndState;
use super::super::{OpenDescription, PipeState};
use super::*;
use proptest::prelude::*;
use std::fs::File;
use std::net::UdpSocket;
use std::os::unix::net::UnixDatagram;

fn null() -> File {
    File::open("/dev/null").unwrap()
}

#[test]
fn sharing_is_found_among_many_that_look_alike() {
    let files: Vec<File> = (0..60).map(|_| null()).collect();
    let twins: Vec<File> = files
        .iter()
        .step_by(7)
        .map(|f| f.try_clone().unwrap())
        .collect();
    let mut numbers: Vec<u32> = files.iter().chain(&twins).map(number).collect();
    numbers.sort_unstable();
    let table = collect(&numbers);
    assert_eq!(table.descriptions.len(), files.len());
    for (file, twin) in files.iter().step_by(7).zip(&twins) {
        let found = table.find(me(), number(file)).unwrap();
        let mut pair = vec![number(file), number(twin)];
        pair.sort_unstable();
        let numbers: Vec<u32> = found.holders.iter().map(|h| h.number).collect();
        assert_eq!(numbers, pair);
    }
}

#[test]
fn close_on_exec_belongs_to_the_number() {
    let kept = null();
    let twin = rustix::io::fcntl_dupfd_cloexec(&kept, 3).unwrap();
    rustix::io::fcntl_setfd(&kept, rustix::io::FdFlags::empty()).unwrap();
    let table = collect(&[number(&kept), number(&twin)]);
    rustix::io::fcntl_setfd(&kept, rustix::io::FdFlags::CLOEXEC).unwrap();
    let made = recreate(&table);
    let holders = made.installs().next().unwrap().holders.iter();
    let mut numbers: Vec<_> = holders.map(|h| (h.number, h.close_on_exec)).collect();
    numbers.sort_unstable();
    let mut expected = vec![(number(&kept), false), (number(&twin), true)];
    expected.sort_unstable();
    assert_eq!(numbers, expected);
}

#[test]
fn what_is_remembered_does_not_outlive_the_number() {
    let pid = std::process::id();
    let pidfd = pidfd_open(Pid::from_raw(pid as i32).unwrap(), PidfdFlags::empty()).unwrap();
    let target = Target {
        pid,
        program: "test",
        pidfd: pidfd.as_fd(),
        ignore: &[],
    };
    let mut memory = Memory::default();
    let dir = tempfile::tempdir().unwrap();
    let (one, two) = (dir.path().join("one"), dir.path().join("two"));
    std::fs::write(&one, b"1").unwrap();
    std::fs::write(&two, b"22").unwrap();
    // A number that no other test gets in between.
    let spare = rustix::io::fcntl_dupfd_cloexec(null(), 900).unwrap();
    let numbers = [number(&spare)];
    let mut collect = || {
        collect_numbers(&target, &numbers, &mut memory)
            .unwrap()
            .table
    };
    assert_eq!(collect().descriptions[0].object.name(), "device");
    let mut spare = spare;
    for path in [&one, &two] {
        rustix::io::dup3(
            File::open(path).unwrap(),
            &mut spare,
            rustix::io::DupFlags::CLOEXEC,
        )
        .unwrap();
        let table = collect();
        let Description::File(file) = &table.descriptions[0].object else {
            panic!()
        };
        assert_eq!(file.path, path.as_os_str().as_encoded_bytes());
    }
    std::fs::rename(&two, &one).unwrap();
    let table = collect();
    let Description::File(file) = &table.descriptions[0].object else {
        panic!()
    };
    assert_eq!(file.path, one.as_os_str().as_encoded_bytes());
    drop(spare);
    assert_eq!(collect().descriptions.len(), 0);
}

fn held(process: u32, number: u32) -> Holder {
    Holder {
        process,
        number,
        close_on_exec: false,
    }
}

fn one(object: Description) -> FdTable {
    let description = OpenDescription {
        holders: vec![held(7, 5)],
        flags: 0,
        owner: None,
        locks: vec![],
        object,
    };
    FdTable {
        descriptions: vec![description],
        pipes: vec![],
    }
}

fn sample() -> FdTable {
    let file = null();
    let mut table = collect(&[number(&file)]);
    table.descriptions[0].holders = vec![held(7, 5)];
    table
}

fn is_bad(table: &FdTable) -> bool {
    matches!(
        check_table(table, &request(FilesPolicy::Reconcile)),
        Err(ProcessError::Image(_))
    )
}

#[test]
fn tables_that_make_no_sense_are_refused_before_anything_is_made() {
    let good = sample();
    assert!(!is_bad(&good));
    let change = |edit: fn(&mut OpenDescription)| {
        let mut table = good.clone();
        edit(&mut table.descriptions[0]);
        table
    };
    assert!(is_bad(&change(|d| d.holders.clear())));
    assert!(is_bad(&change(|d| d.holders.push(held(7, 5)))));
    assert!(is_bad(&change(|d| d.holders = vec![held(7, u32::MAX)])));
    assert!(is_bad(&change(|d| d.holders = vec![held(0, 5)])));
    assert!(!is_bad(&change(|d| d.holders.push(held(8, 5)))));
    let mut twice = good.clone();
    twice.descriptions.push(good.descriptions[0].clone());
    assert!(is_bad(&twice));
    assert!(is_bad(&one(Description::PipeEnd(PipeEndState {
        pipe: 0,
        side: PipeSide::Read
    }))));
    let lists = |processes, targets, events, data| {
        one(Description::Epoll(EpollState {
            processes,
            targets,
            events,
            data,
        }))
    };
    assert!(is_bad(&lists(vec![7], vec![5], vec![], vec![0])));
    assert!(is_bad(&lists(vec![], vec![5], vec![1], vec![0])));
    assert!(is_bad(&lists(vec![7], vec![6], vec![1], vec![0])));
    assert!(is_bad(&lists(vec![8], vec![5], vec![1], vec![0])));
    assert!(!is_bad(&lists(vec![7], vec![5], vec![1], vec![0])));
    let pair = {
        let (a, b) = UnixDatagram::pair().unwrap();
        a.send(b"abc").unwrap();
        collect(&[number(&a), number(&b)])
    };
    assert!(!is_bad(&pair));
    let end = |index: usize, edit: fn(&mut UnixPairEndState)| {
        let mut table = pair.clone();
        match &mut table.descriptions[index].object {
            Description::UnixPairEnd(end) => edit(end),
            other => panic!("{other:?}"),
        }
        table
    };
    for index in 0..2 {
        assert!(is_bad(&end(index, |e| e.pair = 7)));
        assert!(is_bad(&end(index, |e| e.kind = UnixKind::Stream)));
        assert!(is_bad(&end(index, |e| e.path = Some(Vec::new()))));
        assert!(is_bad(&end(index, |e| e.path = Some(vec![b'a'; 200]))));
        assert!(is_bad(&end(index, |e| e.path = Some(b"a\0b".to_vec()))));
        assert!(is_bad(&end(index, |e| e.queue.lengths.push(1))));
        assert!(is_bad(&end(index, |e| e.queue.lengths.push(u32::MAX))));
    }
    let mut half = pair.clone();
    half.descriptions.pop();
    assert!(is_bad(&half));
    let mut full = good;
    full.pipes.push(PipeState {
        capacity: 1,
        data: vec![0; 2],
        packets: vec![],
    });
    assert!(is_bad(&full));
}

fn rich_table() -> FdTable {
    let (r, w) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).unwrap();
    rustix::io::write(&w, b"contents").unwrap();
    let counter = rustix::event::eventfd(3, rustix::event::EventfdFlags::CLOEXEC).unwrap();
    let file = null();
    let (a, b) = UnixDatagram::pair().unwrap();
    a.send(b"one").unwrap();
    a.send(b"three").unwrap();
    let udp = UdpSocket::bind("127.0.0.1:0").unwrap();
    let mut numbers = vec![number(&r), number(&w), number(&counter), number(&file)];
    numbers.extend([number(&a), number(&b), number(&udp)]);
    collect(&numbers)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    /// Whatever bytes an image holds: an error or a table, never a panic.
    #[test]
    fn hostile_bytes_do_no_harm(at in any::<prop::sample::Index>(), value: u8, cut: Option<u16>) {
        let mut blob = to_fdt(&rich_table()).unwrap();
        let index = at.index(blob.len());
        blob[index] = value;
        if let Some(cut) = cut {
            blob.truncate(usize::from(cut));
        }
        if let Ok(table) = from_fdt::<FdTable>(&blob)
            && let Ok(checked) = check_table(&table, &request(FilesPolicy::Reconcile))
        {
            let _ = recreate_table(&table, checked);
        }
    }
}
