//! memcached with clients that know every answer, over a unix socket.

use super::{Program, all_were_counted, file, words};
use crate::all_sorts::spoil::Spot;
use crate::support::installed;

const PROGRAM: Program = Program {
    name: "memcached",
    load: "4 connections of a client within the program, over a unix socket",
    compared: "every value that was ever set, with what the client set",
    prepare: |place| {
        let script = file(place, "memcached.py", include_str!("loads/memcached.py"));
        let (python, memcached) = (installed("python3"), installed("memcached"));
        words([&python, "-I", &script, "0", "0.002", &memcached])
    },
    judge: all_were_counted,
    spot: Spot {
        process: "memcached",
        text: b"cell 0001",
        copies: false,
    },
};

tests!(PROGRAM);
