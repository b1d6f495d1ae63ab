//! nginx with two workers, and clients that know every answer, over a unix socket.

use super::{Program, all_were_counted, file, words};
use crate::all_sorts::spoil::Spot;
use crate::support::installed;

const PROGRAM: Program = Program {
    name: "nginx",
    load: "a master and 2 workers; connections of a client within the program, over a unix socket",
    compared: "every answer; the server's count of requests with that of the client",
    prepare: |place| {
        file(place, "nginx.conf", include_str!("loads/nginx.conf"));
        let script = file(place, "nginx.py", include_str!("loads/nginx.py"));
        let (python, nginx) = (installed("python3"), installed("nginx"));
        words([&python, "-I", &script, "0.002", &nginx])
    },
    judge: all_were_counted,
    spot: Spot {
        process: "nginx",
        text: b"cell 0001",
        copies: true,
    },
};

tests!(PROGRAM);
