//! Epochs that go over an object store: a real engine, several hosts, and what can go wrong between.

use crate::garage::{Garage, Proxy, may_run, to_engine};
use crate::support::{Done, Place, alone, finished, lives, signal, test_program, until};
use rustix::process::Signal;
use serde_json::Value;
use std::fs;
use std::process::{Child, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Barrier};

/// The shelf of these tests, in the engine's bucket.
const SHELF: &str = "s3://shelves/hosts/all";
/// The same, with another name for the same place.
const AGAIN: &str = "s3://shelves/hosts/all/";

fn number(value: &Value, what: &str) -> u64 {
    value[what].as_u64().unwrap_or_else(|| panic!("{value}"))
}

/// A program that was kept as subject `a`, and died with its keeper: its number, and an early and the
/// newest epoch.
fn died(place: &Place) -> (u32, u64, u64) {
    let counter = test_program("counter");
    let words = [
        "run", "--name", "a", "--every", "20ms", "--", &counter, "numbers",
    ];
    let mut kept = place.start(&words);
    place.epoch_after("a", 5);
    let pid = u32::try_from(number(&place.status("a"), "pid")).unwrap();
    signal(pid, Signal::KILL);
    assert_eq!(kept.code(), 137);
    let epochs = place.epochs("a");
    (pid, epochs[0], *epochs.last().unwrap())
}

/// Numbers of requests of a kind that came to the proxy.
fn count(heard: &[String], kind: &str) -> u64 {
    heard.iter().filter(|line| line.starts_with(kind)).count() as u64
}

fn begin(proxy: &Proxy, place: &Place, words: &[&str]) -> Child {
    let mut command = proxy.command(place, words);
    command.stdout(Stdio::null()).stderr(place.new_errors());
    command.spawn().unwrap()
}

#[test]
fn a_program_goes_on_at_another_host_over_an_object_store() {
    if !may_run("a_program_goes_on_at_another_host_over_an_object_store") {
        return;
    }
    let (_alone, place) = (alone(), Place::new());
    let garage = Garage::start(&place);
    let proxy = Proxy::before(&garage);
    let (pid, early, newest) = died(&place);
    let here = |words: &[&str]| proxy.call(&place, words);
    let there = |words: &[&str]| here(&[words, &["--store", "second"]].concat());

    let early = early.to_string();
    let first = here(&["push", "a", SHELF, "--epoch", &early, "--json"]).json();
    let pieces = number(&first, "pieces");
    assert_eq!(number(&first, "new_pieces"), pieces);
    let heard = proxy.heard();
    // Each piece is looked for and written once; the description besides.
    assert_eq!(
        (count(&heard, "HEAD"), count(&heard, "PUT")),
        (pieces, pieces + 1)
    );
    // What the engine holds is what was counted.
    assert_eq!(garage.bucket().with("/chunks/").len() as u64, pieces);

    let second = here(&["push", "a", AGAIN, "--json"]).json();
    let new = number(&second, "new_pieces");
    assert_eq!(number(&second, "epoch"), newest);
    assert!(0 < new && new < number(&second, "pieces"), "{second}");
    assert!(number(&second, "new_bytes") < number(&first, "new_bytes"));
    let heard = proxy.heard();
    assert_eq!(count(&heard, "PUT"), new + 1);
    let objects = garage.bucket().names().unwrap().len() as u64;
    assert_eq!(objects, pieces + new + 2);
    let again = here(&["push", "a", SHELF]);
    assert!(again.out.contains("already"), "{again:?}");
    assert_eq!(count(&proxy.heard(), "PUT"), 0);

    let pulled = there(&["pull", "a", SHELF, "--json"]).json();
    assert_eq!(pulled["hash"], second["hash"]);
    there(&["verify", "a"]).succeeds();
    there(&["restore", "a", "--detach"]).succeeds();
    assert!(lives(pid));
    let numbers = || fs::metadata(place.path("numbers")).unwrap().len();
    let before = numbers();
    until("it counts on", || numbers() > before);
    there(&["stop", "a"]).succeeds();
    let third = there(&["push", "a", SHELF, "--json"]).json();
    assert!(number(&third, "epoch") > newest);
    // The first host does not know of it, and takes nothing from the second.
    here(&["push", "a", SHELF, "--as", "b"]).succeeds();
    here(&["push", "a", SHELF, "--epoch", &early]).fails(3, &["nothing was pushed", SHELF]);
    there(&["pull", "a", SHELF, "--name", "c"]).succeeds();
}

#[test]
fn what_is_cut_off_on_the_way_to_or_from_an_object_store_goes_on() {
    if !may_run("what_is_cut_off_on_the_way_to_or_from_an_object_store_goes_on") {
        return;
    }
    let (_alone, place) = (alone(), Place::new());
    let garage = Garage::start(&place);
    let proxy = Proxy::before(&garage);
    died(&place);
    let call = |words: &[&str]| proxy.call(&place, words);
    let second = |words: &[&str]| place.call(&[words, &["--store", "second"]].concat());
    let pull = ["pull", "a", SHELF, "--json", "--store", "second"];
    let pieces = || garage.bucket().with("/chunks/").len();
    // After so many of these, requests are cut off.
    let cut_after = |method: &'static str, n: usize| {
        let seen = AtomicUsize::new(0);
        proxy.rule(move |asked, _| asked != method || seen.fetch_add(1, SeqCst) < n);
    };

    // The pusher is killed.
    cut_after("PUT", 5);
    let mut push = begin(&proxy, &place, &["push", "a", SHELF]);
    until("five pieces are there", || pieces() == 5);
    push.kill().unwrap();
    push.wait().unwrap();
    assert!(garage.bucket().with("/subjects/").is_empty());

    // The engine dies under the next one.
    cut_after("PUT", 3);
    let mut push = begin(&proxy, &place, &["push", "a", SHELF]);
    until("three more pieces are there", || pieces() == 8);
    garage.kill();
    proxy.rule(|_, _| true);
    assert_eq!(push.wait().unwrap().code(), Some(1));
    let said = place.said();
    assert!(
        said.contains("cannot be reached") && said.contains(SHELF),
        "{said}"
    );
    garage.again();
    call(&pull).fails(1, &["no epoch of a subject named a"]);
    let came = pieces() as u64;
    let done = call(&["push", "a", SHELF, "--json"]).json();
    assert_eq!(number(&done, "new_pieces") + came, number(&done, "pieces"));

    // The puller is killed; what came is seen, goes on, or is forgotten.
    let killed = |name: &str| {
        // A list, the description, and six pieces.
        cut_after("GET", 8);
        let words = ["pull", "a", SHELF, "--name", name, "--store", "second"];
        let mut pull = begin(&proxy, &place, &words);
        let spool = format!("second/.arriving-{name}/spool");
        until("six pieces came", || place.names(&spool).len() == 6);
        pull.kill().unwrap();
        pull.wait().unwrap();
        proxy.rule(|_, _| true);
    };
    killed("a");
    let ps = second(&["ps", "--json"]).json();
    assert_eq!(ps[0]["name"], "a");
    assert_eq!(ps[0]["state"], "arrival interrupted");
    assert!(number(&ps[0], "arrived_bytes") > 0);
    let pulled = call(&pull).json();
    assert!(
        number(&pulled, "fetched") < number(&pulled, "pieces"),
        "{pulled}"
    );
    second(&["verify", "a"]).succeeds();
    killed("b");
    second(&["forget", "b"]).succeeds();
    second(&["forget", "b"]).fails(1, &["no subject named b"]);
    assert_eq!(place.names("second"), ["a"]);
}

#[test]
fn hosts_that_push_at_the_same_moment_to_an_object_store_lose_nothing() {
    if !may_run("hosts_that_push_at_the_same_moment_to_an_object_store_lose_nothing") {
        return;
    }
    let (_alone, place) = (alone(), Place::new());
    let garage = Garage::start(&place);
    let proxy = Proxy::before(&garage);
    let (_, early, newest) = died(&place);
    place.call(&["export", "a", "-o", "all"]).succeeds();
    place
        .call(&["import", "all", "--store", "second"])
        .succeeds();
    // Both descriptions are held until both are on their way: nobody can know of the other.
    let both = Arc::new(Barrier::new(2));
    proxy.rule(move |method, path| {
        if method == "PUT" && path.contains("/subjects/") {
            both.wait();
        }
        true
    });
    let epochs = [early.to_string(), newest.to_string()];
    let stores = ["store", "second"];
    let pushes: Vec<Child> = epochs
        .iter()
        .zip(stores)
        .map(|(epoch, store)| {
            let words = [
                "push", "a", SHELF, "--json", "--epoch", epoch, "--store", store,
            ];
            let mut command = proxy.command(&place, &words);
            command.stdout(Stdio::piped()).stderr(Stdio::piped());
            command.spawn().unwrap()
        })
        .collect();
    let pushed: Vec<Done> = pushes
        .into_iter()
        .map(|push| finished(push.wait_with_output().unwrap()))
        .collect();
    proxy.rule(|_, _| true);
    let pushed: Vec<Value> = pushed.iter().map(Done::json).collect();
    assert!(pushed.iter().any(|one| one["forked"] == true), "{pushed:?}");
    let asked = proxy.call(&place, &["pull", "a", SHELF, "--store", "third"]);
    asked.fails(3, &["--hash"]);
    for one in &pushed {
        let (hash, name) = (
            one["hash"].as_str().unwrap(),
            &one["hash"].as_str().unwrap()[..8],
        );
        asked.fails(3, &[&hash[..12]]);
        let words = [
            "pull",
            "a",
            SHELF,
            "--hash",
            &hash[..12],
            "--name",
            name,
            "--store",
            "third",
        ];
        proxy.call(&place, &words).succeeds();
        place.call(&["verify", name, "--store", "third"]).succeeds();
    }
}

#[test]
fn whatever_is_spoilt_in_an_object_store_is_noticed() {
    if !may_run("whatever_is_spoilt_in_an_object_store_is_noticed") {
        return;
    }
    let (_alone, place) = (alone(), Place::new());
    let garage = Garage::start(&place);
    died(&place);
    let call = |words: &[&str]| {
        let mut command = place.command(words);
        to_engine(&mut command, garage.port());
        finished(command.output().unwrap())
    };
    let pull = ["pull", "a", SHELF, "--store", "second"];
    call(&["push", "a", SHELF]).succeeds();
    let bucket = garage.bucket();
    let [piece, description] = ["/chunks/", "/subjects/"].map(|part| bucket.with(part).remove(0));
    for name in [&piece, &description] {
        let good = bucket.get(name);
        let shown = name.strip_prefix("hosts/all/").unwrap();
        let mut flipped = good.clone();
        flipped[good.len() / 2] ^= 1;
        let longer = [&good[..], b"x"].concat();
        for bad in [&flipped[..], &good[..good.len() - 1], b"", &longer] {
            bucket.put(name, bad);
            call(&pull).fails(4, &[shown, "damaged"]);
            assert!(
                place.names("second").is_empty(),
                "{:?}",
                place.names("second")
            );
        }
        bucket.put(name, &good);
    }
    bucket.remove(&piece);
    call(&pull).fails(4, &["missing"]);
    // The next push that needs the piece writes it again.
    call(&["push", "a", SHELF, "--as", "b"]).succeeds();
    call(&pull).succeeds();
}

#[test]
fn whoever_cannot_reach_or_enter_an_object_store_is_told_what_to_look_at() {
    if !may_run("whoever_cannot_reach_or_enter_an_object_store_is_told_what_to_look_at") {
        return;
    }
    let (_alone, place) = (alone(), Place::new());
    let garage = Garage::start(&place);
    died(&place);
    let with = |words: &[&str], variables: &[(&str, &str)]| {
        let mut command = place.command(words);
        to_engine(&mut command, garage.port());
        command.envs(variables.iter().copied());
        finished(command.output().unwrap())
    };
    let push = |url: &str, variables: &[(&str, &str)]| with(&["push", "a", url], variables);
    let wrong = "ff".repeat(32);
    let keys = ["AWS_ACCESS_KEY_ID", SHELF];
    push(SHELF, &[("AWS_SECRET_ACCESS_KEY", &wrong)]).fails(5, &keys);
    push(
        SHELF,
        &[("AWS_ACCESS_KEY_ID", "GKffffffffffffffffffffffff")],
    )
    .fails(5, &keys);
    let pull = ["pull", "a", SHELF, "--store", "second"];
    with(&pull, &[("AWS_SECRET_ACCESS_KEY", &wrong)]).fails(5, &keys);
    push("s3://nowhere/x", &[]).fails(1, &["no such bucket", "s3://nowhere/x"]);
    // Nobody listens at a port of which it was made sure just now.
    let closed = std::net::TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap();
    let closed = format!("http://{closed}");
    push(SHELF, &[("AWS_ENDPOINT", &closed)])
        .fails(1, &["cannot be reached", "AWS_ENDPOINT", SHELF]);
    let google = [
        ("GOOGLE_BASE_URL", &*closed),
        ("GOOGLE_SKIP_SIGNATURE", "true"),
        ("GOOGLE_ALLOW_HTTP", "true"),
    ];
    push("gs://b/x", &google).fails(1, &["cannot be reached", "GOOGLE_BASE_URL", "gs://b/x"]);
    let azure = [
        ("AZURE_ENDPOINT", &*closed),
        ("AZURE_ALLOW_HTTP", "true"),
        ("AZURE_SKIP_SIGNATURE", "true"),
        ("AZURE_STORAGE_ACCOUNT_NAME", "n"),
    ];
    push("az://b/x", &azure).fails(1, &["cannot be reached", "AZURE_ENDPOINT", "az://b/x"]);
    push("s3://", &[]).fails(2, &["s3://BUCKET"]);
    push("ftp://a/b", &[]).fails(2, &["no ftp"]);
    assert!(garage.bucket().names().unwrap().is_empty());
    assert!(place.names("second").is_empty());
}
