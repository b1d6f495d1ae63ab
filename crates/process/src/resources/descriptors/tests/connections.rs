//! TCP connections with both ends in the subject.

use super::super::{Description, FdTable};
use super::*;
use outlive_linux::sockopt;
use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};

/// Connections without a handshake need `CAP_NET_ADMIN`.
fn may_run(name: &str) -> bool {
    let root = rustix::process::geteuid().is_root();
    if !root {
        println!("SKIPPED 1 test: {name}: needs root");
        println!("skipped: needs root");
    }
    root
}

fn pair(at: &str) -> [TcpStream; 2] {
    let listener = TcpListener::bind(at).unwrap();
    let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    [client, listener.accept().unwrap().0]
}

fn places(streams: &[TcpStream; 2]) -> Vec<(SocketAddr, SocketAddr)> {
    let place = |s: &TcpStream| (s.local_addr().unwrap(), s.peer_addr().unwrap());
    streams.iter().map(place).collect()
}

/// Collects both ends, lets them go, and makes them again.
fn again(streams: [TcpStream; 2]) -> ([TcpStream; 2], FdTable) {
    let numbers = streams.each_ref().map(number);
    let table = collect(&numbers);
    drop(streams);
    let mut made = recreate(&table);
    let streams = numbers.map(|n| TcpStream::from(made_for(&made, n)));
    assert_eq!(made.apply_files(me()).unwrap(), Vec::<String>::new());
    (streams, table)
}

fn noise(seed: u8, length: usize) -> Vec<u8> {
    (0..length)
        .map(|n| (n * 31 + n / 253) as u8 ^ seed)
        .collect()
}

/// Writes until nothing more fits.
fn fill(stream: &mut TcpStream, seed: u8) -> Vec<u8> {
    stream.set_nonblocking(true).unwrap();
    let data = noise(seed, 24 << 20);
    let mut sent = 0;
    loop {
        match stream.write(&data[sent..]) {
            Ok(n) => sent += n,
            Err(e) if e.kind() == ErrorKind::WouldBlock => break,
            Err(e) => panic!("{e}"),
        }
    }
    stream.set_nonblocking(false).unwrap();
    data[..sent].to_vec()
}

fn read(stream: &mut TcpStream, length: usize) -> Vec<u8> {
    let mut data = vec![0; length];
    stream.read_exact(&mut data).unwrap();
    data
}

#[test]
fn what_was_written_and_not_read_is_kept_in_both_directions() {
    if !may_run("what_was_written_and_not_read_is_kept_in_both_directions") {
        return;
    }
    let _quiet = no_child_starts();
    for at in ["127.0.0.1:0", "[::1]:0", "127.0.0.77:0"] {
        let Ok([mut a, mut b]) = std::panic::catch_unwind(|| pair(at)) else {
            assert_eq!(at, "[::1]:0", "a host without IPv6");
            continue;
        };
        let were = places(&[a.try_clone().unwrap(), b.try_clone().unwrap()]);
        a.write_all(b"from a to b").unwrap();
        b.write_all(b"from b to a, more").unwrap();
        assert_eq!(read(&mut b, 5), b"from ");
        let set = |level, name, value| sockopt::set_u32(b.as_fd(), level, name, value).unwrap();
        set(libc::IPPROTO_TCP, libc::TCP_NODELAY, 1);
        set(libc::IPPROTO_TCP, libc::TCP_KEEPIDLE, 55);
        set(libc::SOL_SOCKET, libc::SO_RCVBUF, 99_999);
        let options = [
            (libc::IPPROTO_TCP, libc::TCP_NODELAY),
            (libc::IPPROTO_TCP, libc::TCP_KEEPIDLE),
            (libc::SOL_SOCKET, libc::SO_RCVBUF),
            (libc::SOL_SOCKET, libc::SO_SNDBUF),
            (libc::SOL_SOCKET, libc::SO_REUSEADDR),
            (libc::SOL_SOCKET, 72),
        ];
        let look = |s: &TcpStream| {
            options.map(|(level, name)| sockopt::get_u32(s.as_fd(), level, name).unwrap())
        };
        let (of_a, of_b) = (look(&a), look(&b));
        let ([mut a, mut b], _) = again([a, b]);
        assert_eq!(
            places(&[a.try_clone().unwrap(), b.try_clone().unwrap()]),
            were
        );
        assert_eq!((look(&a), look(&b)), (of_a, of_b), "{at}");
        assert_eq!(read(&mut b, 6), b"a to b");
        assert_eq!(read(&mut a, 17), b"from b to a, more");
        for (from, to, data) in [(1, 0, noise(3, 3 << 20)), (0, 1, noise(4, 3 << 20))] {
            let mut ends = [a.try_clone().unwrap(), b.try_clone().unwrap()];
            let sent = data.clone();
            let mut writer = ends[from].try_clone().unwrap();
            let thread = std::thread::spawn(move || writer.write_all(&sent).unwrap());
            assert!(read(&mut ends[to], data.len()) == data);
            thread.join().unwrap();
        }
    }
}

/// The original goes on, too: being looked at in the middle of a flood does it no harm.
#[test]
fn a_flood_that_is_stuck_is_neither_lost_nor_doubled() {
    if !may_run("a_flood_that_is_stuck_is_neither_lost_nor_doubled") {
        return;
    }
    let _quiet = no_child_starts();
    let [mut a, mut b] = pair("127.0.0.1:0");
    let (to_b, to_a) = (fill(&mut a, 1), fill(&mut b, 2));
    assert!(read(&mut b, 1 << 16) == to_b[..1 << 16]);
    let (left, numbers) = (&to_b[1 << 16..], [number(&a), number(&b)]);
    let table = collect(&numbers);
    for description in &table.descriptions {
        let Description::TcpPairEnd(end) = &description.object else {
            panic!("{description:?}");
        };
        assert!(!end.under_way.is_empty() && !end.received.is_empty());
    }
    // Nobody reads it without being written to: what is stuck moves as it is read.
    assert!(read(&mut b, left.len()) == left);
    assert!(read(&mut a, to_a.len()) == to_a);
    drop((a, b));
    let made = recreate(&table);
    let [mut a, mut b] = numbers.map(|n| TcpStream::from(made_for(&made, n)));
    drop(made);
    assert!(read(&mut b, left.len()) == left);
    assert!(read(&mut a, to_a.len()) == to_a);
    drop(a);
    assert_eq!(b.read(&mut [0]).unwrap(), 0);
}

/// A server that never asked to share its port is in nobody's way but its own.
#[test]
fn a_listener_and_its_connections_share_a_port_again() {
    use rustix::net::{
        AddressFamily, SocketType, accept, bind, connect, getsockname, listen, socket,
    };
    if !may_run("a_listener_and_its_connections_share_a_port_again") {
        return;
    }
    let _quiet = no_child_starts();
    let fresh = || socket(AddressFamily::INET, SocketType::STREAM, None).unwrap();
    let (listener, client) = (fresh(), fresh());
    bind(&listener, &"127.0.0.1:0".parse::<SocketAddr>().unwrap()).unwrap();
    listen(&listener, 5).unwrap();
    let at = SocketAddr::try_from(getsockname(&listener).unwrap()).unwrap();
    connect(&client, &at).unwrap();
    let server = accept(&listener).unwrap();
    let numbers = [number(&listener), number(&client), number(&server)];
    let table = collect(&numbers);
    // The server's end is closed first, so that the kernel keeps it for a while.
    drop(server);
    drop((client, listener));
    let mut made = recreate(&table);
    assert_eq!(made.apply_files(me()).unwrap(), Vec::<String>::new());
    let [listener, client, server] = numbers.map(|n| made_for(&made, n));
    let (mut client, mut server) = (TcpStream::from(client), TcpStream::from(server));
    client.write_all(b"old").unwrap();
    assert_eq!(read(&mut server, 3), b"old");
    let mut new = TcpStream::connect(at).unwrap();
    new.write_all(b"new").unwrap();
    let (mut accepted, _) = TcpListener::from(listener).accept().unwrap();
    assert_eq!(read(&mut accepted, 3), b"new");
}

/// A keeper that died while it looked has left a connection in repair mode, in which the program
/// could not send.
#[test]
fn what_a_dead_keeper_left_is_put_right() {
    if !may_run("what_a_dead_keeper_left_is_put_right") {
        return;
    }
    let _quiet = no_child_starts();
    let [mut a, mut b] = pair("127.0.0.1:0");
    std::mem::forget(outlive_linux::tcp::Repair::begin(a.as_fd()).unwrap());
    assert!(a.write(b"x").is_err(), "it is in repair mode");
    collect(&[number(&a), number(&b)]);
    a.write_all(b"again").unwrap();
    assert_eq!(read(&mut b, 5), b"again");
}

#[test]
fn an_end_of_a_stream_comes_after_what_waits() {
    if !may_run("an_end_of_a_stream_comes_after_what_waits") {
        return;
    }
    let _quiet = no_child_starts();
    let [mut a, mut b] = pair("127.0.0.1:0");
    let flood = fill(&mut a, 5);
    a.shutdown(Shutdown::Write).unwrap();
    b.write_all(b"back").unwrap();
    let ([mut a, mut b], _) = again([a, b]);
    let mut all = Vec::new();
    b.read_to_end(&mut all).unwrap();
    assert!(all == flood);
    assert!(a.write(b"x").is_err(), "it has ended its stream");
    b.write_all(b", more").unwrap();
    assert_eq!(read(&mut a, 10), b"back, more");
    // Now nothing is under way to the end that has shut, and the other one shuts too.
    let ([mut a, mut b], _) = again([a, b]);
    b.write_all(b"last").unwrap();
    drop(b);
    let mut all = Vec::new();
    a.read_to_end(&mut all).unwrap();
    assert_eq!(all, b"last");
}

#[test]
fn what_a_closed_peer_has_left_can_be_read() {
    if !may_run("what_a_closed_peer_has_left_can_be_read") {
        return;
    }
    let _quiet = no_child_starts();
    let [mut a, b] = pair("127.0.0.1:0");
    let left = fill(&mut a, 6);
    drop(a);
    // As long as something is stuck, the kernel keeps the other end.
    let n = number(&b);
    let mut b = b;
    assert!(read(&mut b, left.len() - 100) == left[..left.len() - 100]);
    let table = collect(&[n]);
    drop(b);
    let made = recreate(&table);
    let mut b = TcpStream::from(made_for(&made, n));
    drop(made);
    let mut all = Vec::new();
    b.read_to_end(&mut all).unwrap();
    assert!(all == left[left.len() - 100..]);
}

#[test]
fn versions_meet_in_one_connection() {
    if !may_run("versions_meet_in_one_connection") {
        return;
    }
    let _quiet = no_child_starts();
    let Ok(listener) = TcpListener::bind("[::]:0") else {
        println!("skipped: a host without IPv6");
        return;
    };
    let port = listener.local_addr().unwrap().port();
    let mut client = TcpStream::connect(("127.0.0.1", port)).unwrap();
    let (mut server, _) = listener.accept().unwrap();
    let were = places(&[client.try_clone().unwrap(), server.try_clone().unwrap()]);
    client.write_all(b"four").unwrap();
    server.write_all(b"six").unwrap();
    let ([mut client, mut server], _) = again([client, server]);
    let now = places(&[client.try_clone().unwrap(), server.try_clone().unwrap()]);
    assert_eq!(now, were);
    assert_eq!(read(&mut server, 4), b"four");
    assert_eq!(read(&mut client, 3), b"six");
}

#[test]
fn connections_that_make_no_sense_are_errors() {
    if !may_run("connections_that_make_no_sense_are_errors") {
        return;
    }
    let _quiet = no_child_starts();
    let [a, b] = pair("127.0.0.1:0");
    let table = collect(&[number(&a), number(&b)]);
    let with = |change: fn(&mut super::super::tcp_pair::TcpPairEndState)| {
        let mut table = table.clone();
        match &mut table.descriptions[0].object {
            Description::TcpPairEnd(end) => change(end),
            other => panic!("{other:?}"),
        }
        table.validate()
    };
    with(|_| ()).unwrap();
    assert!(with(|end| end.pair += 1).is_err());
    assert!(with(|end| end.side = end.side.other()).is_err());
    assert!(with(|end| end.peer.port ^= 1).is_err());
    assert!(with(|end| end.peer.ip = vec![8, 8, 8, 8]).is_err());
    assert!(with(|end| end.version = 5).is_err());
    assert!(with(|end| end.peer_closed = true).is_err());
    assert!(with(|end| end.buffers.clear()).is_err());
    assert!(with(|end| end.received = vec![0; (64 << 20) + 1]).is_err());
}
