//! The demo must fail when something is wrong. Here it meets stand-ins for Outlive and Redis that
//! work, or that have one planted fault each, and must tell them apart.

use std::{
    env,
    path::Path,
    process::{Command, Output},
};

/// Runs the demo against the stand-ins; `None` where they cannot run here.
fn demo(planted: &str) -> Option<Output> {
    let is_root = rustix::process::geteuid().is_root();
    let has_python = Command::new("python3").arg("--version").output().is_ok();
    if !is_root || !has_python {
        println!("skipped: needs root (to choose a PID) and python3");
        return None;
    }
    let stand_ins = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/planted");
    let path = env::var_os("PATH").unwrap_or_default();
    let path = std::iter::once(stand_ins.clone()).chain(env::split_paths(&path));
    let Ok(path) = env::join_paths(path) else {
        panic!("PATH cannot be extended by {}", stand_ins.display());
    };
    // In a PID namespace of its own: the stand-in draws PIDs again by setting the last one used,
    // and would otherwise give everybody else on the machine numbers that others wait for.
    // A descriptor that the caller leaks must not reach the server, which looks for it.
    let output = Command::new("unshare")
        .args(["--pid", "--fork", "--kill-child", "--mount-proc", "bash"])
        .args(["-c", r#"exec 77</dev/null; exec "$@""#, "leaky"])
        .arg(env!("CARGO_BIN_EXE_xtask"))
        .args([
            "demo",
            "--short",
            "--keys",
            "2000",
            "--rounds",
            "1",
            "--seed",
            "3",
            "--outlive",
        ])
        .arg(stand_ins.join("outlive"))
        .env("PATH", path)
        .env("PLANTED", planted)
        .output();
    match output {
        Ok(output) => Some(output),
        Err(error) => panic!("the demo did not start: {error}"),
    }
}

/// The demo fails, loudly, with exit code 1, and for this reason.
fn must_fail(planted: &str, reason: &str) {
    let Some(output) = demo(planted) else { return };
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(
        output.status.code(),
        Some(1),
        "{planted} was not found: {output:?}"
    );
    assert!(said.contains("THE DEMO FAILED"), "{said}");
    assert!(
        said.contains(reason),
        "{planted} was found for another reason: {said}"
    );
}

#[test]
fn a_keeper_that_works_passes() {
    let Some(output) = demo("") else { return };
    let printed = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{output:?}");
    assert!(
        printed.contains("Every key was right after every restore"),
        "{printed}"
    );
}

#[test]
fn a_missing_key_is_found() {
    must_fail("missing", "key 0 holds nothing, and must hold write");
}

#[test]
fn a_key_that_nobody_wrote_is_found() {
    must_fail("surplus", "(DBSIZE)");
}

#[test]
fn one_value_of_an_earlier_moment_is_found() {
    must_fail("older", "1 keys are not what they must be");
}

#[test]
fn a_flipped_bit_is_found() {
    must_fail("flipped", "bytes that no write made");
}

#[test]
fn an_epoch_older_than_it_says_is_found() {
    must_fail("stale", "acknowledged writes are missing");
}

#[test]
fn a_planned_event_that_loses_writes_is_found() {
    must_fail("planned", "acknowledged writes are missing");
}

#[test]
fn another_server_in_place_of_the_old_one_is_found() {
    must_fail("another", "does not continue the old one");
}

#[test]
fn another_process_number_is_found() {
    must_fail("number", "has PID");
}
