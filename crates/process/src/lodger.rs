//! A thread of ours in a process, which is none of the program's: it is neither stopped nor saved.
//!
//! There is one as long as pages of a restored process are missing
//! ([`crate::restore::lazy`]). It executes nothing, and has descriptors of its own.
//!
//! # Rules
//! - A thread is a lodger only if its maker says so at this moment, *and* it has the name: the number
//!   may be another thread's as soon as it has ended.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

/// Its name.
pub const NAME: &[u8] = b"outlive-holder";

/// The thread, if there is one now.
#[derive(Clone, Debug, Default)]
pub struct Lodger(Arc<AtomicU32>);

impl Lodger {
    /// This is the thread.
    pub fn moved_in(&self, tid: u32) {
        self.0.store(tid, Ordering::Release);
    }

    /// There is none any more.
    pub fn moved_out(&self) {
        self.0.store(0, Ordering::Release);
    }

    /// Leaves it out of the threads of this process.
    pub fn leave_out(&self, pid: u32, tids: &mut Vec<u32>) {
        let tid = self.0.load(Ordering::Acquire);
        if tid != 0 && is_there(pid, tid) {
            tids.retain(|t| *t != tid);
        }
    }
}

/// Whether a thread with this number has the name.
#[must_use]
pub fn is_there(pid: u32, tid: u32) -> bool {
    let name = std::fs::read(format!("/proc/{pid}/task/{tid}/comm"));
    name.is_ok_and(|name| name.trim_ascii() == NAME)
}
