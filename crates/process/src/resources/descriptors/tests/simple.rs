//! Devices, pipes, counters, timers, signals, epoll.

use super::super::{Description, finish_calls};
use super::*;
use outlive_linux::remote::Arg;
use rustix::event::{EventfdFlags, epoll, eventfd};
use rustix::fs::{Mode, OFlags, fcntl_getfl, fcntl_setfl};
use rustix::io::{Errno, read, write};
use rustix::pipe::{PipeFlags, fcntl_getpipe_size, fcntl_setpipe_size, pipe_with};
use rustix::time::{
    ClockId, Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, clock_gettime,
    timerfd_create, timerfd_gettime, timerfd_settime,
};

#[test]
fn devices() {
    let _quiet = no_child_starts();
    for (path, flags) in [
        ("/dev/null", OFlags::RDWR),
        ("/dev/zero", OFlags::RDONLY),
        ("/dev/full", OFlags::WRONLY | OFlags::APPEND),
        ("/dev/random", OFlags::RDONLY | OFlags::NONBLOCK),
        ("/dev/urandom", OFlags::RDONLY),
    ] {
        let fd = rustix::fs::open(path, flags | OFlags::CLOEXEC, Mode::empty()).unwrap();
        let made = recreate(&collect(&[number(&fd)]));
        let again = made_for(&made, number(&fd));
        assert_same(&fd, &again);
        let link = std::fs::read_link(format!("/proc/self/fd/{}", again.as_raw_fd())).unwrap();
        assert_eq!(link.to_str(), Some(path));
    }
}

#[test]
fn a_pipe_keeps_contents_capacity_and_flags() {
    let _quiet = no_child_starts();
    let (r, w) = pipe_with(PipeFlags::CLOEXEC).unwrap();
    fcntl_setpipe_size(&w, 1 << 17).unwrap();
    let data: Vec<u8> = (0..100_000_u32).map(|n| n as u8).collect();
    assert_eq!(write(&w, &data).unwrap(), data.len());
    fcntl_setfl(&r, OFlags::NONBLOCK).unwrap();
    let table = collect(&[number(&r), number(&w)]);
    assert_eq!(table.pipes.len(), 1);
    let mut original = vec![0; data.len() + 1];
    assert_eq!(
        read(&r, &mut original).unwrap(),
        data.len(),
        "the original is untouched"
    );
    write(&w, &data).unwrap();

    let made = recreate(&table);
    let (r2, w2) = (made_for(&made, number(&r)), made_for(&made, number(&w)));
    assert_same(&r, &r2);
    assert_same(&w, &w2);
    assert_eq!(fcntl_getpipe_size(&r2).unwrap(), 1 << 17);
    let mut out = vec![0; data.len() + 1];
    assert_eq!(read(&r2, &mut out).unwrap(), data.len());
    assert_eq!(out[..data.len()], data[..]);
    assert_eq!(read(&r2, &mut out), Err(Errno::AGAIN));
    write(&w2, b"still connected").unwrap();
    assert_eq!(read(&r2, &mut out).unwrap(), 15);
    drop((made, w2));
    assert_eq!(
        read(&r2, &mut out),
        Ok(0),
        "no end of it stays in the restorer"
    );
}

#[test]
fn packets_stay_packets() {
    let _quiet = no_child_starts();
    let (r, w) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::DIRECT).unwrap();
    write(&w, b"one").unwrap();
    write(&w, b"three").unwrap();
    let made = recreate(&collect(&[number(&r), number(&w)]));
    let r2 = made_for(&made, number(&r));
    assert_same(&w, &made_for(&made, number(&w)));
    let mut out = [0; 64];
    assert_eq!(read(&r2, &mut out).unwrap(), 3);
    assert_eq!(read(&r2, &mut out).unwrap(), 5);
}

#[test]
fn an_end_that_was_opened_twice_is_two_descriptions_of_one_pipe() {
    let _quiet = no_child_starts();
    let (r, w) = pipe_with(PipeFlags::CLOEXEC).unwrap();
    let path = format!("/proc/self/fd/{}", r.as_raw_fd());
    let again = rustix::fs::open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()).unwrap();
    fcntl_setfl(&again, OFlags::NONBLOCK).unwrap();
    let table = collect(&[number(&r), number(&w), number(&again)]);
    assert_eq!((table.pipes.len(), table.descriptions.len()), (1, 3));
    let made = recreate(&table);
    assert_same(&r, &made_for(&made, number(&r)));
    assert_same(&again, &made_for(&made, number(&again)));
    write(made_for(&made, number(&w)), b"x").unwrap();
    assert_eq!(read(made_for(&made, number(&again)), &mut [0; 4]), Ok(1));
}

#[test]
fn an_end_whose_other_end_is_closed_stays_so() {
    let _quiet = no_child_starts();
    let (r, w) = pipe_with(PipeFlags::CLOEXEC).unwrap();
    write(&w, b"last words").unwrap();
    drop(w);
    let (r3, w3) = pipe_with(PipeFlags::CLOEXEC).unwrap();
    drop(r3);
    let made = recreate(&collect(&[number(&r), number(&w3)]));
    let mut out = [0; 64];
    let r2 = made_for(&made, number(&r));
    assert_eq!(read(&r2, &mut out), Ok(10));
    assert_eq!(read(&r2, &mut out), Ok(0));
    assert_eq!(write(made_for(&made, number(&w3)), b"x"), Err(Errno::PIPE));
}

#[test]
fn event_counters() {
    let _quiet = no_child_starts();
    let plain = eventfd(7, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap();
    let semaphore = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::SEMAPHORE).unwrap();
    let large = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
    write(&large, &(u64::MAX - 1).to_ne_bytes()).unwrap();
    let all = [&plain, &semaphore, &large];
    let made = recreate(&collect(&all.map(number)));
    for fd in all {
        assert_same(fd, &made_for(&made, number(fd)));
    }
}

fn timer(clock: TimerfdClockId, flags: TimerfdTimerFlags, value: i64, period: i64) -> OwnedFd {
    let fd = timerfd_create(clock, TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK).unwrap();
    let at = |tv_nsec: i64| Timespec {
        tv_sec: tv_nsec / 1_000_000_000,
        tv_nsec: tv_nsec % 1_000_000_000,
    };
    let spec = Itimerspec {
        it_value: at(value),
        it_interval: at(period),
    };
    timerfd_settime(&fd, flags, &spec).unwrap();
    fd
}

#[test]
fn timers_go_on_with_the_time_that_was_left() {
    let _quiet = no_child_starts();
    const HOUR: i64 = 3_600_000_000_000;
    let relative = timer(
        TimerfdClockId::Monotonic,
        TimerfdTimerFlags::empty(),
        HOUR,
        5,
    );
    let idle = timer(TimerfdClockId::Boottime, TimerfdTimerFlags::empty(), 0, 0);
    let now = clock_gettime(ClockId::Realtime);
    let deadline = now.tv_sec * 1_000_000_000 + HOUR;
    let wall = timer(
        TimerfdClockId::Realtime,
        TimerfdTimerFlags::ABSTIME,
        deadline,
        0,
    );
    let table = collect(&[number(&relative), number(&idle), number(&wall)]);
    let made = recreate(&table);
    let left = |fd: &OwnedFd| {
        let spec = timerfd_gettime(fd).unwrap();
        (spec.it_value.tv_sec, spec.it_interval.tv_nsec)
    };
    for (fd, interval) in [(&relative, 5), (&wall, 0)] {
        let (seconds, period) = left(&made_for(&made, number(fd)));
        // It may have run for a while, but never backwards.
        assert!(
            (3000..=3600).contains(&seconds) && period == interval,
            "{seconds} {period}"
        );
    }
    assert_eq!(left(&made_for(&made, number(&idle))), (0, 0));
    let Description::TimerFd(state) = &table.descriptions[2].object else {
        panic!()
    };
    let off = state.deadline.unwrap().abs_diff(deadline as u64);
    assert!(off < 1_000_000_000, "the wall-clock time is kept: {off}");
}

#[test]
fn a_periodic_timer_that_was_not_read_goes_on_when_it_is() {
    use rustix::event::{PollFd, PollFlags, poll};
    let _quiet = no_child_starts();
    let patience = Timespec {
        tv_sec: 30,
        tv_nsec: 0,
    };
    let ticks = |fd: &OwnedFd| {
        let mut fds = [PollFd::new(fd, PollFlags::IN)];
        assert_eq!(poll(&mut fds, Some(&patience)), Ok(1), "it does not tick");
        let mut count = [0; 8];
        read(fd, &mut count).unwrap();
        u64::from_ne_bytes(count)
    };
    let periodic = timer(
        TimerfdClockId::Boottime,
        TimerfdTimerFlags::empty(),
        1,
        1_000_000,
    );
    let mut fds = [PollFd::new(&periodic, PollFlags::IN)];
    assert_eq!(poll(&mut fds, Some(&patience)), Ok(1));
    let table = collect(&[number(&periodic)]);
    let Description::TimerFd(state) = &table.descriptions[0].object else {
        panic!()
    };
    // It stands until somebody looks; then what was due meanwhile is counted, and it goes on.
    assert!(state.ticks > 0 && (1..=1_000_000).contains(&state.remaining));
    let again = made_for(&recreate(&table), number(&periodic));
    for _ in 0..3 {
        assert!(ticks(&again) > 0);
    }
}

#[test]
fn expirations_that_were_not_read_are_kept() {
    let _quiet = no_child_starts();
    let fired = timer(TimerfdClockId::Monotonic, TimerfdTimerFlags::empty(), 1, 0);
    let mut fds = [rustix::event::PollFd::new(
        &fired,
        rustix::event::PollFlags::IN,
    )];
    rustix::event::poll(&mut fds, None).unwrap();
    let made = recreate(&collect(&[number(&fired)]));
    let mut out = [0; 8];
    read(made_for(&made, number(&fired)), &mut out).unwrap();
    assert_eq!(u64::from_ne_bytes(out), 1);
}

#[test]
fn signal_descriptors() {
    let _quiet = no_child_starts();
    let fd = outlive_linux::descriptors::signalfd(1 << 9 | 1 << 40).unwrap();
    let made = recreate(&collect(&[number(&fd)]));
    assert_same(&fd, &made_for(&made, number(&fd)));
}

#[test]
fn epoll_instances_watch_the_same_again() {
    let _quiet = no_child_starts();
    let poller = epoll::create(epoll::CreateFlags::CLOEXEC).unwrap();
    let inner = epoll::create(epoll::CreateFlags::CLOEXEC).unwrap();
    let (r, w) = pipe_with(PipeFlags::CLOEXEC).unwrap();
    let counters: Vec<_> = (0..3)
        .map(|n| eventfd(n, EventfdFlags::CLOEXEC).unwrap())
        .collect();
    let add = |fd: &OwnedFd, data: u64, flags| {
        epoll::add(&poller, fd, epoll::EventData::new_u64(data), flags).unwrap();
    };
    add(&r, u64::MAX, epoll::EventFlags::IN | epoll::EventFlags::ET);
    add(&inner, 1 << 40, epoll::EventFlags::IN);
    for (n, counter) in counters.iter().enumerate() {
        add(
            counter,
            n as u64,
            epoll::EventFlags::IN | epoll::EventFlags::ONESHOT,
        );
    }
    let mut numbers = vec![number(&poller), number(&inner), number(&r), number(&w)];
    numbers.extend(counters.iter().map(number));
    let table = collect(&numbers);
    let made = recreate(&table);
    let calls = finish_calls(&table);
    assert_eq!(calls.len(), 5);
    // Played here with what was made, instead of in a restored process.
    for call in calls {
        assert_eq!((call.number, call.args.len()), (libc::SYS_epoll_ctl, 4));
        let [
            Arg::Value(instance),
            Arg::Value(1),
            Arg::Value(target),
            Arg::In(event),
        ] = &call.args[..]
        else {
            panic!("{call:?}")
        };
        let flags = u32::from_ne_bytes(event[..4].try_into().unwrap());
        let data = u64::from_ne_bytes(event[4..12].try_into().unwrap());
        epoll::add(
            made_for(&made, *instance as u32),
            made_for(&made, *target as u32),
            epoll::EventData::new_u64(data),
            epoll::EventFlags::from_bits_retain(flags),
        )
        .unwrap();
    }
    let watches = |fd: &OwnedFd| {
        let mut list: Vec<(String, String)> = info(fd)
            .lines()
            .map(|(_, line)| {
                let words: Vec<&str> = line.split_whitespace().collect();
                (words[2].to_owned(), words[4].to_owned())
            })
            .collect();
        list.sort();
        list
    };
    assert_eq!(watches(&poller).len(), 5);
    assert_eq!(watches(&poller), watches(&made_for(&made, number(&poller))));
}

#[test]
fn an_epoll_watch_without_a_number_is_refused() {
    let _quiet = no_child_starts();
    let poller = epoll::create(epoll::CreateFlags::CLOEXEC).unwrap();
    let counter = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
    let kept = counter.try_clone().unwrap();
    let data = epoll::EventData::new_u64(0);
    epoll::add(&poller, &counter, data, epoll::EventFlags::IN).unwrap();
    let gone = number(&counter);
    drop(counter);
    let refusals = refused(&[number(&poller), number(&kept)]);
    assert_eq!(refusals.len(), 1);
    assert!(
        refusals[0]
            .what
            .contains(&format!("still watches fd {gone}")),
        "{}",
        refusals[0]
    );
}

#[test]
fn flags_that_can_be_set_are_set() {
    let _quiet = no_child_starts();
    let (r, w) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK).unwrap();
    let made = recreate(&collect(&[number(&r), number(&w)]));
    for fd in [&r, &w] {
        assert!(
            fcntl_getfl(made_for(&made, number(fd)))
                .unwrap()
                .contains(OFlags::NONBLOCK)
        );
    }
}

#[test]
fn a_named_pipe_with_both_ends_keeps_its_contents() {
    let _quiet = no_child_starts();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("fifo");
    let make = || {
        let mode = Mode::RUSR | Mode::WUSR;
        rustix::fs::mkfifoat(rustix::fs::CWD, &path, mode).unwrap();
    };
    make();
    let open = |flags| rustix::fs::open(&path, flags | OFlags::CLOEXEC, Mode::empty()).unwrap();
    let both = open(OFlags::RDWR);
    let r = open(OFlags::RDONLY | OFlags::NONBLOCK);
    let w = open(OFlags::WRONLY);
    fcntl_setpipe_size(&w, 8192).unwrap();
    write(&w, b"contents").unwrap();
    let numbers = [number(&r), number(&w), number(&both)];
    let table = collect(&numbers);
    assert_eq!(table.pipes.len(), 1);
    let checked = check_table(&table, &request(FilesPolicy::Reconcile)).unwrap();
    let full = recreate_table(&table, checked).unwrap_err().to_string();
    assert!(full.contains("something waits already"), "{full}");
    let original = [r, w, both].map(|fd| info(&fd).status());
    let made = recreate(&table);
    let again = numbers.map(|n| made_for(&made, n));
    assert_eq!(
        [&again[0], &again[1], &again[2]].map(|fd| info(fd).status()),
        original
    );
    drop(made);
    let [r, w, both] = again;
    assert_eq!(fcntl_getpipe_size(&r).unwrap(), 8192);
    let mut out = [0; 64];
    assert_eq!(read(&r, &mut out), Ok(8));
    assert_eq!(&out[..8], b"contents");
    assert_eq!(read(&r, &mut out), Err(Errno::AGAIN));
    drop((both, w));
    assert_eq!(read(&r, &mut out), Ok(0));
    std::fs::remove_file(&path).unwrap();
    assert!(check_refused(&table)[0].what.contains("is gone"));
}

#[test]
fn a_terminal_of_the_program_keeps_modes_and_window() {
    use outlive_linux::terminal::{self, Switch};
    use rustix::termios::{Winsize, tcgetwinsize, tcsetwinsize};
    let _quiet = no_child_starts();
    let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC;
    let open = |path: &str| rustix::fs::open(path, flags, Mode::empty()).unwrap();
    let master = open("/dev/ptmx");
    terminal::set_switch(master.as_fd(), Switch::Locked, false).unwrap();
    let side = open(&format!(
        "/dev/pts/{}",
        terminal::number(master.as_fd()).unwrap()
    ));
    let window = Winsize {
        ws_row: 7,
        ws_col: 77,
        ws_xpixel: 3,
        ws_ypixel: 4,
    };
    tcsetwinsize(&side, window).unwrap();
    let mut modes = terminal::modes(side.as_fd()).unwrap();
    modes[12] ^= 8;
    terminal::set_modes(side.as_fd(), &modes).unwrap();
    terminal::set_switch(master.as_fd(), Switch::Packets, true).unwrap();
    let numbers = [number(&master), number(&side)];
    let table = collect(&numbers);
    let alone = refused_or_stream(numbers[1]);
    assert_eq!(
        alone, "standard stream or terminal",
        "its master is not of it"
    );
    drop((master, side));
    let made = recreate(&table);
    let [master, side] = numbers.map(|n| made_for(&made, n));
    assert_eq!(terminal::modes(side.as_fd()), Ok(modes));
    let again = tcgetwinsize(&side).unwrap();
    let sizes = |w: &Winsize| [w.ws_row, w.ws_col, w.ws_xpixel, w.ws_ypixel];
    assert_eq!(sizes(&again), sizes(&window));
    assert_eq!(terminal::switch(master.as_fd(), Switch::Packets), Ok(true));
    write(&side, b"seen").unwrap();
    let mut out = [9; 16];
    assert_eq!(read(&master, &mut out), Ok(5));
    assert_eq!(&out[..5], b"\0seen", "in packet mode");
}

fn refused_or_stream(number: u32) -> &'static str {
    collect(&[number]).descriptions[0].object.name()
}

#[test]
fn terminals_that_make_no_sense_are_errors() {
    let _quiet = no_child_starts();
    let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC;
    let master = rustix::fs::open("/dev/ptmx", flags, Mode::empty()).unwrap();
    let table = collect(&[number(&master)]);
    let with = |change: fn(&mut super::super::pty::PtyMasterState)| {
        let mut table = table.clone();
        match &mut table.descriptions[0].object {
            Description::PtyMaster(state) => change(state),
            other => panic!("{other:?}"),
        }
        table.validate()
    };
    with(|_| ()).unwrap();
    assert!(with(|state| state.modes.truncate(43)).is_err());
    assert!(with(|state| state.window = vec![1, 2, 3]).is_err());
    assert!(with(|state| state.window[0] = 70_000).is_err());
    assert!(with(|state| state.owner.clear()).is_err());
    let mut twice = table.clone();
    let mut second = twice.descriptions[0].clone();
    second.holders[0].number += 500;
    twice.descriptions.push(second);
    assert!(twice.validate().is_err());
    let mut orphan = table;
    orphan.descriptions[0].object = Description::Pty(super::super::pty::PtyState {
        number: 3,
        unread: false,
    });
    assert!(orphan.validate().is_err());
}
