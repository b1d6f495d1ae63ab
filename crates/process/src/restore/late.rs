//! Descriptors that can only be made once the processes are there: they are made here, and sent to
//! each process that holds them, through a socket which all of them inherited.

use super::internal;
use super::saved::Saved;
use super::stub::{Step, Stub, step};
use crate::ProcessError;
use crate::family;
use crate::resources::descriptors::{Channel, Made};
use outlive_linux::memory;
use rustix::fd::{AsFd, AsRawFd, OwnedFd};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use std::collections::BTreeSet;
use std::io::IoSlice;
use std::mem::MaybeUninit;

/// Bytes of `struct msghdr`.
const HEADER: u64 = 56;
/// Bytes of `struct iovec`.
const VECTOR: u64 = 16;
/// Bytes of a control message with one descriptor.
const CONTROL: u64 = 24;

/// Makes them, and puts each in the place that was kept for it.
pub fn bring(stubs: &mut [Stub], saved: &Saved, made: &Made) -> Result<(), ProcessError> {
    let Some(channel) = made.channel() else {
        return Ok(());
    };
    for late in made.late() {
        let here = here(late.process, stubs, saved);
        let raw = here.and_then(|pid| Pid::from_raw(i32::try_from(pid).ok()?));
        let raw = raw.ok_or_else(|| ProcessError::Image("a pidfd of nobody".into()))?;
        let pidfd = pidfd_open(raw, PidfdFlags::from_bits_retain(late.flags))
            .map_err(|e| internal("opening a pidfd", e.into()))?;
        let holders = saved.table.descriptions.get(late.index);
        let holders = holders.into_iter().flat_map(|d| &d.holders);
        let processes: BTreeSet<u32> = holders.map(|h| h.process).collect();
        for stub in stubs
            .iter_mut()
            .filter(|s| processes.contains(&s.target.id))
        {
            send(channel, &pidfd)?;
            receive(stub, channel, late.place)?;
        }
    }
    Ok(())
}

/// The number that a process of the epoch, running or ended, has here.
fn here(id: u32, stubs: &[Stub], saved: &Saved) -> Option<u32> {
    let of = |id: u32| stubs.iter().find(|s| s.target.id == id);
    if let Some(stub) = of(id) {
        return Some(stub.target.pid);
    }
    let zombie = saved.subject.zombies.iter().find(|z| z.pid == id)?;
    family::child_with_id(of(zombie.parent)?.target.pid, id)
}

fn send(channel: &Channel, fd: &OwnedFd) -> Result<(), ProcessError> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let fds = [fd.as_fd()];
    control.push(SendAncillaryMessage::ScmRights(&fds));
    let data = [IoSlice::new(b"x")];
    sendmsg(&channel.ours, &data, &mut control, SendFlags::NOSIGNAL)
        .map(drop)
        .map_err(|e| internal("sending a descriptor", e.into()))
}

/// Has the process take the descriptor, and bring it to its place.
fn receive(stub: &mut Stub, channel: &Channel, place: i32) -> Result<(), ProcessError> {
    let at = stub.arena.scratch().0;
    let (vector, control) = (at + HEADER, at + HEADER + VECTOR);
    let data = control + CONTROL;
    // struct msghdr: name, its length, vectors, their number, control, its length, flags; then one
    // struct iovec.
    let words = [0, 0, vector, 1, control, CONTROL, 0, data, 1];
    let raw: Vec<u8> = words.iter().flat_map(|w: &u64| w.to_ne_bytes()).collect();
    stub.scratch(&raw)?;
    let socket = channel.theirs.as_raw_fd() as u64;
    let what = "receiving a descriptor";
    stub.steps(vec![step(libc::SYS_recvmsg, [socket, at, 0], what)])?;
    let mut number = [0; 4];
    memory::read_exact(stub.target.pid, control + 16, &mut number)
        .map_err(|e| stub.target.kernel(what, e))?;
    let number = u64::from(u32::from_ne_bytes(number));
    let place = place as u64;
    let cloexec = libc::O_CLOEXEC as u64;
    let steps: Vec<Step> = vec![
        step(libc::SYS_dup3, [number, place, cloexec], what),
        step(libc::SYS_close, [number], what),
    ];
    stub.steps(steps).map(drop)
}
