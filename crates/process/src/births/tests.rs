use super::*;
use proptest::prelude::*;

/// A process that shares with nobody, and stays in the session that it was born into.
fn alone(pid: u32, parent: u32) -> Unborn {
    Unborn {
        pid,
        parent,
        sid: 0,
        exit_signal: 17,
        groups: [pid; 4],
    }
}

fn with(mut process: Unborn, holder: u32, kinds: &[Kind]) -> Unborn {
    for kind in kinds {
        process.groups[*kind as usize] = holder;
    }
    process
}

/// What becomes of a tree by a plan: parents, groups and sessions; with the rules of the kernel.
fn carry_out(tree: &[Unborn], steps: &[Step]) -> Vec<Unborn> {
    let mut made: Vec<Option<Unborn>> = vec![None; tree.len()];
    let mut fresh = 1000;
    for step in steps {
        match *step {
            Step::Make(at, maker, flags) => {
                assert!(made[at].is_none(), "{at} is made twice");
                let maker_is = match maker {
                    Maker::Us => None,
                    Maker::Parent(m) | Maker::Sibling(m) | Maker::Through(m) => {
                        Some(made[m].clone().expect("the maker is there"))
                    }
                };
                let mut groups = [0; 4];
                for kind in KINDS {
                    fresh += 1;
                    let shares = flags & kind.flag() != 0;
                    groups[kind as usize] = match (&maker_is, shares) {
                        (Some(m), true) => m.groups[kind as usize],
                        (None, true) => panic!("shares with us"),
                        (_, false) => fresh,
                    };
                }
                let signals_alone = flags & (libc::CLONE_VM | libc::CLONE_SIGHAND) as u64;
                assert_ne!(signals_alone, libc::CLONE_SIGHAND as u64);
                let mut signal = tree[at].exit_signal;
                let parent = match (maker, &maker_is) {
                    (Maker::Parent(_), Some(m)) => m.pid,
                    (Maker::Sibling(_), Some(m)) => {
                        signal = m.exit_signal;
                        m.parent
                    }
                    _ => 0,
                };
                made[at] = Some(Unborn {
                    pid: tree[at].pid,
                    parent,
                    sid: maker_is.map_or(0, |m| m.sid),
                    exit_signal: signal,
                    groups,
                });
            }
            Step::BeginSession(at) => {
                let process = made[at].as_mut().expect("it is there");
                process.sid = process.pid;
            }
            Step::Leave(at, flags) => {
                for kind in KINDS.into_iter().filter(|k| flags & k.flag() != 0) {
                    fresh += 1;
                    made[at].as_mut().expect("it is there").groups[kind as usize] = fresh;
                }
            }
        }
    }
    made.into_iter().map(|m| m.expect("it is made")).collect()
}

/// The same groups under the names of their first members.
fn named(mut tree: Vec<Unborn>) -> Vec<Unborn> {
    for kind in KINDS {
        let mut names = BTreeMap::new();
        for process in &mut tree {
            let group = &mut process.groups[kind as usize];
            *group = *names.entry(*group).or_insert(process.pid);
        }
    }
    tree
}

fn must_become(tree: Vec<Unborn>) -> Vec<Step> {
    let tree = named(tree);
    let steps = plan(&tree).unwrap_or_else(|missing| panic!("{missing:?} of {tree:#?}"));
    assert_eq!(named(carry_out(&tree, &steps)), tree);
    steps
}

const ALL: [Kind; 4] = KINDS;

#[test]
fn a_child_shares_with_its_parent() {
    for kinds in [&ALL[..], &ALL[..1], &ALL[1..2], &ALL[2..3], &ALL[1..3]] {
        let steps = must_become(vec![alone(1, 0), with(alone(2, 1), 1, kinds)]);
        assert_eq!(steps.len(), 2);
    }
}

#[test]
fn siblings_share_what_their_parent_has_not() {
    let pair = |kinds: &[Kind]| vec![alone(1, 0), alone(2, 1), with(alone(3, 1), 2, kinds)];
    let steps = must_become(pair(&ALL));
    assert!(
        steps
            .iter()
            .any(|s| matches!(s, Step::Make(2, Maker::Sibling(1), _)))
    );
    // The parent has what they share until they are made, and they need no common maker.
    let mut others = pair(&[Kind::Descriptors]);
    others[2].exit_signal = 0;
    let steps = must_become(others);
    assert!(steps.contains(&Step::Leave(0, Kind::Descriptors.flag())));
    let mut others = pair(&[Kind::Memory]);
    others[2].exit_signal = 0;
    assert_eq!(plan(&others), Err(vec![2]));
}

#[test]
fn a_grandchild_shares_with_or_without_who_stands_between() {
    let tree = |between: &[Kind], kinds: &[Kind]| {
        vec![
            alone(1, 0),
            with(alone(2, 1), 1, between),
            with(alone(3, 2), 1, kinds),
        ]
    };
    must_become(tree(&ALL, &ALL));
    must_become(tree(&[], &[Kind::Descriptors, Kind::Directories]));
    assert_eq!(plan(&tree(&[], &[Kind::Memory])), Err(vec![2]));
    // Two that alternate cannot be.
    let mut alternate = tree(&[], &[Kind::Descriptors]);
    alternate.push(with(alone(4, 3), 2, &[Kind::Descriptors]));
    assert!(plan(&alternate).is_err());
}

#[test]
fn who_has_lost_its_parent_shares_with_anybody() {
    let tree = vec![
        alone(1, 0),
        with(alone(9, 0), 3, &ALL),
        with(alone(8, 0), 1, &ALL[..3]),
        alone(2, 1),
        alone(3, 2),
    ];
    let steps = must_become(tree);
    let passing = |s: &&Step| matches!(s, Step::Make(_, Maker::Through(_), _));
    assert_eq!(steps.iter().filter(passing).count(), 2);
    must_become(vec![alone(1, 0), alone(5, 0), with(alone(6, 0), 5, &ALL)]);
}

#[test]
fn sessions_begin_between_the_children() {
    let mut tree = vec![
        alone(1, 0),
        with(alone(2, 1), 1, &ALL),
        with(alone(3, 2), 1, &ALL),
        with(alone(4, 2), 1, &ALL),
        with(alone(5, 1), 1, &ALL),
        with(alone(6, 5), 5, &ALL),
    ];
    tree[0].sid = 1;
    tree[1].sid = 2;
    tree[2].sid = 2;
    tree[3].sid = 1;
    tree[4].sid = 1;
    tree[5].sid = 6;
    must_become(tree);
}

#[test]
fn a_long_chain_takes_no_long_time() {
    let chain = |length: u32| -> Vec<Unborn> {
        let group = |pid| if pid % 2 == 1 { 1 } else { pid };
        let link = |pid| with(alone(pid, pid - 1), group(pid), &[Kind::Descriptors]);
        (1..=length).map(link).collect()
    };
    assert!(plan(&chain(1000)).is_ok());
    // No program is like that; an image may be.
    let _ = plan(&chain(1 << 13));
}

/// Something that a process of a random program does: who, what, by which flags.
type Deed = (usize, u8, u8);

/// Lets a program do these things; what is left of it.
fn happen(deeds: &[Deed], simple: bool) -> Vec<Unborn> {
    let mut tree = vec![alone(1, 0)];
    let mut fresh = 1000;
    for &(who, what, flags) in deeds {
        let at = who % tree.len();
        let process = tree[at].clone();
        match what % 8 {
            0..=4 => {
                let pid = tree.iter().map(|p| p.pid).max().unwrap_or(0) + 1;
                let mut child = alone(pid, process.pid);
                child.sid = process.sid;
                for (bit, kind) in KINDS.into_iter().enumerate() {
                    let signals = kind != Kind::Signals || flags & 1 != 0;
                    if flags & 1 << bit != 0 && signals {
                        child.groups[kind as usize] = process.groups[kind as usize];
                    } else {
                        fresh += 1;
                        child.groups[kind as usize] = fresh;
                    }
                }
                if flags & 16 != 0 && !simple {
                    child.parent = process.parent;
                }
                tree.push(child);
            }
            _ if simple => {}
            5 => {
                for (bit, kind) in KINDS
                    .into_iter()
                    .enumerate()
                    .filter(|(_, k)| k.can_be_left())
                {
                    if flags & 1 << bit != 0 {
                        fresh += 1;
                        tree[at].groups[kind as usize] = fresh;
                    }
                }
            }
            6 if at != 0 => {
                tree.remove(at);
                for orphan in tree.iter_mut().filter(|p| p.parent == process.pid) {
                    orphan.parent = 0;
                    orphan.exit_signal = 17;
                }
            }
            _ => tree[at].sid = process.pid,
        }
    }
    // Those without parents follow the root, then children their parents.
    let mut order = vec![0];
    order.extend((1..tree.len()).filter(|&i| tree[i].parent == 0));
    let mut next = 0;
    while next < order.len() {
        let pid = tree[order[next]].pid;
        order.extend((1..tree.len()).filter(|&i| tree[i].parent == pid));
        next += 1;
    }
    named(order.into_iter().map(|i| tree[i].clone()).collect())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(500))]

    #[test]
    fn a_plan_makes_what_was_there(deeds in prop::collection::vec(any::<Deed>(), 0..14)) {
        let tree = happen(&deeds, false);
        if let Ok(steps) = plan(&tree) {
            let made = named(carry_out(&tree, &steps));
            let relevant = |tree: &[Unborn]| {
                tree.iter().map(|p| (p.pid, p.parent, p.exit_signal, p.groups)).collect::<Vec<_>>()
            };
            prop_assert_eq!(relevant(&made), relevant(&tree));
            for (made, wanted) in made.iter().zip(&tree) {
                prop_assert_eq!(made.sid == made.pid, wanted.sid == wanted.pid);
            }
        }
    }

    #[test]
    fn what_was_only_cloned_can_be_made(deeds in prop::collection::vec(any::<Deed>(), 0..14)) {
        must_become(happen(&deeds, true));
    }

    #[test]
    fn any_nonsense_is_judged(tree in prop::collection::vec(
        (0u32..8, 0u32..9, any::<[u8; 4]>(), any::<bool>()), 0..9)) {
        let tree: Vec<Unborn> = tree.iter().enumerate().map(|(i, &(parent, sid, groups, signal))| {
            let pid = i as u32 + 1;
            Unborn {
                pid,
                parent: if parent < pid { parent } else { 0 },
                sid,
                exit_signal: if signal { 17 } else { 0 },
                groups: groups.map(|g| u32::from(g) % pid + 1),
            }
        }).collect();
        if let Ok(steps) = plan(&tree) {
            prop_assert_eq!(carry_out(&tree, &steps).len(), tree.len());
        }
    }
}
