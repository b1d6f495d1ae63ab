//! The disk of a machine over a socket: a server of network block devices for one client, as its
//! protocol says (`doc/proto.md` of the NBD project; fixed newstyle, simple replies).
//!
//! # Rules
//! - Requests are done one after the other, in the order in which they come: a flush covers every write
//!   that was answered before it was sent, and those that were sent before it.
//! - When the client is gone, nothing is flushed: that is what a power cut is.
//! - What the client says is checked; a request that makes no sense ends the connection.

use super::lossy::Disk;
use anyhow::{Context, Result, bail, ensure};
use std::{
    fs,
    io::{ErrorKind, Read, Write},
    os::unix::net::UnixListener,
    path::Path,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    thread::{self, JoinHandle},
};

const GREETING: &[u8; 16] = b"NBDMAGICIHAVEOPT";
const OPTION: &[u8; 8] = b"IHAVEOPT";
const OPTION_REPLY: u64 = 0x0003_e889_0455_65a9;
const REQUEST: u32 = 0x2560_9513;
const REPLY: u32 = 0x6744_6698;
/// Handshake: fixed newstyle, no padding.
const HANDSHAKE: u16 = 0b11;
/// Transmission: flags are there, FLUSH, FUA, TRIM, WRITE_ZEROES.
const ABILITIES: u16 = 1 | 1 << 2 | 1 << 3 | 1 << 5 | 1 << 6;
/// The most bytes of one option, and of one request.
const MOST_OPTION: u32 = 4096;
const MOST: u32 = 64 << 20;

const EXPORT_NAME: u32 = 1;
const ABORT: u32 = 2;
const INFO: u32 = 6;
const GO: u32 = 7;
const ACK: u32 = 1;
const REP_INFO: u32 = 3;
const UNSUPPORTED: u32 = 0x8000_0001;

const INVALID: u32 = 22;

/// A server in a thread of its own, until its client goes.
pub struct Server {
    disk: Arc<Mutex<Disk>>,
    thread: JoinHandle<Result<()>>,
}

impl Server {
    /// Listens at a path, for one client; a socket that is there is of a server that nobody ended.
    pub fn start(disk: Disk, socket: &Path) -> Result<Self> {
        if socket.exists() {
            fs::remove_file(socket)?;
        }
        let listener = UnixListener::bind(socket)
            .with_context(|| format!("cannot listen at {}", socket.display()))?;
        let disk = Arc::new(Mutex::new(disk));
        let ours = Arc::clone(&disk);
        let thread = thread::spawn(move || {
            let (mut client, _) = listener.accept().context("nobody wants the disk")?;
            serve(&mut client, &ours)
        });
        Ok(Self { disk, thread })
    }

    /// The disk, while nothing is done to it.
    pub fn disk(&self) -> MutexGuard<'_, Disk> {
        lock(&self.disk)
    }

    /// The disk, when the client is gone; what was not flushed is in its cache.
    pub fn end(self) -> Result<Disk> {
        let served = self.thread.join();
        match served {
            Ok(served) => served.context("serving the disk")?,
            Err(_) => bail!("the server of the disk fell over"),
        }
        let disk = lock(&self.disk).clone();
        Ok(disk)
    }
}

fn lock(disk: &Mutex<Disk>) -> MutexGuard<'_, Disk> {
    disk.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Serves a client until it goes.
fn serve(client: &mut (impl Read + Write), disk: &Mutex<Disk>) -> Result<()> {
    match shake_hands(client, lock(disk).len()) {
        Ok(true) => {}
        Ok(false) => return Ok(()),
        Err(error) if gone(&error) => return Ok(()),
        Err(error) => return Err(error),
    }
    loop {
        match request(client, disk) {
            Ok(true) => {}
            Ok(false) => return Ok(()),
            // It was killed, perhaps in the middle of a request.
            Err(error) if gone(&error) => return Ok(()),
            Err(error) => return Err(error),
        }
    }
}

fn gone(error: &anyhow::Error) -> bool {
    let kind = error
        .downcast_ref::<std::io::Error>()
        .map(std::io::Error::kind);
    matches!(
        kind,
        Some(ErrorKind::UnexpectedEof | ErrorKind::ConnectionReset | ErrorKind::BrokenPipe)
    )
}

/// Agrees on what is offered; `false` where the client wants nothing.
fn shake_hands(client: &mut (impl Read + Write), len: u64) -> Result<bool> {
    client.write_all(GREETING)?;
    client.write_all(&HANDSHAKE.to_be_bytes())?;
    let flags = u32_from(client)?;
    ensure!(flags & 1 == 1, "the client speaks no fixed newstyle");
    let padded = flags & 0b10 == 0;
    loop {
        ensure!(&bytes_from::<8>(client)? == OPTION, "a strange option");
        let (option, length) = (u32_from(client)?, u32_from(client)?);
        ensure!(length <= MOST_OPTION, "an option of {length} bytes");
        let mut data = vec![0; length as usize];
        client.read_exact(&mut data)?;
        match option {
            EXPORT_NAME => {
                client.write_all(&len.to_be_bytes())?;
                client.write_all(&ABILITIES.to_be_bytes())?;
                client.write_all(&[0; 124][..if padded { 124 } else { 0 }])?;
                return Ok(true);
            }
            ABORT => {
                answer(client, option, ACK, &[])?;
                return Ok(false);
            }
            INFO | GO => {
                let export = [&[0, 0][..], &len.to_be_bytes(), &ABILITIES.to_be_bytes()].concat();
                answer(client, option, REP_INFO, &export)?;
                answer(client, option, ACK, &[])?;
                if option == GO {
                    return Ok(true);
                }
            }
            _ => answer(client, option, UNSUPPORTED, &[])?,
        }
    }
}

fn answer(client: &mut impl Write, option: u32, kind: u32, data: &[u8]) -> Result<()> {
    client.write_all(&OPTION_REPLY.to_be_bytes())?;
    for number in [option, kind, data.len() as u32] {
        client.write_all(&number.to_be_bytes())?;
    }
    client.write_all(data)?;
    Ok(())
}

/// One request; `false` where it was the last.
fn request(client: &mut (impl Read + Write), disk: &Mutex<Disk>) -> Result<bool> {
    ensure!(u32_from(client)? == REQUEST, "a strange request");
    let (flags, kind) = (u16_from(client)?, u16_from(client)?);
    let cookie = bytes_from::<8>(client)?;
    let (offset, length) = (u64::from_be_bytes(bytes_from(client)?), u32_from(client)?);
    let forced = flags & 1 != 0;
    // Only the cleared ranges may be longer, and of them nothing is sent.
    ensure!(length <= MOST || kind > 3, "a request of {length} bytes");
    let mut found = Vec::new();
    let done = match kind {
        0 => lock(disk)
            .read(offset, length as usize)
            .map(|bytes| found = bytes),
        1 => {
            let mut bytes = vec![0; length as usize];
            client.read_exact(&mut bytes)?;
            lock(disk).write(offset, &bytes, forced)
        }
        2 => return Ok(false),
        3 => {
            lock(disk).flush();
            Some(())
        }
        // Freed space is cleared, by a write like any other.
        4 | 6 => clear(&mut lock(disk), offset, length, forced),
        _ => None,
    };
    client.write_all(&REPLY.to_be_bytes())?;
    let error = if done.is_some() { 0 } else { INVALID };
    client.write_all(&u32::to_be_bytes(error))?;
    client.write_all(&cookie)?;
    client.write_all(&found)?;
    Ok(true)
}

fn clear(disk: &mut Disk, offset: u64, length: u32, forced: bool) -> Option<()> {
    let mut at = offset;
    let end = offset.checked_add(length.into())?;
    while at < end {
        let piece = (end - at).min(1 << 20);
        disk.write(at, &vec![0; piece as usize], forced)?;
        at += piece;
    }
    Some(())
}

fn bytes_from<const N: usize>(from: &mut impl Read) -> Result<[u8; N]> {
    let mut bytes = [0; N];
    from.read_exact(&mut bytes)?;
    Ok(bytes)
}

fn u16_from(from: &mut impl Read) -> Result<u16> {
    Ok(u16::from_be_bytes(bytes_from(from)?))
}

fn u32_from(from: &mut impl Read) -> Result<u32> {
    Ok(u32::from_be_bytes(bytes_from(from)?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lab::lossy::{Fate, SECTOR};
    use std::io::Cursor;

    /// A client that said all it has to say.
    struct Client {
        says: Cursor<Vec<u8>>,
        heard: Vec<u8>,
    }

    impl Read for Client {
        fn read(&mut self, into: &mut [u8]) -> std::io::Result<usize> {
            self.says.read(into)
        }
    }

    impl Write for Client {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.heard.write(bytes)
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    fn option(option: u32, data: &[u8]) -> Vec<u8> {
        let length = data.len() as u32;
        [
            OPTION,
            &option.to_be_bytes()[..],
            &length.to_be_bytes(),
            data,
        ]
        .concat()
    }

    fn asked(flags: u16, kind: u16, offset: u64, length: u32) -> Vec<u8> {
        [
            &REQUEST.to_be_bytes()[..],
            &flags.to_be_bytes(),
            &kind.to_be_bytes(),
            b"cookie!!",
            &offset.to_be_bytes(),
            &length.to_be_bytes(),
        ]
        .concat()
    }

    /// What the server answered after the handshake, and the disk.
    fn talk(says: &[Vec<u8>]) -> (Result<()>, Vec<u8>, Disk) {
        let hello = 3u32.to_be_bytes().to_vec();
        let go = option(GO, &[0, 0, 0, 0, 0, 0]);
        let says = [&[hello, option(8, &[]), go], says].concat().concat();
        let mut client = Client {
            says: Cursor::new(says),
            heard: Vec::new(),
        };
        let disk = Mutex::new(Disk::new(1 << 20, []));
        let served = serve(&mut client, &disk);
        // Greeting, the option that is not known, the size, its acknowledgement.
        let shaken = 18 + 20 + 32 + 20;
        assert_eq!(client.heard[18 + 12..18 + 16], UNSUPPORTED.to_be_bytes());
        assert_eq!(client.heard[60..68], (1u64 << 20).to_be_bytes());
        (
            served,
            client.heard.split_off(shaken),
            disk.into_inner().unwrap(),
        )
    }

    fn reply(error: u32) -> Vec<u8> {
        [&REPLY.to_be_bytes()[..], &error.to_be_bytes(), b"cookie!!"].concat()
    }

    #[test]
    fn a_client_writes_reads_and_flushes() {
        let sector = vec![5; SECTOR];
        let (served, heard, disk) = talk(&[
            asked(0, 1, 512, 512),
            sector.clone(),
            asked(0, 0, 512, 512),
            asked(0, 3, 0, 0),
            asked(0, 4, 512, 512),
            asked(1, 1, 1024, 512),
            sector.clone(),
            asked(0, 0, 1 << 20, 512),
            asked(0, 99, 0, 0),
            // In the middle of this the client dies.
            asked(0, 1, 0, 512)[..20].to_vec(),
        ]);
        served.unwrap();
        let wanted = [
            reply(0),
            reply(0),
            sector.clone(),
            reply(0),
            reply(0),
            reply(0),
            reply(INVALID),
            reply(INVALID),
        ];
        assert_eq!(heard, wanted.concat());
        assert_eq!(
            disk.read(512, 512).unwrap(),
            vec![0; SECTOR],
            "it was cleared"
        );
        let after = disk.after_cut(Fate::Nothing, &mut fastrand::Rng::with_seed(1));
        assert_eq!(after.read(512, 1024).unwrap(), vec![5; 2 * SECTOR]);
    }

    #[test]
    fn nonsense_ends_the_connection() {
        assert!(talk(&[vec![1; 28]]).0.is_err());
        assert!(talk(&[asked(0, 1, 0, u32::MAX)]).0.is_err());
    }
}
