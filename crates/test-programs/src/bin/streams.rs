//! Streams of numbers through TCP connections with both ends in the program, in both directions, as
//! fast as they go: `streams` in one process, `streams fork` between two.
//!
//! Each stream counts words of eight bytes, which are written in pieces of any size and read in
//! pieces of any other: a byte that is lost or doubled puts everything behind it out of step. Some
//! readers nap, so that both buffers of a connection fill up. On SIGUSR1 every writer ends its
//! stream with a word of its own, and everything must have arrived.
//!
//! # Safety
//! `fork` is called before there are threads; `waitpid` with a live status word.
#![allow(unsafe_code)]

use outlive_test_programs::{Random, await_report_order, block, check, fail, good, mix, say};
use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

/// Connections by IP version 4; as many by version 6 where the host has it.
const CONNECTIONS: u64 = 2;
/// The longest piece, bytes.
const LONGEST: u64 = 200_000;

static ENDING: AtomicBool = AtomicBool::new(false);
static MOVED: AtomicU64 = AtomicU64::new(0);

/// Word number `n` of a stream.
fn word(stream: u64, n: u64) -> u64 {
    mix(stream << 48 ^ n)
}

fn write_stream(mut to: TcpStream, stream: u64) {
    let mut random = Random::new(stream);
    let (mut next, mut rest) = (0, Vec::new());
    loop {
        let ending = ENDING.load(Ordering::SeqCst);
        let length = random.below(LONGEST) as usize;
        while rest.len() < length {
            rest.extend_from_slice(&word(stream, next).to_le_bytes());
            next += 1;
        }
        if ending {
            rest.extend_from_slice(&(!word(stream, next)).to_le_bytes());
        }
        let piece = if ending { rest.len() } else { length };
        if let Err(e) = to.write_all(&rest[..piece]) {
            fail(&format!("writing stream {stream}: {e}"));
        }
        rest.drain(..piece);
        if ending {
            if let Err(e) = to.shutdown(Shutdown::Write) {
                fail(&format!("ending stream {stream}: {e}"));
            }
            return;
        }
    }
}

fn read_stream(mut from: TcpStream, stream: u64, naps: bool) {
    let mut random = Random::new(!stream);
    let mut buffer = vec![0; LONGEST as usize];
    let (mut next, mut rest, mut ended) = (0, Vec::new(), false);
    loop {
        let length = 1 + random.below(LONGEST - 1) as usize;
        let read = match from.read(&mut buffer[..length]) {
            Ok(0) => break,
            Ok(read) => read,
            Err(e) => fail(&format!("reading stream {stream} at word {next}: {e}")),
        };
        MOVED.fetch_add(read as u64, Ordering::SeqCst);
        rest.extend_from_slice(&buffer[..read]);
        let (words, _) = rest.as_chunks::<8>();
        let whole = words.len() * 8;
        for found in words {
            let (found, wanted) = (u64::from_le_bytes(*found), word(stream, next));
            check(!ended && (found == wanted || found == !wanted), || {
                format!("word {next} of stream {stream} is {found:x}")
            });
            // Whoever hears the end of a stream ends its own ones.
            if found == !wanted {
                ended = true;
                ENDING.store(true, Ordering::SeqCst);
            }
            next += 1;
        }
        rest.drain(..whole);
        if naps && random.below(8) == 0 && !ended {
            std::thread::sleep(Duration::from_millis(20));
        }
    }
    check(ended && rest.is_empty(), || {
        format!("stream {stream} broke off at word {next}")
    });
}

/// Both directions of one end.
fn work(end: TcpStream, connection: u64, side: u64) -> [JoinHandle<()>; 2] {
    let (ours, theirs) = (2 * connection + side, 2 * connection + 1 - side);
    let Ok(reader) = end.try_clone() else {
        fail("a socket cannot be duplicated")
    };
    [
        std::thread::spawn(move || write_stream(end, ours)),
        std::thread::spawn(move || read_stream(reader, theirs, theirs.is_multiple_of(3))),
    ]
}

fn main() {
    block(&[libc::SIGUSR1]);
    let listeners: Vec<TcpListener> = ["127.0.0.1:0", "[::1]:0"]
        .into_iter()
        .filter_map(|at| TcpListener::bind(at).ok())
        .collect();
    let mut addresses = Vec::new();
    for listener in &listeners {
        let Ok(address) = listener.local_addr() else {
            fail("no address")
        };
        addresses.extend((0..CONNECTIONS).map(|_| address));
    }
    let forks = std::env::args().nth(1).as_deref() == Some("fork");
    // SAFETY: takes no argument, and there is one thread.
    let child = if forks { unsafe { libc::fork() } } else { 0 };
    let _ = good("fork", child.into());
    let mut threads = Vec::new();
    if child == 0 {
        for (connection, address) in (0..).zip(&addresses) {
            match TcpStream::connect(address) {
                Ok(end) => threads.extend(work(end, connection, 0)),
                Err(e) => fail(&format!("connecting to {address}: {e}")),
            }
        }
    }
    if child != 0 || !forks {
        for connection in 0..addresses.len() {
            match listeners[connection / CONNECTIONS as usize].accept() {
                Ok((end, _)) => threads.extend(work(end, connection as u64, 1)),
                Err(e) => fail(&format!("accepting: {e}")),
            }
        }
        say("ready");
        await_report_order();
        ENDING.store(true, Ordering::SeqCst);
    }
    for thread in threads {
        if thread.join().is_err() {
            fail("a thread panicked");
        }
    }
    if child != 0 {
        let mut status = 0;
        // SAFETY: status is live.
        let _ = good(
            "waitpid",
            unsafe { libc::waitpid(child, &raw mut status, 0) }.into(),
        );
        check(status == 0, || format!("the child ended with {status:x}"));
    }
    if child != 0 || !forks {
        let moved = MOVED.load(Ordering::SeqCst);
        check(moved > 0, || "nothing was moved".into());
        say(&format!("moved {moved} bytes"));
    }
}
