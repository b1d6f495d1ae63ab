//! Collecting the table of a stopped subject.
//!
//! Every descriptor costs one link and one `fdinfo`; which of them, in whichever process, share an
//! open file description is asked of the kernel (`kcmp`) only among those whose link, position and
//! flags are equal, in `n log n` questions. What does not change from epoch to epoch is kept in [`Memory`].

use super::context::{Around, CollectContext};
use super::file::Vouched;
use super::locks;
use super::owner;
use super::probe::{InfoFiles, Probe, ProcDirs, SocketSort, Target, failed};
use super::stream;
use super::table::{FdTable, Holder, OpenDescription};
use super::{Description, probe, tcp_pair};
use crate::error::{ProcessError, Refusal};
use crate::procfs::spread;
use crate::resources::shared::SharedObjects;
use outlive_linux::kcmp;
use rustix::fs::Dir;
use rustix::io::Errno;
use std::cmp::Ordering;
use std::collections::{HashMap, HashSet};
use std::os::fd::OwnedFd;

/// A file (mount, inode) and the path that leads to it.
type FoundFile = ((u64, u64), Vec<u8>);

/// What was learned about a program's descriptors at earlier epochs. Only to save time: an empty
/// one gives the same result.
#[derive(Debug, Default)]
pub struct Memory {
    /// Per writable file (device, inode): what vouches for its contents.
    pub(crate) vouched: HashMap<(u64, u64), Vouched>,
    /// Per process and number: the file (mount, inode) and the path that was seen to lead to it.
    pub(crate) found: HashMap<(u32, u32), FoundFile>,
    /// Options of a new socket, per sort.
    pub(crate) fresh_sockets:
        HashMap<super::socket_options::Sort, super::socket_options::SocketOptions>,
    /// By inode: what a socket is, which never changes.
    pub(crate) sockets: HashMap<u64, SocketSort>,
    infos: InfoFiles,
    /// How many helpers look at a part of the descriptors, where there are many.
    pub(crate) helpers: usize,
}

/// Descriptors for which a helper is worth its while.
const WORTH_A_HELPER: usize = 64;

/// The regular files that the program has open for writing, taken at the stop.
#[derive(Debug, Default)]
pub struct FilesToSync {
    pub(crate) files: HashMap<(u64, u64), (String, OwnedFd)>,
}

impl FilesToSync {
    /// Makes their contents, sizes and times durable. Must succeed before the epoch is committed:
    /// the restore compares the files with what is recorded in the epoch.
    ///
    /// # Errors
    /// The first file that cannot be written back.
    pub fn sync(&self, pid: u32) -> Result<(), ProcessError> {
        for (path, file) in self.files.values() {
            match rustix::fs::fsync(file) {
                // A file system that keeps nothing has nothing to write back.
                Ok(()) | Err(Errno::INVAL | Errno::ROFS) => {}
                Err(errno) => return Err(failed(pid, format!("write back {path}"), errno)),
            }
        }
        Ok(())
    }

    /// How many there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.files.len()
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.files.is_empty()
    }
}

/// What was collected.
#[derive(Debug)]
pub struct Collected {
    /// The table, for the epoch.
    pub table: FdTable,
    /// The files to be synced before the commit.
    pub files: FilesToSync,
}

/// How often [`preflight`] looks again before it believes a refusal.
const LOOKS: usize = 5;

/// Looks for descriptors that could not be restored, at any time, and keeps nothing. `targets` are
/// the processes of the subject, the root first.
///
/// The program runs meanwhile and may open and close what is being looked at, so only what is
/// found every time is refused.
///
/// # Errors
/// [`ProcessError::Refused`] with all of them.
pub fn preflight(targets: &[Target<'_>]) -> Result<(), ProcessError> {
    let mut memory = Memory::default();
    let mut shared = SharedObjects::default();
    let mut look = || {
        let views = views(targets, &HashSet::new())?;
        collect_views(&views, &mut memory, &mut shared, false).map(|_| ())
    };
    let mut last = look();
    for _ in 1..LOOKS {
        let again = match &last {
            Ok(()) | Err(ProcessError::Gone { .. } | ProcessError::NotPermitted { .. }) => break,
            Err(_) => look(),
        };
        last = match (last, again) {
            (Err(ProcessError::Refused(before)), Err(ProcessError::Refused(mut now))) => {
                now.retain(|refusal| before.contains(refusal));
                if now.is_empty() {
                    Ok(())
                } else {
                    Err(ProcessError::Refused(now))
                }
            }
            (_, again) => again,
        };
    }
    last
}

/// Collects all descriptors of a subject that is stopped. `targets` are its processes, the root
/// first: standard streams are those of the root. Files without a name go among the shared memories.
/// Those `without` have the table of another one of them, and none of their own.
///
/// # Errors
/// [`ProcessError::Refused`] with everything that cannot be saved.
pub fn collect_table(
    targets: &[Target<'_>],
    without: &HashSet<u32>,
    memory: &mut Memory,
    shared: &mut SharedObjects,
) -> Result<Collected, ProcessError> {
    collect_views(&views(targets, without)?, memory, shared, true)
}

/// A process with the numbers that are looked at.
pub(crate) struct View<'a> {
    pub(crate) target: &'a Target<'a>,
    pub(crate) dirs: ProcDirs,
    pub(crate) numbers: Vec<u32>,
}

fn views<'a>(
    targets: &'a [Target<'a>],
    without: &HashSet<u32>,
) -> Result<Vec<View<'a>>, ProcessError> {
    let view = |target: &'a Target<'a>| {
        let dirs = ProcDirs::open(target.pid)?;
        let numbers = match without.contains(&target.pid) {
            true => Vec::new(),
            false => numbers(target, &dirs)?,
        };
        Ok(View {
            target,
            dirs,
            numbers,
        })
    };
    targets.iter().map(view).collect()
}

/// Collects these descriptors, as if there were no others.
pub(crate) fn collect_views(
    views: &[View<'_>],
    memory: &mut Memory,
    shared: &mut SharedObjects,
    stopped: bool,
) -> Result<Collected, ProcessError> {
    let processes: HashSet<u32> = views.iter().map(|view| view.target.pid).collect();
    memory.infos.retain(&processes);
    memory.found.retain(|(pid, _), _| processes.contains(pid));
    let root = views.first().map_or(0, |view| view.target.pid);
    let mut probes = Vec::new();
    let mut around = Around::new(root, processes);
    let mut asked = Vec::new();
    for view in views {
        let numbers = view.numbers.iter().copied();
        for number in numbers.filter(|number| !view.target.ignore.contains(number)) {
            asked.push((view, number, memory.infos.take((view.target.pid, number))));
        }
    }
    let sockets = &memory.sockets;
    let looked = spread(
        asked,
        memory.helpers,
        WORTH_A_HELPER,
        |buffer, (view, number, mut file)| {
            let probe = Probe::read(view.target, &view.dirs, number, &mut file, buffer);
            let probe = probe.map(|probe| {
                probe.map(|mut probe| {
                    probe.remember(sockets);
                    probe.look_ahead();
                    probe
                })
            });
            (probe, (view.target.pid, number), file)
        },
    );
    for (probe, place, file) in looked {
        memory.infos.put(place, file);
        if let Some(probe) = probe? {
            around.add(&probe);
            probes.push(probe);
        }
    }
    around.complete();
    let groups = share(probes)?;
    let first = groups.iter().map(|group| &group.probe);
    let (tcp, peers) = tcp_pair::find(first.clone(), stopped, &memory.sockets)?;
    (around.tcp, around.tcp_peers) = (tcp.into(), peers);
    memory.sockets = first.filter_map(Probe::sort).collect();
    let mut cx = CollectContext {
        around: &around,
        stopped,
        holders: Vec::new(),
        pipes: Vec::new(),
        pipe_places: HashMap::new(),
        files: FilesToSync::default(),
        memory,
        pairs: HashMap::new(),
        shared,
    };
    let mut descriptions = Vec::with_capacity(groups.len());
    let mut refusals: Vec<Refusal> = Vec::new();
    let targets: Vec<&Target<'_>> = views.iter().map(|view| view.target).collect();
    for group in &groups {
        match describe(group, &targets, &mut cx) {
            Ok(description) => stream::split(description, root, &mut descriptions),
            Err(ProcessError::Refused(more)) => refusals.extend(more),
            Err(error) => return Err(error),
        }
    }
    if !refusals.is_empty() {
        return Err(ProcessError::Refused(refusals));
    }
    let (pipes, files) = (cx.pipes, cx.files);
    Ok(Collected {
        table: FdTable {
            descriptions,
            pipes,
        },
        files,
    })
}

/// The open descriptor numbers, in order.
fn numbers(target: &Target<'_>, dirs: &ProcDirs) -> Result<Vec<u32>, ProcessError> {
    let list = |errno| failed(target.pid, "list descriptors", errno);
    let mut numbers = Vec::new();
    for entry in Dir::read_from(&dirs.links).map_err(list)? {
        let entry = entry.map_err(list)?;
        if let Some(number) = entry
            .file_name()
            .to_str()
            .ok()
            .and_then(|name| name.parse().ok())
        {
            numbers.push(number);
        }
    }
    numbers.sort_unstable();
    Ok(numbers)
}

/// One open file description: how it looks through its first descriptor, and all descriptors.
struct Group<'a> {
    probe: Probe<'a>,
    /// How it looks to each further process that holds it.
    others: Vec<Probe<'a>>,
    holders: Vec<Holder>,
}

impl<'a> Group<'a> {
    fn new(probe: Probe<'a>) -> Self {
        Self {
            holders: vec![holder(&probe)],
            others: Vec::new(),
            probe,
        }
    }

    /// Adds a descriptor; those of one process follow each other.
    fn add(&mut self, probe: Probe<'a>) {
        let known = self.holders.last().map(|holder| holder.process);
        self.holders.push(holder(&probe));
        if known != Some(probe.target.pid) {
            self.others.push(probe);
        }
    }
}

fn holder(probe: &Probe<'_>) -> Holder {
    Holder {
        process: probe.target.pid,
        number: probe.number,
        close_on_exec: probe.info.flags & probe::CLOEXEC != 0,
    }
}

/// What is equal for all numbers of one open file description and cheap to compare.
#[derive(PartialEq, Eq, Hash)]
struct Looks {
    link: Vec<u8>,
    position: i64,
    status: u32,
    mount: u64,
    inode: u64,
    /// Numbers event counters, which otherwise all look the same.
    id: Option<String>,
}

impl Looks {
    fn of(probe: &Probe<'_>) -> Self {
        let info = &probe.info;
        Self {
            link: probe.link.clone(),
            position: info.position,
            status: info.status(),
            mount: info.mount,
            inode: info.inode,
            id: info.field("eventfd-id").map(str::to_owned),
        }
    }
}

/// Puts the descriptors of each open file description together; ordered by the first of each.
fn share(probes: Vec<Probe<'_>>) -> Result<Vec<Group<'_>>, ProcessError> {
    let mut groups: Vec<Group<'_>> = Vec::with_capacity(probes.len());
    // Per look: places in `groups`, in the order of kcmp.
    let mut alike: HashMap<Looks, Vec<usize>> = HashMap::new();
    for probe in probes {
        let known = alike.entry(Looks::of(&probe)).or_default();
        match search(&groups, known, &probe)? {
            Ok(place) => groups[place].add(probe),
            Err(insert_at) => {
                known.insert(insert_at, groups.len());
                groups.push(Group::new(probe));
            }
        }
    }
    Ok(groups)
}

/// Finds the description of a descriptor among those that look alike: its place in `groups`, or
/// where it belongs in `known`.
fn search(
    groups: &[Group<'_>],
    known: &[usize],
    probe: &Probe<'_>,
) -> Result<Result<usize, usize>, ProcessError> {
    let (mut low, mut high) = (0, known.len());
    while low < high {
        let middle = low.midpoint(high);
        let place = known[middle];
        let other = groups[place].probe.place();
        match kcmp::compare_files(other, probe.place()) {
            Ok(Ordering::Equal) => return Ok(Ok(place)),
            Ok(Ordering::Less) => low = middle + 1,
            Ok(Ordering::Greater) => high = middle,
            // Closed meanwhile, which only happens in a program that runs (preflight).
            Err(Errno::BADF) => return Ok(Err(low)),
            Err(errno) => {
                let what = format!(
                    "compare fd {} with fd {} of pid {}",
                    probe.number, other.1, other.0
                );
                return Err(failed(probe.target.pid, what, errno));
            }
        }
    }
    Ok(Err(low))
}

fn describe(
    group: &Group<'_>,
    targets: &[&Target<'_>],
    cx: &mut CollectContext<'_>,
) -> Result<OpenDescription, ProcessError> {
    let probe = &group.probe;
    cx.holders.clone_from(&group.holders);
    let around = cx.around;
    let object = Description::collect(probe, around, cx)?;
    Ok(OpenDescription {
        holders: group.holders.clone(),
        flags: probe.info.status(),
        owner: owner::collect(probe, &object, targets)?,
        locks: locks::collect_all(std::iter::once(probe).chain(&group.others))?,
        object,
    })
}
