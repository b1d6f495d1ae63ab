//! GNU make with two jobs, which compile and assemble all the time.

use super::{Program, file, read, words};
use crate::all_sorts::spoil::Spot;
use crate::support::{Place, installed};
use std::fs;
use std::process::Command;

const PROGRAM: Program = Program {
    name: "make -j2 with gcc",
    load: "compiles one part of a C project after the other, two at a time",
    compared: "all object files, byte by byte, and what the built program prints",
    prepare: |place| {
        project(place, "");
        line(1500)
    },
    judge,
    spot: Spot {
        process: "make",
        text: b"cell 0001",
        copies: true,
    },
};

fn project(place: &Place, folder: &str) {
    let table: String = (0..200)
        .map(|cell| format!("cell {cell:06} {:x} ", cell * cell))
        .collect();
    let makefile = format!("TABLE := {table}\n{}", include_str!("loads/Makefile"));
    file(place, &format!("{folder}Makefile"), &makefile);
    file(
        place,
        &format!("{folder}part.c"),
        include_str!("loads/part.c"),
    );
    file(
        place,
        &format!("{folder}main.c"),
        include_str!("loads/main.c"),
    );
}

fn line(parts: usize) -> Vec<String> {
    words([&installed("make"), "-s", "-j2", &format!("COUNT={parts}")])
}

/// Builds the same parts again.
fn judge(place: &Place) -> Result<(), String> {
    let names = place.names(".").into_iter();
    let parts = names.filter_map(|name| {
        Some(
            name.strip_prefix("part-")?
                .strip_suffix(".done")?
                .to_owned(),
        )
    });
    let parts: Vec<String> = parts.collect();
    let counted = read(place, "progress")?.len();
    // The file that counts is not open all the time, so it does not go back: some count twice.
    if parts.is_empty() || parts.len() > counted {
        return Err(format!(
            "{} parts, of which {counted} were counted",
            parts.len()
        ));
    }
    fs::create_dir(place.path("undisturbed")).unwrap();
    project(place, "undisturbed/");
    let again = format!("PARTS={}", parts.join(" "));
    let mut make = Command::new(installed("make"));
    let make = make
        .args(["-s", "-j2", &again])
        .current_dir(place.path("undisturbed"));
    assert!(make.status().unwrap().success());
    for part in parts {
        let name = format!("part-{part}.o");
        if read(place, &name)? != read(place, &format!("undisturbed/{name}"))? {
            return Err(format!("{name} is not what it is undisturbed"));
        }
    }
    let said = |name: &str| {
        Command::new(place.path(name))
            .output()
            .map_err(|e| e.to_string())
    };
    if said("program")? != said("undisturbed/program")? {
        return Err("the program says something else".into());
    }
    Ok(())
}

tests!(PROGRAM);
