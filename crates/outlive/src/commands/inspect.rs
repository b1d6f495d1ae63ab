//! `inspect`: what an epoch holds.

use super::{dts, image};
use crate::cli::InspectArgs;
use crate::out::{self, Column};
use outlive_epoch::{EpochReader, Run};
use outlive_keeper::KeeperError;
use outlive_keeper::images::Image;
use outlive_keeper::subject::Root;
use outlive_state_tree::{SchemaSet, Tree};
use serde_json::{Value, json};
use std::collections::BTreeMap;

/// What is found in one group.
struct Group {
    name: String,
    compatible: String,
    bytes: usize,
    nodes: usize,
    dts: Option<String>,
    problems: Vec<String>,
}

/// `outlive inspect`
pub fn inspect(root: &Root, args: &InspectArgs, json: bool) -> Result<u8, KeeperError> {
    let dir = image::find(root, &args.what)?;
    let secret = image::key(root, &args.what, &args.key)?;
    let image = Image::open_with(&dir, secret.as_ref())?;
    let epochs = image.epochs();
    let reader = image.epoch(args.epoch)?;
    let names = reader.groups();
    let schemas = outlive_process::image::schemas()
        .map_err(|error| KeeperError::Other(format!("the published schemas disagree: {error}")))?;
    let groups: Result<Vec<Group>, KeeperError> = names
        .into_iter()
        .map(|name| look(&*reader, name, args, &schemas))
        .collect();
    let groups = groups?;
    let spaces = spaces(&reader.runs());
    let stored = epochs.iter().find(|epoch| epoch.epoch == reader.id().0);
    let saved = stored.map_or(0, |epoch| epoch.saved_bytes);
    if json {
        let mut value = as_json(reader.id().0, epochs.len(), &groups, &spaces, args);
        value["saved_bytes"] = json!(saved);
        out::json(&value);
    } else if args.dts {
        out::line(dts::source(&*reader, &schemas)?.trim_end());
    } else {
        print(reader.id().0, epochs.len(), &groups, &spaces);
        if saved > 0 {
            out::line(&format!("compression saved {} of it", out::bytes(saved)));
        }
    }
    let problems: usize = groups.iter().map(|group| group.problems.len()).sum();
    for group in &groups {
        for problem in &group.problems {
            out::say(&format!("group {}: {problem}", out::tame(&group.name)));
        }
    }
    if args.check && problems == 0 && !json {
        out::line(&format!(
            "{} checked, no problem",
            out::plural(groups.len() as u64, "state tree", "state trees")
        ));
    }
    Ok(if problems == 0 { 0 } else { 4 })
}

fn look(
    reader: &dyn EpochReader,
    name: String,
    args: &InspectArgs,
    schemas: &SchemaSet,
) -> Result<Group, KeeperError> {
    let blob = reader.tree(&name)?.unwrap_or_default();
    let mut group = Group {
        name,
        compatible: String::new(),
        bytes: blob.len(),
        nodes: 0,
        dts: None,
        problems: Vec::new(),
    };
    match Tree::parse(&blob) {
        Ok(tree) => {
            group.compatible = tree.root.compatible.to_string();
            group.nodes = count_nodes(&tree.root);
            group.dts = args
                .dts
                .then(|| outlive_state_tree::to_dts_with(&tree, schemas));
            if args.check {
                let problems = outlive_state_tree::check(&tree, schemas);
                group
                    .problems
                    .extend(problems.iter().map(ToString::to_string));
            }
        }
        Err(error) => group.problems.push(error.to_string()),
    }
    Ok(group)
}

fn count_nodes(node: &outlive_state_tree::Node<'_>) -> usize {
    1 + node.children.iter().map(count_nodes).sum::<usize>()
}

/// Runs and pages of each space.
fn spaces(runs: &[Run]) -> BTreeMap<u32, (u64, u64)> {
    let mut spaces = BTreeMap::new();
    for run in runs {
        let entry: &mut (u64, u64) = spaces.entry(run.space().0).or_default();
        entry.0 += 1;
        entry.1 += run.count();
    }
    spaces
}

fn as_json(
    epoch: u64,
    epochs: usize,
    groups: &[Group],
    spaces: &BTreeMap<u32, (u64, u64)>,
    args: &InspectArgs,
) -> Value {
    let groups: Vec<Value> = groups
        .iter()
        .map(|group| {
            let mut value = json!({
                "name": group.name,
                "compatible": group.compatible,
                "bytes": group.bytes,
                "nodes": group.nodes,
                "problems": group.problems,
            });
            if args.dts {
                value["dts"] = json!(group.dts);
            }
            value
        })
        .collect();
    let spaces: Vec<Value> = spaces
        .iter()
        .map(|(space, (runs, pages))| json!({ "space": space, "runs": runs, "pages": pages }))
        .collect();
    json!({ "epoch": epoch, "epochs": epochs, "groups": groups, "spaces": spaces })
}

fn print(epoch: u64, epochs: usize, groups: &[Group], spaces: &BTreeMap<u32, (u64, u64)>) {
    use Column::{Left, Right};
    out::line(&format!(
        "epoch {epoch} ({} held)",
        out::plural(epochs as u64, "epoch", "epochs")
    ));
    out::line("");
    let columns = [
        ("GROUP", Left),
        ("NODES", Right),
        ("BYTES", Right),
        ("COMPATIBLE", Left),
    ];
    let rows: Vec<Vec<String>> = groups
        .iter()
        .map(|group| {
            vec![
                out::tame(&group.name),
                group.nodes.to_string(),
                out::bytes(group.bytes as u64),
                out::tame(&group.compatible),
            ]
        })
        .collect();
    out::line(&out::table(&columns, &rows));
    out::line("");
    let columns = [
        ("SPACE", Right),
        ("RUNS", Right),
        ("PAGES", Right),
        ("MEMORY", Right),
    ];
    let rows: Vec<Vec<String>> = spaces
        .iter()
        .map(|(space, (runs, pages))| {
            let memory = out::bytes(pages.saturating_mul(outlive_epoch::PAGE_SIZE as u64));
            vec![
                space.to_string(),
                out::count(*runs),
                out::count(*pages),
                memory,
            ]
        })
        .collect();
    out::line(&out::table(&columns, &rows));
}
