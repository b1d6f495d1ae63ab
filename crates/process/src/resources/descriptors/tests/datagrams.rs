//! UDP and unix datagram sockets.

use super::*;
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, connect, getpeername,
    getsockname, socket, socketpair,
};
use std::net::{SocketAddr, UdpSocket};
use std::os::unix::net::UnixDatagram;

#[test]
fn udp_sockets_are_where_they_were() {
    let _quiet = no_child_starts();
    let server = UdpSocket::bind("127.0.0.1:0").unwrap();
    server.set_broadcast(true).unwrap();
    server.set_multicast_ttl_v4(7).unwrap();
    let client = UdpSocket::bind("127.0.0.1:0").unwrap();
    client.connect(server.local_addr().unwrap()).unwrap();
    let plain = socket(AddressFamily::INET6, SocketType::DGRAM, None);
    let mut numbers = vec![number(&server), number(&client)];
    numbers.extend(plain.as_ref().ok().map(number));
    let table = collect(&numbers);
    let (at, from) = (server.local_addr().unwrap(), client.local_addr().unwrap());
    drop((server, client, plain));
    let checked = check_table(&table, &request(FilesPolicy::Reconcile)).unwrap();
    assert!(checked.notices().is_empty(), "{:?}", checked.notices());
    let mut made = recreate_table(&table, checked).unwrap();
    assert!(made.apply_files(me()).unwrap().is_empty());
    let server = UdpSocket::from(made_for(&made, numbers[0]));
    let client = UdpSocket::from(made_for(&made, numbers[1]));
    assert_eq!(
        (server.local_addr().unwrap(), client.local_addr().unwrap()),
        (at, from)
    );
    assert_eq!(client.peer_addr().unwrap(), at);
    assert!(server.broadcast().unwrap());
    assert_eq!(server.multicast_ttl_v4().unwrap(), 7);
    client.send(b"again").unwrap();
    assert_eq!(server.recv(&mut [0; 9]).unwrap(), 5);
}

#[test]
fn a_udp_port_that_is_taken_is_refused_unless_the_socket_only_sends() {
    let _quiet = no_child_starts();
    let server = UdpSocket::bind("127.0.0.1:0").unwrap();
    let client = UdpSocket::bind("127.0.0.1:0").unwrap();
    client.connect(server.local_addr().unwrap()).unwrap();
    let refusals = check_refused(&collect(&[number(&server)]));
    let text = refusals[0].to_string();
    assert!(text.contains("UDP port 127.0.0.1:"), "{text}");
    assert!(text.contains(&format!("by pid {}", me())), "{text}");
    let table = collect(&[number(&client)]);
    let checked = check_table(&table, &request(FilesPolicy::Reconcile)).unwrap();
    assert!(checked.notices()[0].contains("from another address"));
    let again = made_for(&recreate_table(&table, checked).unwrap(), number(&client));
    let peer = SocketAddr::try_from(getpeername(&again).unwrap().unwrap()).unwrap();
    assert_eq!(peer, server.local_addr().unwrap());
}

#[test]
fn a_log_socket_is_connected_again_or_a_notice_says_that_it_is_not() {
    let _quiet = no_child_starts();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("log");
    let daemon = UnixDatagram::bind(&path).unwrap();
    let logger = UnixDatagram::unbound().unwrap();
    logger.connect(&path).unwrap();
    let table = collect(&[number(&logger)]);
    let mut made = recreate(&table);
    assert!(made.apply_files(me()).unwrap().is_empty());
    let again = UnixDatagram::from(made_for(&made, number(&logger)));
    again.send(b"logged").unwrap();
    assert_eq!(daemon.recv(&mut [0; 9]).unwrap(), 6);
    drop(daemon);
    let mut made = recreate(&table);
    let notices = made.apply_files(me()).unwrap();
    assert_eq!(notices.len(), 1);
    assert!(
        notices[0].contains(path.to_str().unwrap()),
        "{}",
        notices[0]
    );
    let again = made_for(&made, number(&logger));
    assert_eq!(rustix::io::write(&again, b"x"), Err(Errno::NOTCONN));
}

#[test]
fn a_datagram_server_and_its_client_meet_again() {
    let _quiet = no_child_starts();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("server");
    let server = UnixDatagram::bind(&path).unwrap();
    let abstract_name = format!("outlive-datagram-{}", me());
    let client = socket(AddressFamily::UNIX, SocketType::DGRAM, None).unwrap();
    let name = SocketAddrUnix::new_abstract_name(abstract_name.as_bytes()).unwrap();
    bind(&client, &name).unwrap();
    connect(&client, &SocketAddrUnix::new(&path).unwrap()).unwrap();
    rustix::io::write(&client, b"one").unwrap();
    rustix::io::write(&client, b"three").unwrap();
    // The client comes first, so that it is made before whom it is connected to.
    let numbers = [number(&client), number(&server)];
    let table = collect(&numbers);
    assert_eq!(check_refused(&table).len(), 2);
    drop((server, client));
    let mut made = recreate(&table);
    assert_eq!(made.apply_files(me()).unwrap(), Vec::<String>::new());
    let (client, server) = (made_for(&made, numbers[0]), made_for(&made, numbers[1]));
    assert_eq!(getsockname(&client).unwrap(), name.into());
    let server = UnixDatagram::from(server);
    let mut out = [0; 9];
    assert_eq!(server.recv(&mut out).unwrap(), 3);
    assert_eq!(server.recv(&mut out).unwrap(), 5);
    rustix::io::write(&client, b"four").unwrap();
    let (length, from) = server.recv_from(&mut out).unwrap();
    assert_eq!(length, 4);
    use std::os::linux::net::SocketAddrExt;
    assert_eq!(from.as_abstract_name(), Some(abstract_name.as_bytes()));
}

#[test]
fn one_end_of_a_datagram_pair_finds_the_other_gone() {
    let _quiet = no_child_starts();
    let flags = SocketFlags::CLOEXEC;
    let (mine, theirs) = socketpair(AddressFamily::UNIX, SocketType::DGRAM, flags, None).unwrap();
    rustix::io::write(&theirs, b"last words").unwrap();
    let table = collect(&[number(&mine)]);
    assert_eq!(table.descriptions[0].object.name(), "unix connection");
    let made = recreate(&table);
    let again = made_for(&made, number(&mine));
    assert_eq!(rustix::io::read(&again, &mut [0; 64]), Ok(10));
    assert!(rustix::io::write(&again, b"x").is_err());
}
