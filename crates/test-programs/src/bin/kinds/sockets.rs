//! Sockets: families, states, queues and options.

use crate::files::must_be_open;
use crate::{Absent, Check, Kind, look, must, offered, same};
use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr as UnixAddress, UnixDatagram, UnixListener, UnixStream};
use std::path::Path;

pub(crate) const KINDS: &[Kind] = &[
    ("tcp-listening", |_| tcp_listening("127.0.0.1:0")),
    ("tcp-listening-v6", |_| tcp_listening("[::1]:0")),
    ("tcp-listening-options", tcp_options),
    ("tcp-fresh", tcp_fresh),
    ("tcp-connected-within", tcp_within),
    ("tcp-half-closed", tcp_half_closed),
    ("tcp-not-accepted", tcp_not_accepted),
    ("udp-bound", udp_bound),
    ("udp-connected", udp_connected),
    ("udp-queued", udp_queued),
    ("udp-corked", udp_corked),
    ("udp-multicast", udp_multicast),
    ("unix-stream-queued", unix_stream),
    ("unix-stream-descriptor-queued", unix_descriptor),
    ("unix-stream-half-closed", unix_half_closed),
    ("unix-datagram-pair", unix_datagrams),
    ("unix-packets-pair", unix_packets),
    ("unix-listening", unix_listening),
    ("unix-listening-abstract", unix_abstract),
    ("unix-not-accepted", unix_not_accepted),
    ("unix-connected", unix_connected),
    ("unix-connected-abstract", unix_connected_abstract),
    ("unix-connected-abstract-closed", unix_connected_closed),
    ("unix-connected-unlinked", unix_connected_unlinked),
    ("socket-filter", socket_filter),
    ("socket-kernel-tls", kernel_tls),
    ("socket-raw", |_| {
        other(libc::AF_INET, libc::SOCK_RAW, libc::IPPROTO_ICMP)
    }),
    ("socket-ping", |_| {
        other(libc::AF_INET, libc::SOCK_DGRAM, libc::IPPROTO_ICMP)
    }),
    ("socket-mptcp", |_| {
        other(libc::AF_INET, libc::SOCK_STREAM, 262)
    }),
    ("socket-sctp", |_| {
        other(libc::AF_INET, libc::SOCK_STREAM, 132)
    }),
    ("socket-udplite", |_| {
        other(libc::AF_INET, libc::SOCK_DGRAM, 136)
    }),
    ("socket-packet", |_| {
        other(libc::AF_PACKET, libc::SOCK_RAW, 0)
    }),
    ("socket-netlink", |_| {
        other(libc::AF_NETLINK, libc::SOCK_RAW, 0)
    }),
    ("socket-netlink-events", |_| {
        other(libc::AF_NETLINK, libc::SOCK_RAW, 15)
    }),
    ("socket-vsock", |_| {
        other(libc::AF_VSOCK, libc::SOCK_STREAM, 0)
    }),
    ("socket-xdp", |_| other(libc::AF_XDP, libc::SOCK_RAW, 0)),
    ("socket-can", |_| other(libc::AF_CAN, libc::SOCK_RAW, 1)),
    ("socket-bluetooth", |_| {
        other(libc::AF_BLUETOOTH, libc::SOCK_RAW, 1)
    }),
    ("socket-tipc", |_| {
        other(libc::AF_TIPC, libc::SOCK_STREAM, 0)
    }),
    ("socket-kcm", |_| other(41, libc::SOCK_DGRAM, 0)),
    ("socket-smc", |_| other(43, libc::SOCK_STREAM, 0)),
    ("socket-ax25", |_| other(libc::AF_AX25, libc::SOCK_DGRAM, 0)),
    ("socket-ieee802154", |_| {
        other(libc::AF_IEEE802154, libc::SOCK_RAW, 0)
    }),
    ("socket-phonet", |_| {
        other(libc::AF_PHONET, libc::SOCK_DGRAM, 0)
    }),
    ("socket-rds", |_| {
        other(libc::AF_RDS, libc::SOCK_SEQPACKET, 0)
    }),
    ("socket-pppox", |_| {
        other(libc::AF_PPPOX, libc::SOCK_STREAM, 0)
    }),
    ("socket-l2tp", |_| {
        other(libc::AF_INET, libc::SOCK_DGRAM, 115)
    }),
];

fn io<T>(what: &str, result: std::io::Result<T>) -> T {
    result.unwrap_or_else(|e| outlive_test_programs::fail(&format!("{what}: {e}")))
}

fn tcp_listening(address: &str) -> Result<Check, Absent> {
    let listener = TcpListener::bind(address).map_err(|e| Absent(e.to_string()))?;
    let address = io("address", listener.local_addr());
    look(move || {
        let mut client = io("connect", TcpStream::connect(address));
        let (mut server, _) = io("accept", listener.accept());
        talk(&mut client, &mut server);
    })
}

fn talk(a: &mut (impl Read + Write), b: &mut (impl Read + Write)) {
    let mut word = [0; 4];
    io("write", a.write_all(b"ping"));
    io("read", b.read_exact(&mut word));
    same("the word", &word, b"ping");
    io("write", b.write_all(b"pong"));
    io("read", a.read_exact(&mut word));
    same("the answer", &word, b"pong");
}

fn option(fd: i32, level: i32, name: i32) -> i32 {
    let mut value = 0i32;
    let mut length = 4u32;
    // SAFETY: value and length are live.
    let r = unsafe { libc::getsockopt(fd, level, name, (&raw mut value).cast(), &raw mut length) };
    if r == 0 { value } else { -1 }
}

fn set(fd: i32, level: i32, name: i32, value: i32) -> i64 {
    // SAFETY: the value is live.
    unsafe { libc::setsockopt(fd, level, name, (&raw const value).cast(), 4).into() }
}

fn tcp_options(_: &Path) -> Result<Check, Absent> {
    let listener = io("bind", TcpListener::bind("127.0.0.1:0"));
    let fd = listener.as_raw_fd();
    let options = [
        (libc::SOL_SOCKET, libc::SO_KEEPALIVE, 1),
        (libc::SOL_SOCKET, libc::SO_REUSEPORT, 1),
        (libc::SOL_SOCKET, libc::SO_RCVLOWAT, 7),
        (libc::SOL_SOCKET, libc::SO_MARK, 0x77),
        (libc::SOL_SOCKET, libc::SO_PRIORITY, 3),
        (libc::SOL_SOCKET, libc::SO_BUSY_POLL, 20),
        (libc::SOL_SOCKET, libc::SO_TIMESTAMP, 1),
        (libc::SOL_SOCKET, libc::SO_INCOMING_CPU, 1),
        (libc::IPPROTO_TCP, libc::TCP_NODELAY, 1),
        (libc::IPPROTO_TCP, libc::TCP_KEEPIDLE, 33),
        (libc::IPPROTO_TCP, libc::TCP_KEEPINTVL, 34),
        (libc::IPPROTO_TCP, libc::TCP_KEEPCNT, 5),
        (libc::IPPROTO_TCP, libc::TCP_SYNCNT, 4),
        (libc::IPPROTO_TCP, libc::TCP_LINGER2, 11),
        (libc::IPPROTO_TCP, libc::TCP_DEFER_ACCEPT, 3),
        (libc::IPPROTO_TCP, libc::TCP_WINDOW_CLAMP, 65000),
        (libc::IPPROTO_TCP, libc::TCP_USER_TIMEOUT, 777),
        (libc::IPPROTO_TCP, libc::TCP_FASTOPEN, 6),
        (libc::IPPROTO_TCP, libc::TCP_MAXSEG, 1000),
        (libc::IPPROTO_TCP, libc::TCP_NOTSENT_LOWAT, 4000),
        (libc::IPPROTO_TCP, libc::TCP_SAVE_SYN, 1),
        (libc::IPPROTO_IP, libc::IP_TOS, 0x10),
        (libc::IPPROTO_IP, libc::IP_TTL, 44),
        (libc::IPPROTO_IP, libc::IP_FREEBIND, 1),
        (libc::IPPROTO_IP, libc::IP_TRANSPARENT, 1),
        (libc::IPPROTO_IP, libc::IP_BIND_ADDRESS_NO_PORT, 1),
        (libc::IPPROTO_IP, libc::IP_MINTTL, 3),
        (libc::IPPROTO_IP, libc::IP_MTU_DISCOVER, 2),
    ];
    for (level, name, value) in options {
        // One that is not there is not there afterwards either.
        let _ = set(fd, level, name, value);
    }
    let before = options.map(|(level, name, _)| (level, name, option(fd, level, name)));
    look(move || {
        for (level, name, value) in before {
            same(
                &format!("option {level}/{name}"),
                option(listener.as_raw_fd(), level, name),
                value,
            );
        }
    })
}

fn tcp_fresh(_: &Path) -> Result<Check, Absent> {
    // SAFETY: only numbers are passed.
    let fd = must("socket", unsafe {
        libc::socket(libc::AF_INET, libc::SOCK_STREAM, 0)
    }) as i32;
    must(
        "TCP_NODELAY",
        set(fd, libc::IPPROTO_TCP, libc::TCP_NODELAY, 1),
    );
    look(move || {
        same(
            "TCP_NODELAY",
            option(fd, libc::IPPROTO_TCP, libc::TCP_NODELAY),
            1,
        )
    })
}

fn pair() -> (TcpStream, TcpStream) {
    let listener = io("bind", TcpListener::bind("127.0.0.1:0"));
    let client = io(
        "connect",
        TcpStream::connect(io("address", listener.local_addr())),
    );
    (client, io("accept", listener.accept()).0)
}

fn tcp_within(_: &Path) -> Result<Check, Absent> {
    let (mut client, mut server) = pair();
    io("write", client.write_all(b"queued"));
    look(move || {
        let mut word = [0; 6];
        io("read", server.read_exact(&mut word));
        same("what was queued", &word, b"queued");
        talk(&mut client, &mut server);
    })
}

fn tcp_half_closed(_: &Path) -> Result<Check, Absent> {
    let (mut client, mut server) = pair();
    io("write", client.write_all(b"last"));
    io("shutdown", client.shutdown(std::net::Shutdown::Write));
    look(move || {
        let mut text = Vec::new();
        io("read", server.read_to_end(&mut text));
        same("the last words", &text[..], b"last");
        io("write", server.write_all(b"answer"));
        drop(server);
        let mut text = Vec::new();
        io("read", client.read_to_end(&mut text));
        same("the answer", &text[..], b"answer");
    })
}

fn tcp_not_accepted(_: &Path) -> Result<Check, Absent> {
    let listener = io("bind", TcpListener::bind("127.0.0.1:0"));
    let mut client = io(
        "connect",
        TcpStream::connect(io("address", listener.local_addr())),
    );
    look(move || {
        let (mut server, _) = io("accept", listener.accept());
        talk(&mut client, &mut server);
    })
}

fn udp_bound(_: &Path) -> Result<Check, Absent> {
    let socket = io("bind", UdpSocket::bind("127.0.0.1:0"));
    let address = io("address", socket.local_addr());
    look(move || {
        let client = io("bind", UdpSocket::bind("127.0.0.1:0"));
        io("send", client.send_to(b"hello", address));
        received(&socket, b"hello");
    })
}

fn received(socket: &UdpSocket, text: &[u8]) {
    let mut buffer = [0; 100];
    let n = io("recv", socket.recv(&mut buffer));
    same("the datagram", &buffer[..n], text);
}

fn udp_connected(_: &Path) -> Result<Check, Absent> {
    let a = io("bind", UdpSocket::bind("127.0.0.1:0"));
    let b = io("bind", UdpSocket::bind("127.0.0.1:0"));
    io("connect", a.connect(io("address", b.local_addr())));
    look(move || {
        io("send", a.send(b"hello"));
        received(&b, b"hello");
    })
}

fn udp_queued(_: &Path) -> Result<Check, Absent> {
    let a = io("bind", UdpSocket::bind("127.0.0.1:0"));
    let b = io("bind", UdpSocket::bind("127.0.0.1:0"));
    io("send", a.send_to(b"one", io("address", b.local_addr())));
    io("send", a.send_to(b"two", io("address", b.local_addr())));
    io(
        "timeout",
        b.set_read_timeout(Some(std::time::Duration::from_secs(5))),
    );
    let from = io("address", a.local_addr());
    look(move || {
        let mut buffer = [0; 100];
        let (n, sender) = io("recv", b.recv_from(&mut buffer));
        same("the first", &buffer[..n], b"one");
        same("its sender", sender, from);
        received(&b, b"two");
        drop(a);
    })
}

fn udp_corked(_: &Path) -> Result<Check, Absent> {
    let a = io("bind", UdpSocket::bind("127.0.0.1:0"));
    let b = io("bind", UdpSocket::bind("127.0.0.1:0"));
    io("connect", a.connect(io("address", b.local_addr())));
    must(
        "UDP_CORK",
        set(a.as_raw_fd(), libc::IPPROTO_UDP, libc::UDP_CORK, 1),
    );
    io("send", a.send(b"held "));
    io(
        "timeout",
        b.set_read_timeout(Some(std::time::Duration::from_secs(5))),
    );
    look(move || {
        io("send", a.send(b"back"));
        must(
            "UDP_CORK",
            set(a.as_raw_fd(), libc::IPPROTO_UDP, libc::UDP_CORK, 0),
        );
        received(&b, b"held back");
    })
}

fn udp_multicast(_: &Path) -> Result<Check, Absent> {
    let group = Ipv4Addr::new(224, 0, 0, 199);
    let socket = io("bind", UdpSocket::bind("0.0.0.0:0"));
    socket
        .join_multicast_v4(&group, &Ipv4Addr::LOCALHOST)
        .map_err(|e| Absent(format!("IP_ADD_MEMBERSHIP: {e}")))?;
    look(move || {
        let again = socket.join_multicast_v4(&group, &Ipv4Addr::LOCALHOST);
        let error = again.err().and_then(|e| e.raw_os_error());
        same("joining again", error, Some(libc::EADDRINUSE));
    })
}

fn unix_stream(_: &Path) -> Result<Check, Absent> {
    let (mut a, mut b) = io("socketpair", UnixStream::pair());
    io("write", a.write_all(b"queued"));
    look(move || {
        let mut word = [0; 6];
        io("read", b.read_exact(&mut word));
        same("what was queued", &word, b"queued");
        talk(&mut a, &mut b);
    })
}

fn unix_descriptor(_: &Path) -> Result<Check, Absent> {
    let (a, b) = io("socketpair", UnixStream::pair());
    let (mut reader, writer) = io("pipe", std::io::pipe());
    // SAFETY: header and buffers are live and as long as is said.
    unsafe {
        let (mut byte, mut room) = ([b'x'], [0u64; 4]);
        let mut part = libc::iovec {
            iov_base: byte.as_mut_ptr().cast(),
            iov_len: 1,
        };
        let mut header: libc::msghdr = std::mem::zeroed();
        (header.msg_iov, header.msg_iovlen) = (&raw mut part, 1);
        header.msg_control = room.as_mut_ptr().cast();
        header.msg_controllen = libc::CMSG_SPACE(4) as usize;
        let control = libc::CMSG_FIRSTHDR(&raw const header);
        (*control).cmsg_level = libc::SOL_SOCKET;
        (*control).cmsg_type = libc::SCM_RIGHTS;
        (*control).cmsg_len = libc::CMSG_LEN(4) as usize;
        libc::CMSG_DATA(control)
            .cast::<i32>()
            .write_unaligned(writer.as_raw_fd());
        must(
            "sendmsg",
            libc::sendmsg(a.as_raw_fd(), &raw const header, 0) as i64,
        );
    }
    drop(writer);
    look(move || {
        let got = passed(&b);
        // SAFETY: the text is live.
        must(
            "write",
            unsafe { libc::write(got, c"through".as_ptr().cast(), 7) } as i64,
        );
        let mut word = [0; 7];
        io("read", reader.read_exact(&mut word));
        same("what came through", &word, b"through");
        drop(a);
    })
}

/// The descriptor that waits in a socket.
fn passed(socket: &UnixStream) -> i32 {
    // SAFETY: header and buffers are live and as long as is said.
    unsafe {
        let (mut byte, mut room) = ([0u8], [0u64; 4]);
        let mut part = libc::iovec {
            iov_base: byte.as_mut_ptr().cast(),
            iov_len: 1,
        };
        let mut header: libc::msghdr = std::mem::zeroed();
        (header.msg_iov, header.msg_iovlen) = (&raw mut part, 1);
        (header.msg_control, header.msg_controllen) = (room.as_mut_ptr().cast(), 32);
        same(
            "the byte",
            libc::recvmsg(socket.as_raw_fd(), &raw mut header, 0),
            1,
        );
        let control = libc::CMSG_FIRSTHDR(&raw const header);
        same("a descriptor", control.is_null(), false);
        libc::CMSG_DATA(control).cast::<i32>().read_unaligned()
    }
}

fn unix_half_closed(_: &Path) -> Result<Check, Absent> {
    let (mut a, mut b) = io("socketpair", UnixStream::pair());
    io("write", a.write_all(b"last"));
    io("shutdown", a.shutdown(std::net::Shutdown::Write));
    look(move || {
        let mut text = Vec::new();
        io("read", b.read_to_end(&mut text));
        same("the last words", &text[..], b"last");
        io("write", b.write_all(b"answer"));
        let mut word = [0; 6];
        io("read", a.read_exact(&mut word));
    })
}

fn unix_datagrams(_: &Path) -> Result<Check, Absent> {
    let (a, b) = io("socketpair", UnixDatagram::pair());
    io("send", a.send(b"one"));
    io("send", a.send(b"three"));
    look(move || {
        let mut buffer = [0; 100];
        same("the first", io("recv", b.recv(&mut buffer)), 3);
        same("the second", io("recv", b.recv(&mut buffer)), 5);
        io("send", b.send(b"back"));
        same("the answer", io("recv", a.recv(&mut buffer)), 4);
    })
}

fn unix_packets(_: &Path) -> Result<Check, Absent> {
    let mut ends = [0; 2];
    // SAFETY: the array and the texts are live.
    unsafe {
        let kind = libc::SOCK_SEQPACKET | libc::SOCK_NONBLOCK;
        must(
            "socketpair",
            libc::socketpair(libc::AF_UNIX, kind, 0, ends.as_mut_ptr()),
        );
        must(
            "send",
            libc::send(ends[0], c"one".as_ptr().cast(), 3, 0) as i64,
        );
        must(
            "send",
            libc::send(ends[0], c"three".as_ptr().cast(), 5, 0) as i64,
        );
        look(move || {
            let mut buffer = [0u8; 100];
            let mut next = || libc::recv(ends[1], buffer.as_mut_ptr().cast(), 100, 0);
            same("the packets", (next(), next()), (3, 5));
        })
    }
}

fn unix_listening(dir: &Path) -> Result<Check, Absent> {
    let path = dir.join("socket");
    let listener = io("bind", UnixListener::bind(&path));
    look(move || {
        let mut client = io("connect", UnixStream::connect(path));
        let (mut server, _) = io("accept", listener.accept());
        talk(&mut client, &mut server);
    })
}

fn unix_abstract(_: &Path) -> Result<Check, Absent> {
    let name = format!("outlive-test-{}", std::process::id());
    let address = io("name", UnixAddress::from_abstract_name(name));
    let listener = io("bind", UnixListener::bind_addr(&address));
    look(move || {
        let mut client = io("connect", UnixStream::connect_addr(&address));
        let (mut server, _) = io("accept", listener.accept());
        talk(&mut client, &mut server);
    })
}

fn unix_not_accepted(dir: &Path) -> Result<Check, Absent> {
    let path = dir.join("socket");
    let listener = io("bind", UnixListener::bind(&path));
    let mut client = io("connect", UnixStream::connect(path));
    io("write", client.write_all(b"early"));
    look(move || {
        let (mut server, _) = io("accept", listener.accept());
        let mut word = [0; 5];
        io("read", server.read_exact(&mut word));
        same("what was sent", &word, b"early");
        talk(&mut client, &mut server);
    })
}

/// The name of an end as the other has it, and as it has it itself.
fn unix_names(of: &UnixStream, other: &UnixStream) -> [UnixAddress; 2] {
    [io("peer", other.peer_addr()), io("name", of.local_addr())]
}

fn unix_connected(dir: &Path) -> Result<Check, Absent> {
    let path = dir.join("socket");
    let listener = io("bind", UnixListener::bind(&path));
    let mut client = io("connect", UnixStream::connect(&path));
    let (mut server, _) = io("accept", listener.accept());
    look(move || {
        talk(&mut client, &mut server);
        for name in unix_names(&server, &client) {
            same("its name", name.as_pathname(), Some(path.as_path()));
        }
        for name in unix_names(&client, &server) {
            same("that it has none", name.is_unnamed(), true);
        }
        let mut client = io("connect", UnixStream::connect(&path));
        let (mut server, _) = io("accept", listener.accept());
        talk(&mut client, &mut server);
    })
}

fn unix_connected_abstract(_: &Path) -> Result<Check, Absent> {
    let name = format!("outlive-test-connected-{}", std::process::id());
    let address = io("name", UnixAddress::from_abstract_name(&name));
    let listener = io("bind", UnixListener::bind_addr(&address));
    let connect = move || {
        let client = io("connect", UnixStream::connect_addr(&address));
        (client, io("accept", listener.accept()).0)
    };
    let mut pairs = [connect(), connect()];
    look(move || {
        for (client, server) in &mut pairs {
            talk(client, server);
            for seen in unix_names(server, client) {
                same("its name", seen.as_abstract_name(), Some(name.as_bytes()));
            }
        }
        let (mut client, mut server) = connect();
        talk(&mut client, &mut server);
    })
}

/// What accepted them is closed already.
fn unix_connected_closed(_: &Path) -> Result<Check, Absent> {
    let name = format!("outlive-test-closed-{}", std::process::id());
    let address = io("name", UnixAddress::from_abstract_name(&name));
    let listener = io("bind", UnixListener::bind_addr(&address));
    let connect = |_| {
        let client = io("connect", UnixStream::connect_addr(&address));
        (client, io("accept", listener.accept()).0)
    };
    let mut pairs = [0, 1].map(connect);
    drop(listener);
    look(move || {
        for (client, server) in &mut pairs {
            talk(client, server);
            for seen in unix_names(server, client) {
                same("its name", seen.as_abstract_name(), Some(name.as_bytes()));
            }
        }
    })
}

/// Both ends have names, which are paths as seen from the working directory; nothing is left of
/// their files and of what listened.
fn unix_connected_unlinked(dir: &Path) -> Result<Check, Absent> {
    io("mkdir", std::fs::create_dir(dir.join("place")));
    io("chdir", std::env::set_current_dir(dir));
    let (path, own) = (Path::new("place/../place/socket"), Path::new("client"));
    let listener = io("bind", UnixListener::bind(path));
    let mut client = bound_client(own, path);
    let (mut server, _) = io("accept", listener.accept());
    drop(listener);
    for file in [path, own] {
        io("unlink", std::fs::remove_file(file));
    }
    look(move || {
        talk(&mut client, &mut server);
        for name in unix_names(&server, &client) {
            same("its name", name.as_pathname(), Some(path));
        }
        for name in unix_names(&client, &server) {
            same("its name", name.as_pathname(), Some(own));
        }
        for file in [path, own] {
            same("that there is a file", file.exists(), false);
        }
    })
}

/// A stream that is bound to a path before it connects to another.
fn bound_client(own: &Path, to: &Path) -> UnixStream {
    // SAFETY: a call with numbers only.
    let fd = unsafe { libc::socket(libc::AF_UNIX, libc::SOCK_STREAM | libc::SOCK_CLOEXEC, 0) };
    must("socket", fd);
    for (path, connect) in [(own, false), (to, true)] {
        // SAFETY: an address may be all zeros.
        let mut address: libc::sockaddr_un = unsafe { std::mem::zeroed() };
        address.sun_family = libc::AF_UNIX as libc::sa_family_t;
        for (to, from) in address.sun_path.iter_mut().zip(path.as_os_str().as_bytes()) {
            *to = *from as libc::c_char;
        }
        let (at, size) = ((&raw const address).cast(), size_of_val(&address) as u32);
        // SAFETY: the address is live and so long.
        must("name", unsafe {
            if connect {
                libc::connect(fd, at, size)
            } else {
                libc::bind(fd, at, size)
            }
        });
    }
    // SAFETY: the socket is new, and nobody else's.
    unsafe { UnixStream::from_raw_fd(fd) }
}

fn socket_filter(_: &Path) -> Result<Check, Absent> {
    let a = io("bind", UdpSocket::bind("127.0.0.1:0"));
    // Nothing passes.
    let code = [libc::sock_filter {
        code: 6,
        jt: 0,
        jf: 0,
        k: 0,
    }];
    let filter = libc::sock_fprog {
        len: 1,
        filter: code.as_ptr().cast_mut(),
    };
    // SAFETY: the filter and its code are live.
    let r = unsafe {
        let length = size_of_val(&filter) as u32;
        libc::setsockopt(
            a.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_ATTACH_FILTER,
            (&raw const filter).cast(),
            length,
        )
    };
    must("SO_ATTACH_FILTER", r);
    let address: SocketAddr = io("address", a.local_addr());
    io("nonblocking", a.set_nonblocking(true));
    look(move || {
        let b = io("bind", UdpSocket::bind("127.0.0.1:0"));
        io("send", b.send_to(b"x", address));
        same("that it is kept out", a.recv(&mut [0; 10]).is_err(), true);
    })
}

fn kernel_tls(_: &Path) -> Result<Check, Absent> {
    let (client, server) = pair();
    // SAFETY: the name is a literal of four bytes.
    let r = unsafe {
        let name = c"tls".as_ptr().cast();
        libc::setsockopt(
            client.as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_ULP,
            name,
            4,
        )
    };
    offered("TCP_ULP", r.into())?;
    look(move || {
        must_be_open(client.as_raw_fd());
        must_be_open(server.as_raw_fd());
    })
}

fn other(family: i32, kind: i32, protocol: i32) -> Result<Check, Absent> {
    // SAFETY: only numbers are passed.
    let fd = offered(
        "socket",
        unsafe { libc::socket(family, kind, protocol) }.into(),
    )? as i32;
    look(move || {
        same(
            "its family",
            option(fd, libc::SOL_SOCKET, libc::SO_DOMAIN),
            family,
        );
        same(
            "its type",
            option(fd, libc::SOL_SOCKET, libc::SO_TYPE),
            kind,
        );
        same(
            "its protocol",
            option(fd, libc::SOL_SOCKET, libc::SO_PROTOCOL),
            protocol,
        );
    })
}
