//! A statically linked program: awk of busybox, which starts a short-lived child in every round.

use super::{Program, file, same_undisturbed, words};
use crate::all_sorts::spoil::Spot;
use crate::support::{Place, installed};

const PROGRAM: Program = Program {
    name: "busybox awk, statically linked",
    load: "sums of an array; a child is started and ends in every round",
    compared: "all sums and the array, with an undisturbed run of as many rounds",
    prepare: |place| line(place, "0", "0.005"),
    judge: |place| same_undisturbed(place, |rounds| line(place, rounds, "0"), &["result"]),
    spot: Spot {
        process: "busybox",
        text: b"cell 0001",
        copies: false,
    },
};

fn line(place: &Place, rounds: &str, pace: &str) -> Vec<String> {
    let script = file(place, "ledger.awk", include_str!("loads/ledger.awk"));
    let (rounds, pace) = (format!("rounds={rounds}"), format!("pace={pace}"));
    let busybox = installed("busybox");
    words([&busybox, "awk", "-v", &rounds, "-v", &pace, "-f", &script])
}

tests!(PROGRAM);

#[test]
fn busybox_is_statically_linked() {
    let program = std::fs::read(installed("busybox")).unwrap();
    let loader = program.windows(10).any(|bytes| bytes == b"/ld-linux-");
    assert!(
        !loader,
        "busybox is linked dynamically: install busybox-static"
    );
}
