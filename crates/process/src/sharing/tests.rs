use super::*;

fn process(pid: u32, parent: u32) -> ProcessState {
    ProcessState {
        pid,
        parent,
        exit_signal: 17,
        ..ProcessState::default()
    }
}

/// It shares everything with this one.
fn fellow(pid: u32, holder: u32) -> ProcessState {
    ProcessState {
        shares_memory_with: holder,
        shares_descriptors_with: holder,
        shares_directories_with: holder,
        shares_signals_with: holder,
        ..process(pid, 1)
    }
}

fn is_valid(processes: &[ProcessState], actions: &[u64], holders: &[u32]) -> bool {
    let signals = SignalsState {
        actions: actions.to_vec(),
        ..SignalsState::default()
    };
    let all: Vec<_> = processes.iter().map(|p| (p, &signals)).collect();
    validate(&all, &holders.iter().copied().collect()).is_ok()
}

#[test]
fn who_shares_names_one_that_has_it() {
    let root = || process(1, 0);
    assert!(is_valid(&[root(), fellow(2, 1), fellow(3, 1)], &[], &[1]));
    for bad in [
        vec![root(), fellow(2, 2)],
        vec![root(), fellow(2, 9)],
        vec![root(), fellow(2, 1), fellow(3, 2)],
        vec![root(), fellow(2, 3), fellow(3, 2)],
    ] {
        assert!(!is_valid(&bad, &[], &[1]), "{bad:?}");
    }
}

#[test]
fn who_shares_has_nothing_of_its_own() {
    let pair = [process(1, 0), fellow(2, 1)];
    assert!(!is_valid(&pair, &[], &[1, 2]));
    assert!(!is_valid(&pair, &[0; 256], &[1]));
}

#[test]
fn signal_actions_are_shared_with_memory_only() {
    let mut child = fellow(2, 1);
    child.shares_memory_with = 0;
    assert!(!is_valid(&[process(1, 0), child.clone()], &[], &[1]));
    // Of different address spaces.
    let mut other = fellow(4, 3);
    other.shares_signals_with = 1;
    other.shares_descriptors_with = 0;
    assert!(!is_valid(&[process(1, 0), process(3, 1), other], &[], &[1]));
}

#[test]
fn those_who_share_are_found_by_the_first() {
    let mut child = std::process::Command::new("sleep")
        .arg("100")
        .spawn()
        .unwrap();
    let (me, other) = (std::process::id(), child.id());
    let same = first_of_each(&[me, other, me], kcmp::Kind::Files).unwrap();
    assert_eq!(same, BTreeMap::from([(me, me)]));
    let mut sharing = Sharing::default();
    assert!(sharing.find(&[me, other]).unwrap().is_empty());
    assert_eq!(sharing.alone, BTreeSet::from([me, other]));
    sharing.forget(me);
    assert_eq!(sharing.alone, BTreeSet::from([other]));
    child.kill().unwrap();
    child.wait().unwrap();
}

#[test]
fn what_cannot_be_made_is_refused_by_name() {
    let mut grandchild = fellow(3, 1);
    grandchild.parent = 2;
    let tree = [process(1, 0), process(2, 1), grandchild];
    let of = |pid| -> Option<Refusing<'static>> {
        Some(Box::new(move |what| Refusal {
            pid,
            program: "program".into(),
            place: String::new(),
            what,
            remedy: "remedy".into(),
        }))
    };
    let Err(ProcessError::Refused(refusals)) = refuse(&tree.each_ref(), &of) else {
        panic!("it is not refused");
    };
    assert_eq!(refusals.len(), 1);
    assert_eq!(refusals[0].pid, 3);
    assert!(
        refusals[0]
            .what
            .contains("its memory with process 1 and its table of descriptors")
    );
    let mut tree = tree;
    tree[1] = fellow(2, 1);
    assert!(refuse(&tree.each_ref(), &of).is_ok());
}
