//! TCP and unix sockets.

use super::*;
use outlive_linux::sockopt;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{OFlags, fcntl_getfl};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketType, bind, getsockname, listen, socket};
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};

fn option(fd: &impl AsFd, level: i32, name: i32) -> Option<u32> {
    sockopt::get_u32(fd.as_fd(), level, name).unwrap()
}

/// Options that the tests set and compare.
const OPTIONS: &[(i32, i32, u32)] = &[
    (libc::SOL_SOCKET, libc::SO_REUSEADDR, 1),
    (libc::SOL_SOCKET, libc::SO_REUSEPORT, 1),
    (libc::SOL_SOCKET, libc::SO_KEEPALIVE, 1),
    (libc::SOL_SOCKET, libc::SO_PRIORITY, 3),
    (libc::SOL_SOCKET, libc::SO_RCVBUF, 99_999),
    (libc::IPPROTO_TCP, libc::TCP_NODELAY, 1),
    (libc::IPPROTO_TCP, libc::TCP_DEFER_ACCEPT, 7),
    (libc::IPPROTO_TCP, libc::TCP_KEEPIDLE, 55),
    (libc::IPPROTO_TCP, libc::TCP_USER_TIMEOUT, 4321),
];

#[test]
fn a_listener_is_where_it_was_with_all_options() {
    let _quiet = no_child_starts();
    for (family, address) in [
        (AddressFamily::INET, "127.0.0.1:0"),
        (AddressFamily::INET6, "[::1]:0"),
    ] {
        let original = socket(family, SocketType::STREAM, None).unwrap();
        for &(level, name, value) in OPTIONS {
            sockopt::set_u32(original.as_fd(), level, name, value).unwrap();
        }
        if family == AddressFamily::INET6 {
            sockopt::set_u32(original.as_fd(), libc::IPPROTO_IPV6, libc::IPV6_V6ONLY, 1).unwrap();
        }
        let address: SocketAddr = address.parse().unwrap();
        if bind(&original, &address).is_err() {
            assert_eq!(family, AddressFamily::INET6, "a host without IPv6");
            continue;
        }
        listen(&original, 123).unwrap();
        let at = SocketAddr::try_from(getsockname(&original).unwrap()).unwrap();
        let table = collect(&[number(&original)]);
        let read: Vec<_> = OPTIONS
            .iter()
            .map(|&(l, n, _)| option(&original, l, n))
            .collect();
        let n = number(&original);
        drop(original);
        let made = recreate(&table);
        let again = made_for(&made, n);
        assert_eq!(
            SocketAddr::try_from(getsockname(&again).unwrap()).unwrap(),
            at
        );
        let now: Vec<_> = OPTIONS
            .iter()
            .map(|&(l, n, _)| option(&again, l, n))
            .collect();
        assert_eq!(now, read);
        let info = sockopt::tcp_info(again.as_fd()).unwrap().unwrap();
        assert_eq!((info.state, info.backlog), (10, 123));
        let mut client = TcpStream::connect(at).unwrap();
        client.write_all(b"x").unwrap();
        let (mut server, _) = TcpListener::from(again).accept().unwrap();
        server.read_exact(&mut [0]).unwrap();
    }
}

#[test]
fn a_listener_comes_back_while_connections_of_its_earlier_life_linger() {
    let _quiet = no_child_starts();
    let listener = socket(AddressFamily::INET, SocketType::STREAM, None).unwrap();
    sockopt::set_u32(listener.as_fd(), libc::SOL_SOCKET, libc::SO_REUSEADDR, 1).unwrap();
    bind(&listener, &"127.0.0.1:0".parse::<SocketAddr>().unwrap()).unwrap();
    listen(&listener, 5).unwrap();
    let at = SocketAddr::try_from(getsockname(&listener).unwrap()).unwrap();
    let client = TcpStream::connect(at).unwrap();
    let listener = TcpListener::from(listener);
    let (server, _) = listener.accept().unwrap();
    let table = collect(&[number(&listener)]);
    let n = number(&listener);
    drop((listener, server));
    let made = recreate(&table);
    let again = made_for(&made, n);
    assert_eq!(
        SocketAddr::try_from(getsockname(&again).unwrap()).unwrap(),
        at
    );
    drop(client);
}

#[test]
fn a_busy_port_is_refused_with_its_holder() {
    let _quiet = no_child_starts();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let table = collect(&[number(&listener)]);
    let refusals = check_refused(&table);
    let text = refusals[0].to_string();
    let address = listener.local_addr().unwrap().to_string();
    assert!(text.contains(&address), "{text}");
    assert!(
        text.contains(&format!("by pid {}", std::process::id())),
        "{text}"
    );
    drop(listener);
}

#[test]
fn sockets_that_were_not_used_yet() {
    let _quiet = no_child_starts();
    let plain = socket(AddressFamily::INET, SocketType::STREAM, None).unwrap();
    sockopt::set_u32(plain.as_fd(), libc::IPPROTO_TCP, libc::TCP_NODELAY, 1).unwrap();
    let bound = socket(AddressFamily::INET, SocketType::STREAM, None).unwrap();
    bind(&bound, &"127.0.0.1:0".parse::<SocketAddr>().unwrap()).unwrap();
    let at = SocketAddr::try_from(getsockname(&bound).unwrap()).unwrap();
    let unix = socket(AddressFamily::UNIX, SocketType::STREAM, None).unwrap();
    let numbers = [number(&plain), number(&bound), number(&unix)];
    let table = collect(&numbers);
    let names: Vec<_> = table.descriptions.iter().map(|d| d.object.name()).collect();
    assert_eq!(
        names,
        [
            "unconnected TCP socket",
            "unconnected TCP socket",
            "unconnected unix socket"
        ]
    );
    drop(bound);
    let made = recreate(&table);
    let again = made_for(&made, numbers[0]);
    assert_eq!(
        option(&again, libc::IPPROTO_TCP, libc::TCP_NODELAY),
        Some(1)
    );
    let again = made_for(&made, numbers[1]);
    assert_eq!(
        SocketAddr::try_from(getsockname(&again).unwrap()).unwrap(),
        at
    );
}

#[test]
fn connections_are_found_reset_with_a_notice() {
    let _quiet = no_child_starts();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let mut client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let (server, _) = listener.accept().unwrap();
    server.set_nonblocking(true).unwrap();
    let (killed, _peer) = {
        let a = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (b, _) = listener.accept().unwrap();
        rustix::net::sockopt::set_socket_linger(&b, Some(std::time::Duration::ZERO)).unwrap();
        drop(b);
        (a, ())
    };
    let table = collect(&[number(&server), number(&killed)]);
    client.write_all(b"the original is untouched").unwrap();
    let checked = check_table(&table, &request(FilesPolicy::Reconcile)).unwrap();
    assert_eq!(
        checked.notices(),
        ["connections that were reset, to outside peers or not accepted yet: 2"]
    );
    let made = recreate_table(&table, checked).unwrap();
    for original in [number(&server), number(&killed)] {
        let again = made_for(&made, original);
        let mut fds = [PollFd::new(&again, PollFlags::IN)];
        poll(&mut fds, Some(&Timespec::default())).unwrap();
        assert!(fds[0].revents().contains(PollFlags::ERR | PollFlags::HUP));
        assert_eq!(rustix::io::read(&again, &mut [0]), Err(Errno::CONNRESET));
    }
    let flags = fcntl_getfl(made_for(&made, number(&server))).unwrap();
    assert!(flags.contains(OFlags::NONBLOCK));
}

#[test]
fn a_unix_listener_replaces_the_file_that_was_left_behind() {
    let _quiet = no_child_starts();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("socket");
    let listener = UnixListener::bind(&path).unwrap();
    listen(&listener, 9).unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o604)).unwrap();
    let table = collect(&[number(&listener)]);
    let refusals = check_refused(&table);
    assert!(
        refusals[0].what.contains("somebody listens"),
        "{}",
        refusals[0]
    );
    let n = number(&listener);
    drop(listener);
    assert!(path.exists(), "left behind");
    let made = recreate(&table);
    let mode = std::fs::metadata(&path).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o604);
    let again = made_for(&made, n);
    let _client = UnixStream::connect(&path).unwrap();
    UnixListener::from(again).accept().unwrap();
    drop(made);
    assert!(
        !path.exists(),
        "a restore that fails leaves no socket behind"
    );
    recreate(&table).keep();
    assert!(path.exists());
    std::fs::remove_file(&path).unwrap();
    std::fs::write(&path, b"precious").unwrap();
    assert!(check_refused(&table)[0].what.contains("something else"));
}

#[test]
fn abstract_names_are_taken_again() {
    let _quiet = no_child_starts();
    let name = format!("outlive-test-{}\0with a zero", std::process::id());
    let address = SocketAddrUnix::new_abstract_name(name.as_bytes()).unwrap();
    let listener = socket(AddressFamily::UNIX, SocketType::SEQPACKET, None).unwrap();
    bind(&listener, &address).unwrap();
    listen(&listener, 4).unwrap();
    let table = collect(&[number(&listener)]);
    assert!(check_refused(&table)[0].what.contains("somebody listens"));
    drop(listener);
    let _made = recreate(&table);
    let client = socket(AddressFamily::UNIX, SocketType::SEQPACKET, None).unwrap();
    rustix::net::connect(&client, &address).unwrap();
}

/// A listening socket with an abstract name, and connections that it accepted: both ends of each.
fn accepted_by_name(label: &str, count: usize) -> (OwnedFd, SocketAddrUnix, Vec<[OwnedFd; 2]>) {
    let name = format!("outlive-test-{label}-{}", std::process::id());
    let address = SocketAddrUnix::new_abstract_name(name.as_bytes()).unwrap();
    let new = || socket(AddressFamily::UNIX, SocketType::STREAM, None).unwrap();
    let listener = new();
    bind(&listener, &address).unwrap();
    listen(&listener, 4).unwrap();
    let connect = || {
        let client = new();
        rustix::net::connect(&client, &address).unwrap();
        [rustix::net::accept(&listener).unwrap(), client]
    };
    let made = (0..count).map(|_| connect()).collect();
    (listener, address, made)
}

fn unix_name_of(fd: &OwnedFd) -> SocketAddrUnix {
    SocketAddrUnix::try_from(getsockname(fd).unwrap()).unwrap()
}

#[test]
fn an_abstract_name_whose_listener_is_another_s_is_kept_or_refused() {
    let _quiet = no_child_starts();
    let (listener, address, ends) = accepted_by_name("another", 1);
    let numbers: Vec<u32> = ends.iter().flatten().map(number).collect();
    let table = collect(&numbers);
    let refusals = check_refused(&table);
    let me = format!("process {} ", std::process::id());
    assert_eq!(refusals.len(), 1);
    let what = &refusals[0].what;
    assert!(
        what.contains("somebody else has the name") && what.contains(&me),
        "{what}"
    );
    drop((listener, ends));
    let made = recreate(&table);
    assert_eq!(unix_name_of(&made_for(&made, numbers[0])), address);
}

#[test]
fn connections_keep_the_abstract_name_of_a_listener_that_is_gone() {
    let _quiet = no_child_starts();
    let (listener, address, ends) = accepted_by_name("gone", 3);
    drop(listener);
    let numbers: Vec<u32> = ends.iter().flatten().map(number).collect();
    let table = collect(&numbers);
    drop(ends);
    let made = recreate(&table);
    for ends in numbers.chunks(2) {
        let [accepted, client] = [0, 1].map(|end| made_for(&made, ends[end]));
        assert_eq!(unix_name_of(&accepted), address);
        rustix::io::write(&client, b"x").unwrap();
        assert_eq!(rustix::io::read(&accepted, &mut [0; 8]), Ok(1));
    }
    let another = socket(AddressFamily::UNIX, SocketType::STREAM, None).unwrap();
    bind(&another, &address).expect("nobody has the name itself");
}

#[test]
fn unix_connections_to_others_are_found_closed_once_all_is_read() {
    let _quiet = no_child_starts();
    let (mine, mut theirs) = UnixStream::pair().unwrap();
    theirs.write_all(b"last words").unwrap();
    let table = collect(&[number(&mine)]);
    let made = recreate(&table);
    let again = made_for(&made, number(&mine));
    let mut out = [0; 64];
    assert_eq!(rustix::io::read(&again, &mut out), Ok(10));
    assert_eq!(rustix::io::read(&again, &mut out), Ok(0));
    theirs.write_all(b"the original is untouched").unwrap();
}

#[test]
fn a_peer_that_left_before_is_no_reset_unless_it_left_something_unread() {
    let _quiet = no_child_starts();
    for unread in [false, true] {
        let (mut mine, mut theirs) = UnixStream::pair().unwrap();
        theirs.write_all(b"last words").unwrap();
        if unread {
            mine.write_all(b"never read").unwrap();
        }
        drop(theirs);
        let table = collect(&[number(&mine)]);
        let checked = check_table(&table, &request(FilesPolicy::Reconcile)).unwrap();
        assert!(checked.notices().is_empty());
        let again = made_for(&recreate_table(&table, checked).unwrap(), number(&mine));
        for socket in [mine.as_fd(), again.as_fd()] {
            let mut out = [0; 64];
            assert_eq!(rustix::io::read(socket, &mut out), Ok(10));
            let end = if unread { Err(Errno::CONNRESET) } else { Ok(0) };
            assert_eq!(rustix::io::read(socket, &mut out), end);
        }
    }
}

#[test]
fn pairs_within_the_program_keep_what_waits_in_both_directions() {
    let _quiet = no_child_starts();
    for kind in [SocketType::STREAM, SocketType::SEQPACKET, SocketType::DGRAM] {
        let flags = rustix::net::SocketFlags::CLOEXEC;
        let (a, b) = rustix::net::socketpair(AddressFamily::UNIX, kind, flags, None).unwrap();
        sockopt::set_u32(a.as_fd(), libc::SOL_SOCKET, libc::SO_RCVBUF, 50_000).unwrap();
        rustix::io::write(&a, b"to b").unwrap();
        rustix::io::write(&b, b"to a").unwrap();
        rustix::io::write(&b, b", twice").unwrap();
        let table = collect(&[number(&a), number(&b)]);
        let made = recreate(&table);
        let (c, d) = (made_for(&made, number(&a)), made_for(&made, number(&b)));
        let size = (libc::SOL_SOCKET, libc::SO_RCVBUF);
        assert_eq!(option(&c, size.0, size.1), option(&a, size.0, size.1));
        let mut out = [0; 64];
        for (to_a, to_b) in [(&a, &b), (&c, &d)] {
            assert_eq!(rustix::io::read(to_b, &mut out), Ok(4));
            let first = if kind == SocketType::STREAM { 11 } else { 4 };
            assert_eq!(rustix::io::read(to_a, &mut out), Ok(first));
            assert_eq!(&out[..4], b"to a");
            if kind != SocketType::STREAM {
                assert_eq!(rustix::io::read(to_a, &mut out), Ok(7));
            }
        }
        rustix::io::write(&c, b"still connected").unwrap();
        assert_eq!(rustix::io::read(&d, &mut out), Ok(15));
    }
}

#[test]
fn a_connection_that_was_accepted_within_the_program_is_kept() {
    let _quiet = no_child_starts();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("socket");
    let listener = UnixListener::bind(&path).unwrap();
    let mut client = UnixStream::connect(&path).unwrap();
    let numbers = [number(&listener), number(&client)];
    let refusals = refused(&numbers);
    assert!(refusals[0].what.contains("not accepted"), "{}", refusals[0]);
    let (server, _) = listener.accept().unwrap();
    client.write_all(b"hello").unwrap();
    server.shutdown(std::net::Shutdown::Write).unwrap();
    let numbers = [number(&listener), number(&client), number(&server)];
    let table = collect(&numbers);
    drop((listener, client, server));
    let made = recreate(&table);
    let (client, server) = (made_for(&made, numbers[1]), made_for(&made, numbers[2]));
    // A second life has the name from the first, though nothing is left of the file it came from.
    let second = recreate(&collect(&[number(&client), number(&server)]));
    if rustix::process::geteuid().is_root() {
        for end in [&server, &made_for(&second, number(&server))] {
            let name = rustix::net::getsockname(end).unwrap();
            let name = rustix::net::SocketAddrUnix::try_from(name).unwrap();
            assert_eq!(name.path_bytes(), Some(path.as_os_str().as_encoded_bytes()));
        }
    } else {
        println!("SKIPPED 1 check: names of accepted ends need root");
    }
    drop(second);
    let mut out = [0; 64];
    assert_eq!(rustix::io::read(&server, &mut out), Ok(5));
    assert_eq!(rustix::io::read(&client, &mut out), Ok(0));
    assert_eq!(rustix::io::write(&client, b"more"), Ok(4));
    assert_eq!(rustix::io::write(&server, b"x"), Err(Errno::PIPE));
    let _new = UnixStream::connect(&path).unwrap();
}

#[test]
fn an_end_that_was_bound_itself_keeps_its_name() {
    let _quiet = no_child_starts();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("mine");
    let (a, b) = UnixStream::pair().unwrap();
    bind(&a, &rustix::net::SocketAddrUnix::new(&path).unwrap()).unwrap();
    let numbers = [number(&a), number(&b)];
    let table = collect(&numbers);
    drop((a, b));
    let made = recreate(&table);
    let peer = UnixStream::from(made_for(&made, numbers[1]))
        .peer_addr()
        .unwrap();
    assert_eq!(peer.as_pathname(), Some(path.as_path()));
}
