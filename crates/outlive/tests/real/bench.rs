//! The short form of each measurement of `outlive bench`: it works, gives figures, and leaves
//! nothing behind, also when it is interrupted.

use crate::support::{Place, alone, may_run, until};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use std::fs;
use std::path::Path;

/// Processes that were started by this one for its measurements.
fn loads_of(bench: u32) -> Vec<String> {
    let wanted_by = format!("--wanted-by\0{bench}\0");
    let all = fs::read_dir("/proc").unwrap();
    let lines = all.filter_map(|entry| fs::read_to_string(entry.ok()?.path().join("cmdline")).ok());
    lines.filter(|line| line.contains(&wanted_by)).collect()
}

fn entries(dir: &Path) -> usize {
    fs::read_dir(dir).unwrap().count()
}

/// Figures of a table: numbers, and medians of samples.
fn figures(table: &Value) -> Vec<f64> {
    let rows = table["rows"].as_array().unwrap().iter();
    let cells = rows.flat_map(|row| row.as_object().unwrap().values());
    let value = |cell: &Value| cell.as_f64().or_else(|| cell["median"].as_f64());
    cells.filter_map(value).collect()
}

/// Runs a short form; its tables by name.
fn short(place: &Place, words: &[&str]) -> Vec<(String, Value)> {
    let dir = place.path("bench");
    fs::create_dir(&dir).unwrap();
    let mut all = vec!["bench"];
    all.extend(words);
    all.extend(["--short", "--json", "--dir", "bench", "--out", "out"]);
    let done = place.call(&all);
    assert_eq!(done.code, 0, "{done:?}");
    assert_eq!(entries(&dir), 0, "something was left in the directory");
    fs::remove_dir(&dir).unwrap();
    let tables = done.json()["tables"].as_array().unwrap().clone();
    assert!(!tables.is_empty(), "{done:?}");
    for table in &tables {
        let figures = figures(table);
        assert!(!figures.is_empty(), "no figure in {table}");
        assert!(
            figures.iter().all(|f| f.is_finite() && *f >= 0.0),
            "{table}"
        );
    }
    let page = fs::read_to_string(place.path("out").join(format!("{}.md", words[0]))).unwrap();
    for image in page
        .lines()
        .filter_map(|line| line.strip_prefix("![")?.split_once("]("))
    {
        let svg =
            fs::read_to_string(place.path("out").join(image.1.trim_end_matches(')'))).unwrap();
        assert!(
            svg.contains("<circle") && svg.ends_with("</svg>\n"),
            "{}",
            image.1
        );
    }
    let name = |table: &Value| table["name"].as_str().unwrap().to_owned();
    tables
        .into_iter()
        .map(|table| (name(&table), table))
        .collect()
}

#[test]
fn each_measurement_has_a_short_form() {
    if !may_run("each_measurement_has_a_short_form") {
        return;
    }
    let (_alone, place) = (alone(), Place::new());
    for (words, expected) in [
        (
            &["rtcr"][..],
            &["rtcr-size", "rtcr-number", "rtcr-granularity"][..],
        ),
        (
            &["wpp"],
            &[
                "wpp-start",
                "wpp-cycle",
                "wpp-redis",
                "wpp-neighbour",
                "wpp-persist",
            ],
        ),
        (
            &["stop"],
            &[
                "stop-memory",
                "stop-written",
                "stop-threads",
                "stop-mappings",
                "stop-descriptors",
                "stop-redis",
            ],
        ),
        (&["restore"], &["restore-memory"]),
        (&["overhead"], &["overhead"]),
    ] {
        let tables = short(&place, words);
        let names: Vec<&str> = tables.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(names, expected, "{words:?}");
        let written = tables.iter().find(|(name, _)| name == "stop-written");
        written
            .iter()
            .for_each(|(_, table)| bytes_follow_pages(table));
    }
}

/// The more pages were written, the more an epoch holds: as many, and little besides.
fn bytes_follow_pages(table: &Value) {
    let rows = table["rows"].as_array().unwrap();
    for strategy in ["incremental", "redundant"] {
        let own = rows.iter().filter(|row| row["strategy"] == strategy);
        let bytes = own.map(|row| row["bytes an epoch"].as_f64().unwrap());
        let pages: Vec<f64> = bytes.map(|bytes| bytes / 4096.0).collect();
        assert!(pages[0] > 16.0 && pages[0] < 200.0, "{pages:?}");
        assert!(pages[1] > 1024.0 && pages[1] < 1300.0, "{pages:?}");
    }
}

#[test]
fn a_peer_that_cannot_do_it_is_told_in_its_own_words() {
    if !may_run("a_peer_that_cannot_do_it_is_told_in_its_own_words") {
        return;
    }
    let (_alone, place) = (alone(), Place::new());
    let peer = place.path("criu");
    fs::write(
        &peer,
        "#!/bin/sh\necho 'Error (x.c:1): not today' >&2\nexit 1\n",
    )
    .unwrap();
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    fs::set_permissions(&peer, mode).unwrap();
    let peer = format!("--peer=criu={}", peer.display());
    let tables = short(&place, &["stop", "--only", "peer", &peer]);
    let row = &tables[0].1["rows"][0];
    assert_eq!(row["CRIU dump: frozen"], "Error (x.c:1): not today");
    assert_eq!(row["CRIU dump / epoch"]["n"], 0);
    assert!(row["outlive epoch: stop"]["median"].as_f64().unwrap() > 0.0);
}

#[test]
fn an_interrupted_measurement_leaves_nothing() {
    if !may_run("an_interrupted_measurement_leaves_nothing") {
        return;
    }
    let (_alone, place) = (alone(), Place::new());
    let dir = place.path("bench");
    fs::create_dir(&dir).unwrap();
    let mut bench = place.start(&["bench", "stop", "--runs", "100000", "--dir", "bench"]);
    let pid = bench.pid();
    until("a load and its epochs", || {
        let epochs = fs::read_dir(dir.join(format!("outlive-bench-{pid}/store")));
        epochs.is_ok_and(|mut names| names.next().is_some()) && !loads_of(pid).is_empty()
    });
    let raw = i32::try_from(pid).unwrap();
    kill_process(Pid::from_raw(raw).unwrap(), Signal::INT).unwrap();
    assert_eq!(bench.code(), 130);
    assert_eq!(entries(&dir), 0);
    assert_eq!(loads_of(pid), Vec::<String>::new());
}
