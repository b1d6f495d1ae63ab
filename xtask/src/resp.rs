//! A small client for the Redis protocol (RESP2).
//!
//! # Why our own
//! The demo must know for each single write when it was *issued* and when it was *acknowledged*,
//! while many are under way on one connection. Client libraries hand out the answers of a
//! pipeline as one.
//!
//! # Rules
//! - Commands go out in the order of [`Client::queue`]; answers come back in the same order.
//! - A declared length is never believed beyond [`LONGEST`]; nesting never beyond one level.
//!
//! # Refuses
//! RESP3, pushed messages, nested arrays.

use anyhow::{Context, Result, bail, ensure};
use std::{
    io::{BufRead, BufReader, Read, Write},
    net::{Ipv4Addr, SocketAddr, TcpStream},
    time::Duration,
};

/// The longest string and the longest array that an answer may hold.
const LONGEST: usize = 64 << 20;

/// One answer.
#[derive(Debug, PartialEq, Eq)]
pub enum Reply {
    /// `+OK`
    Status(String),
    /// `-ERR …`
    Error(String),
    /// `:7`
    Integer(i64),
    /// `$3 abc`; `None` where there is no such key.
    Bulk(Option<Vec<u8>>),
    /// `*2 …`
    Array(Vec<Reply>),
}

/// A connection.
pub struct Client {
    reader: BufReader<TcpStream>,
    queued: Vec<u8>,
}

impl Client {
    /// Connects to a server on this machine. An answer that takes longer than `patience` is an
    /// error.
    pub fn connect(port: u16, patience: Duration) -> Result<Self> {
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
        let stream = TcpStream::connect_timeout(&address, patience)
            .with_context(|| format!("cannot connect to {address}"))?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(patience))?;
        stream.set_write_timeout(Some(patience))?;
        Ok(Self {
            reader: BufReader::with_capacity(1 << 20, stream),
            queued: Vec::new(),
        })
    }

    /// Adds a command to those that [`Client::send`] sends.
    pub fn queue(&mut self, words: &[&[u8]]) {
        encode(&mut self.queued, words);
    }

    /// Sends what was queued.
    pub fn send(&mut self) -> Result<()> {
        let sent = self.reader.get_mut().write_all(&self.queued);
        self.queued.clear();
        sent.context("the connection broke while sending")
    }

    /// Waits for the next answer.
    pub fn receive(&mut self) -> Result<Reply> {
        read_reply(&mut self.reader, true)
    }

    /// Sends one command and waits for its answer; an error answer is an error.
    pub fn ask(&mut self, words: &[&str]) -> Result<Reply> {
        let bytes: Vec<&[u8]> = words.iter().map(|word| word.as_bytes()).collect();
        self.queue(&bytes);
        self.send()?;
        match self.receive()? {
            Reply::Error(said) => bail!("redis answered {words:?} with: {said}"),
            reply => Ok(reply),
        }
    }

    /// [`Client::ask`] where the answer is a number.
    pub fn ask_number(&mut self, words: &[&str]) -> Result<u64> {
        match self.ask(words)? {
            Reply::Integer(number) => Ok(u64::try_from(number)?),
            other => bail!("redis answered {words:?} with {other:?}, not with a number"),
        }
    }

    /// [`Client::ask`] where the answer is text.
    pub fn ask_text(&mut self, words: &[&str]) -> Result<String> {
        match self.ask(words)? {
            Reply::Status(text) => Ok(text),
            Reply::Bulk(Some(bytes)) => Ok(String::from_utf8_lossy(&bytes).into_owned()),
            other => bail!("redis answered {words:?} with {other:?}, not with text"),
        }
    }
}

fn encode(out: &mut Vec<u8>, words: &[&[u8]]) {
    out.extend_from_slice(format!("*{}\r\n", words.len()).as_bytes());
    for word in words {
        out.extend_from_slice(format!("${}\r\n", word.len()).as_bytes());
        out.extend_from_slice(word);
        out.extend_from_slice(b"\r\n");
    }
}

fn read_reply(reader: &mut impl BufRead, arrays: bool) -> Result<Reply> {
    let line = read_line(reader)?;
    let (kind, rest) = line
        .split_at_checked(1)
        .context("redis sent an empty line")?;
    match kind {
        "+" => Ok(Reply::Status(rest.to_owned())),
        "-" => Ok(Reply::Error(rest.to_owned())),
        ":" => Ok(Reply::Integer(
            rest.parse().context("redis sent a number that is none")?,
        )),
        "$" => Ok(Reply::Bulk(match length(rest)? {
            None => None,
            Some(length) => Some(read_bulk(reader, length)?),
        })),
        "*" if arrays => {
            let count = length(rest)?.unwrap_or(0);
            let mut items = Vec::with_capacity(count.min(1024));
            for _ in 0..count {
                items.push(read_reply(reader, false)?);
            }
            Ok(Reply::Array(items))
        }
        _ => bail!("redis sent {line:?}, which this client does not understand"),
    }
}

fn read_line(reader: &mut impl BufRead) -> Result<String> {
    let mut line = Vec::new();
    reader
        .take(LONGEST as u64)
        .read_until(b'\n', &mut line)
        .context("the connection broke while waiting for an answer")?;
    ensure!(
        line.ends_with(b"\r\n"),
        "the connection ended while waiting for an answer"
    );
    line.truncate(line.len() - 2);
    String::from_utf8(line).context("redis sent a line that is no text")
}

fn length(text: &str) -> Result<Option<usize>> {
    if text == "-1" {
        return Ok(None);
    }
    let length: usize = text.parse().context("redis sent a length that is none")?;
    ensure!(
        length <= LONGEST,
        "redis announced {length} bytes, more than this client takes"
    );
    Ok(Some(length))
}

fn read_bulk(reader: &mut impl BufRead, length: usize) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let read = reader.take(length as u64 + 2).read_to_end(&mut bytes);
    read.context("the connection broke within an answer")?;
    ensure!(
        bytes.len() == length + 2,
        "the connection ended within an answer"
    );
    ensure!(
        bytes.ends_with(b"\r\n"),
        "redis sent a string of another length than announced"
    );
    bytes.truncate(length);
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn parse(bytes: &[u8]) -> Result<Reply> {
        read_reply(&mut &bytes[..], true)
    }

    #[test]
    fn every_kind_of_answer() {
        assert_eq!(parse(b"+OK\r\n").unwrap(), Reply::Status("OK".into()));
        assert_eq!(
            parse(b"-ERR no\r\n").unwrap(),
            Reply::Error("ERR no".into())
        );
        assert_eq!(parse(b":-7\r\n").unwrap(), Reply::Integer(-7));
        assert_eq!(parse(b"$-1\r\n").unwrap(), Reply::Bulk(None));
        assert_eq!(
            parse(b"$4\r\na\r\nb\r\n").unwrap(),
            Reply::Bulk(Some(b"a\r\nb".to_vec()))
        );
        let array = Reply::Array(vec![Reply::Bulk(None), Reply::Integer(1)]);
        assert_eq!(parse(b"*2\r\n$-1\r\n:1\r\n").unwrap(), array);
    }

    #[test]
    fn broken_answers_are_errors() {
        let broken: [&[u8]; 9] = [
            b"",
            b"\r\n",
            b"+OK",
            b":x\r\n",
            b"$5\r\nabc\r\n",
            b"$2\r\nabcd",
            b"$99999999999\r\n",
            b"*1\r\n*1\r\n:1\r\n",
            b"%1\r\n",
        ];
        for bytes in broken {
            assert!(parse(bytes).is_err(), "{bytes:?} was taken");
        }
    }

    proptest! {
        #[test]
        fn nothing_panics(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = parse(&bytes);
        }

        #[test]
        fn a_command_reads_back_as_an_array(
            words in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..40), 1..5)
        ) {
            let slices: Vec<&[u8]> = words.iter().map(Vec::as_slice).collect();
            let mut out = Vec::new();
            encode(&mut out, &slices);
            let expected = words.into_iter().map(|word| Reply::Bulk(Some(word))).collect();
            prop_assert_eq!(parse(&out).unwrap(), Reply::Array(expected));
        }
    }
}
