//! `pool devices`: which non-volatile memory this host has.

use super::args::DevicesArgs;
use crate::out::{self, Column};
use outlive_keeper::KeeperError;
use outlive_nvpool::devices::{Device, Memory, Source, look};
use serde_json::{Value, json};
use std::path::Path;

/// `outlive pool devices`
pub fn devices(args: &DevicesArgs, json: bool) -> Result<u8, KeeperError> {
    let found = look(Path::new("/"), &args.e820_type);
    if json {
        let memory = |memory: &Memory| {
            json!({
                "start": memory.start,
                "bytes": memory.bytes,
                "e820_type": memory.e820,
                "what": memory.what,
                "nvram": memory.nvram,
                "source": source(memory.source),
                "device": memory.device,
                "remedy": memory.remedy(),
            })
        };
        let device = |device: &Device| {
            json!({
                "device": device.path,
                "bytes": device.bytes,
                "start": device.start,
                "mode": device.mode,
            })
        };
        out::json(&json!({
            "memory": found.memory.iter().map(memory).collect::<Vec<Value>>(),
            "devices": found.devices.iter().map(device).collect::<Vec<Value>>(),
        }));
        return Ok(0);
    }
    let columns = [
        ("START", Column::Right),
        ("SIZE", Column::Right),
        ("TYPE", Column::Right),
        ("FROM", Column::Left),
        ("NVRAM", Column::Left),
        ("WHAT", Column::Left),
    ];
    let row = |memory: &Memory| {
        let nvram = match (&memory.device, memory.nvram) {
            (Some(device), _) => out::tame(device),
            (None, true) => "no device".to_owned(),
            (None, false) => String::new(),
        };
        vec![
            format!("{:#x}", memory.start),
            out::bytes(memory.bytes),
            memory
                .e820
                .map_or_else(|| "-".to_owned(), |number| number.to_string()),
            source(memory.source).to_owned(),
            nvram,
            out::tame(&memory.what),
        ]
    };
    out::line(&out::table(
        &columns,
        &found.memory.iter().map(row).collect::<Vec<_>>(),
    ));
    for device in &found.devices {
        let (path, size) = (out::tame(&device.path), out::bytes(device.bytes));
        out::line(&format!("{path}: {size}, {}", out::tame(&device.mode)));
    }
    for memory in &found.memory {
        if let Some(remedy) = memory.remedy() {
            out::line(&format!("{:#x}: {remedy}", memory.start));
        }
    }
    if !found.memory.iter().any(|memory| memory.nvram) && found.devices.is_empty() {
        out::line("no non-volatile memory is known here; a pool can lie in a file or on a disk");
    }
    Ok(0)
}

fn source(source: Source) -> &'static str {
    match source {
        Source::Firmware => "firmware",
        Source::Kernel => "kernel",
    }
}
