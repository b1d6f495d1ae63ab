//! `demo`: how to see it.

use crate::out;
use outlive_keeper::KeeperError;

/// `outlive demo`
pub fn demo() -> Result<u8, KeeperError> {
    out::line(
        "Watch a counter survive its own death. In one terminal:

  outlive run --name counter -- sh -c 'i=0; while :; do i=$((i+1)); echo $i; sleep 1; done'

In another, kill it and its keeper without warning, then continue it:

  outlive ps
  kill -9 KEEPER PID        # both, as `outlive ps --json` shows them (keeper_pid, pid)
  outlive restore counter   # counts on; Ctrl-C ends it
  outlive forget counter

The long form, a real Redis with a million keys killed at random moments and compared key by
key, is `cargo xtask demo` in the source tree.",
    );
    Ok(0)
}
