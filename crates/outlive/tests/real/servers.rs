//! Servers of several processes: killed with their keeper, restored, and asked again.

use crate::support::{
    Kept, Place, alone, end, family, installed, may_run, signal, test_program, times, until,
};
use rustix::process::Signal;
use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::PermissionsExt;

/// Kills the keeper and the whole program at once, and restores what is left: the newest epoch.
fn die_and_come_back(place: &Place, mut kept: Kept) -> Kept {
    for _ in 0..2 {
        place.epoch_after("a", place.newest("a"));
    }
    let members = family(kept.pid()).split_off(1);
    let count = members.len();
    kept.kill();
    members.into_iter().for_each(end);
    drop(kept);
    let mut kept = place.start(&["restore", "a"]);
    until("all of it is there again", || {
        let ended = kept.keeper.try_wait().unwrap();
        assert!(ended.is_none(), "{}", place.said());
        // Before that, who makes a process may be counted for it.
        place.said().contains("runs again") && family(kept.pid()).len() > count
    });
    kept
}

/// The body of an answer, over a connection of its own.
fn get(port: u16, path: &str) -> Option<Vec<u8>> {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).ok()?;
    write!(stream, "GET {path} HTTP/1.0\r\n\r\n").ok()?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).ok()?;
    let end = answer.windows(4).position(|w| w == b"\r\n\r\n")?;
    answer.starts_with(b"HTTP/1.1 200").then_some(())?;
    Some(answer.split_off(end + 4))
}

/// A port that is free now.
fn free_port() -> u16 {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    listener.local_addr().unwrap().port()
}

/// Two processes that stream numbers to each other through TCP connections, as fast as they go; any
/// byte that is lost or doubled ends them, and so does a connection that is reset.
#[test]
fn streams_between_processes_lose_and_double_nothing() {
    if !may_run("streams_between_processes_lose_and_double_nothing") {
        return;
    }
    let (_alone, place) = (alone(), Place::new());
    let streams = test_program("streams");
    let mut kept = place.start(&[
        "run", "--name", "a", "--every", "50ms", "--", &streams, "fork",
    ]);
    until("it has begun", || family(kept.pid()).len() == 3);
    for _ in 0..times(6, 200) {
        kept = die_and_come_back(&place, kept);
        if family(kept.pid()).len() != 3 {
            panic!("it ended with {}: {}", kept.code(), place.said());
        }
    }
    place.epoch_after("a", place.newest("a"));
    signal(family(kept.pid())[1], Signal::USR1);
    assert_eq!(kept.code(), 0, "{}", place.said());
}

/// A master that tells its two workers of each other through sockets which it owns the signals of.
#[test]
fn nginx_with_its_workers_goes_on() {
    if !may_run("nginx_with_its_workers_goes_on") {
        return;
    }
    let (_alone, place) = (alone(), Place::new());
    fs::set_permissions(place.dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let port = free_port();
    let page: Vec<u8> = (0..300_000u32).map(|n| (n * 7 / 3) as u8).collect();
    fs::write(place.path("page"), &page).unwrap();
    let config = format!(
        "daemon off;\nworker_processes 2;\nuser nobody nogroup;\npid {0}/pid;\n\
         error_log {0}/log info;\nevents {{}}\nhttp {{\n access_log {0}/asked;\n\
         client_body_temp_path {0}/t1;\n proxy_temp_path {0}/t2;\n fastcgi_temp_path {0}/t3;\n\
         uwsgi_temp_path {0}/t4;\n scgi_temp_path {0}/t5;\n\
         server {{\n  listen 127.0.0.1:{port};\n  root {0};\n }}\n}}\n",
        place.dir.path().display()
    );
    fs::write(place.path("config"), config).unwrap();
    let (nginx, config) = (installed("nginx"), place.text("config"));
    let mut kept = place.start(&[
        "run", "--name", "a", "--every", "50ms", "--", &nginx, "-c", &config,
    ]);
    until("it answers", || get(port, "/page").is_some());
    let mut asked = 1;
    let workers = |kept: &Kept| family(kept.pid())[2..].to_vec();
    let first = workers(&kept);
    assert_eq!(first.len(), 2, "{first:?}");
    for _ in 0..3 {
        kept = die_and_come_back(&place, kept);
        assert_eq!(workers(&kept), first, "{}", place.said());
        for _ in 0..20 {
            assert!(get(port, "/page").unwrap() == page, "{}", place.said());
            asked += 1;
        }
    }
    let lines = || {
        fs::read_to_string(place.path("asked"))
            .unwrap()
            .lines()
            .count()
    };
    until("every request is logged", || lines() == asked);
    // The restored master has its workers replaced, which it tells them through its sockets.
    let master = family(kept.pid())[1];
    signal(master, Signal::HUP);
    until("the workers are new", || {
        let now = workers(&kept);
        now.len() == 2 && now.iter().all(|pid| !first.contains(pid))
    });
    assert!(get(port, "/page").unwrap() == page);
    kept = die_and_come_back(&place, kept);
    assert!(get(port, "/page").unwrap() == page);
    signal(master, Signal::QUIT);
    assert_eq!(kept.code(), 0, "{}", place.said());
}
