//! Open file descriptions: one file a kind, all of one shape, listed in one registry.
//!
//! # Sequence
//! ```text
//! capture   collect_table   while the program is stopped; preflight is the same, keeping nothing
//!           FilesToSync     after the resume, before the commit
//! restore   check_table     looks only: every reason not to restore is found before any harm
//!           recreate_table  makes one descriptor per open file description, in this process
//!           (the caller brings what can only be made once the processes are there to its place,
//!           Made::late, and installs them at their numbers in the restored processes)
//!           finish_calls    calls for those processes themselves, all numbers being in place
//!           owner_calls     the same, all threads being there
//!           Made::apply_files  the only step that changes files, and then watches them; last, then
//!                           Made::keep
//! ```
//!
//! # Rules
//! - There is one table for a subject, however many processes it has. An open file description is
//!   saved once, with all the descriptors that refer to it in whichever process, and made once:
//!   what was shared (`dup`, `fork`, a common position) is shared again.
//! - Inside is what some process of the subject holds; outside is everything else.
//! - What belongs to the program is only looked at. A descriptor got from it shares its open file
//!   description, so its flags, its position and its options are never set.
//! - A kind claims a descriptor by what the kernel says it is. What no kind claims is refused by
//!   its usual name ([`refuse`]); so is any attribute that would be lost silently: a lease,
//!   a socket filter.
//! - State read from an image is hostile: numbers, lengths and references are checked before use.
//!
//! # Adding a kind
//! One file with a type that is a node of the state tree and implements [`Descriptor`], and one
//! line in the registry below.

mod collect;
mod context;
mod device;
mod directory;
mod epoll;
mod eventfd;
mod fifo;
mod file;
mod file_action;
mod inet;
mod inet_diag;
mod inotify;
mod locks;
mod multicast;
mod nameless;
mod owner;
mod pidfd;
mod pipe;
mod probe;
mod pty;
mod refuse;
mod restore;
mod signalfd;
mod socket_options;
mod stream;
mod table;
mod tcp_flow;
mod tcp_fresh;
mod tcp_listen;
mod tcp_pair;
mod tcp_reset;
mod terminal_modes;
mod timerfd;
mod udp;
mod udp_queue;
mod unix_accepted;
mod unix_datagram;
mod unix_diag;
mod unix_fresh;
mod unix_listen;
mod unix_name;
mod unix_orphan;
mod unix_pair;
mod unix_queue;

#[cfg(test)]
mod tests;

pub use collect::{Collected, FilesToSync, Memory, collect_table, preflight};
pub use context::{
    About, Around, Channel, CheckContext, CollectContext, Late, RecreateContext, RemoteCall,
};
pub use file::WrittenFile;
pub(crate) use file::{Seen, look_up, same_file};
pub(crate) use file_action::{FileAction, rename_new, set_aside, set_time, sync_directory_of};
pub(crate) use locks::validate as validate_takers;
pub use locks::{LockKind, LockState};
pub use owner::{OwnerSort, OwnerState, owner_calls};
pub use pipe::PipeState;
pub use probe::{FdInfo, Probe, Target};
pub(crate) use pty::controls;
pub use restore::{
    CheckRequest, Checked, Install, Made, check_table, finish_calls, recreate_table,
};
pub use table::{FdTable, Holder, OpenDescription};

use crate::ProcessError;
use outlive_state_tree::StateNode;
use std::collections::BTreeSet;
use std::os::fd::OwnedFd;

/// Whether the processes that a table names are those of the image: `processes` run, `ended` wait
/// to be asked for their exit status, `threads` are all threads.
///
/// # Errors
/// [`ProcessError::Image`] says which is not.
pub(crate) fn validate_ids(
    table: &FdTable,
    processes: &BTreeSet<u32>,
    ended: &BTreeSet<u32>,
    threads: &BTreeSet<u32>,
) -> Result<(), ProcessError> {
    owner::validate(table, processes, threads)?;
    pidfd::validate(table, &(processes | ended))
}

/// One kind of open file description; the implementing type is its saved state.
pub trait Descriptor: StateNode {
    /// Its usual name, for messages.
    const NAME: &'static str;

    /// Whether the status flags of the original are set on what was recreated.
    const SETS_FLAGS: bool = true;

    /// Whether the descriptor is of this kind.
    ///
    /// # Errors
    /// When the process or the kernel does not tell.
    fn claims(probe: &Probe<'_>, around: &Around) -> Result<bool, ProcessError>;

    /// Reads its state, without changing anything.
    ///
    /// # Errors
    /// [`ProcessError::Refused`] for state that could not be made again.
    fn collect(probe: &Probe<'_>, cx: &mut CollectContext<'_>) -> Result<Self, ProcessError>;

    /// At restore, before anything is made: whether it can be made here. What is opened or bound
    /// on the way may be kept for [`Descriptor::recreate`] in [`CheckContext::hold`].
    ///
    /// # Errors
    /// [`ProcessError::Refused`] when it cannot.
    fn check(&self, about: &About, cx: &mut CheckContext<'_>) -> Result<(), ProcessError> {
        let _ = (about, cx);
        Ok(())
    }

    /// Makes it, in this process.
    ///
    /// # Errors
    /// When the kernel does not let it be made.
    fn recreate(&self, about: &About, cx: &mut RecreateContext) -> Result<OwnedFd, ProcessError>;

    /// Adds the calls which restored processes themselves must make once all descriptors have
    /// their numbers.
    fn finish(&self, about: &About, table: &FdTable, calls: &mut Vec<RemoteCall>) {
        let _ = (about, table, calls);
    }

    /// Names the processes and threads in what was collected by the IDs under which they are saved,
    /// which are those that they see themselves.
    fn rename(&mut self, name: &dyn Fn(u32) -> u32) {
        let _ = name;
    }
}

/// Makes the sum of all kinds, and what finds the right one.
macro_rules! registry {
    ($($kind:ident($state:path),)*) => {
        /// The state of an open file description, of whichever kind.
        #[derive(StateNode, Debug, Clone, PartialEq)]
        #[expect(missing_docs, reason = "each kind is documented at its type")]
        pub enum Description {
            $($kind($state),)*
        }

        impl Description {
            /// Reads the state of a descriptor, by the first kind which claims it.
            pub(crate) fn collect(
                probe: &Probe<'_>,
                around: &Around,
                cx: &mut CollectContext<'_>,
            ) -> Result<Self, ProcessError> {
                $(if <$state as Descriptor>::claims(probe, around)? {
                    return <$state as Descriptor>::collect(probe, cx).map(Self::$kind);
                })*
                Err(refuse::by_name(probe)?)
            }

            /// The usual name of the kind.
            #[must_use]
            pub fn name(&self) -> &'static str {
                match self {
                    $(Self::$kind(_) => <$state as Descriptor>::NAME,)*
                }
            }

            pub(crate) fn sets_flags(&self) -> bool {
                match self {
                    $(Self::$kind(_) => <$state as Descriptor>::SETS_FLAGS,)*
                }
            }

            pub(crate) fn check(
                &self,
                about: &About,
                cx: &mut CheckContext<'_>,
            ) -> Result<(), ProcessError> {
                match self {
                    $(Self::$kind(state) => state.check(about, cx),)*
                }
            }

            pub(crate) fn recreate(
                &self,
                about: &About,
                cx: &mut RecreateContext,
            ) -> Result<OwnedFd, ProcessError> {
                match self {
                    $(Self::$kind(state) => state.recreate(about, cx),)*
                }
            }

            pub(crate) fn finish(
                &self,
                about: &About,
                table: &FdTable,
                calls: &mut Vec<RemoteCall>,
            ) {
                match self {
                    $(Self::$kind(state) => state.finish(about, table, calls),)*
                }
            }

            pub(crate) fn rename(&mut self, name: &dyn Fn(u32) -> u32) {
                match self {
                    $(Self::$kind(state) => state.rename(name),)*
                }
            }
        }
    };
}

// The order matters: a stream is claimed before what else it may be, a file without a name before other
// files, connections within the subject before those to the outside.
registry! {
    PtyMaster(pty::PtyMasterState),
    Pty(pty::PtyState),
    Stream(stream::StreamState),
    Nameless(nameless::NamelessState),
    File(file::FileState),
    Directory(directory::DirectoryState),
    Device(device::DeviceState),
    PipeEnd(pipe::PipeEndState),
    Fifo(fifo::FifoState),
    EventFd(eventfd::EventFdState),
    TimerFd(timerfd::TimerFdState),
    SignalFd(signalfd::SignalFdState),
    Epoll(epoll::EpollState),
    Inotify(inotify::InotifyState),
    Pidfd(pidfd::PidfdState),
    TcpListen(tcp_listen::TcpListenState),
    TcpFresh(tcp_fresh::TcpFreshState),
    TcpPairEnd(tcp_pair::TcpPairEndState),
    TcpReset(tcp_reset::TcpResetState),
    UnixListen(unix_listen::UnixListenState),
    UnixFresh(unix_fresh::UnixFreshState),
    UnixPairEnd(unix_pair::UnixPairEndState),
    UnixDatagram(unix_datagram::UnixDatagramState),
    UnixOrphan(unix_orphan::UnixOrphanState),
    Udp(udp::UdpState),
}
