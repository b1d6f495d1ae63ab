//! Keys of a program (`keyrings(7)`), which are refused: those in its thread, process and session
//! keyrings.
//!
//! # Rules
//! - Every thread is asked, as each has keyrings of its own, and nobody is given one by asking. Who
//!   has no session keyring would be, with that of its user, if it was asked for it. So it is asked
//!   first whether it finds its user's by name. Where there is no such key for it (`ENOKEY`), though there is
//!   one, it has another, and may be asked for it.
//! - Who finds it has none, or that one, or another that leads there. It has none if nobody uses that of
//!   its user: the kernel counts who does ([`Uses`]). Else, and where it could not look, a thread that is
//!   made for it, and ends then, answers in its place: that has the same keyrings, and what it is given goes
//!   with it. A program that may make no further thread now cannot be looked at now.
//! - Keyrings of users (`_uid.N`, `_uid_ses.N`), and what is in them, belong to the machine, like
//!   files: a program finds them there again. They are known by their numbers, as anybody may give one
//!   of his own such a name.
//! - The session keyring of who tracks the program belongs to the session in which both were started.
//!   A restored program has that of who restores it.
//! - A session keyring without a name in which there is nothing, or only links to keyrings of users and
//!   the number that systemd gives a service, says nothing of the program; nor does one that was
//!   revoked, as at the end of a session. Such a program also gets that of who restores it.
//! - All else is refused: keys that nobody has but the program, and keyrings that others join by name.
//!
//! # Limits
//! Keyrings of other users are known to whoever may be any user, and refused by others.

use crate::resources::landlock;
use crate::target::{Status, Target};
use crate::{ProcessError, Refusal};
use outlive_linux::Errno;
use outlive_linux::keys::{self, GET_KEYRING_ID, List, SESSION_KEYRING, USER_SESSION_KEYRING};
use outlive_linux::remote::{Arg, Batch, CallId, Results};
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

const DESCRIBE: u64 = 6;
const READ: u64 = 11;
const THREAD_KEYRING: u64 = -1i64 as u64;
const PROCESS_KEYRING: u64 = -2i64 as u64;
/// Keys of a keyring that are looked at: one with more is refused in any case.
const KEYS: usize = 64;
/// Bytes of a description that are looked at.
const DESCRIPTION: usize = 256;
/// Keys that a message names, at most.
const NAMED: usize = 4;
/// Users whose lists of keys are kept open, at most.
const LISTS: usize = 16;

/// Questions to a thread.
#[derive(Clone, Copy, Debug)]
pub struct Asked {
    own: [CallId; 2],
    /// That of its user, which is made if it was not yet, and whether the thread finds it.
    of_user: [CallId; 2],
}

/// Has a thread make calls.
pub type Run<'a> = &'a mut dyn FnMut(Batch) -> Result<Results, ProcessError>;

/// Adds the questions to a thread of this (real) user.
pub fn ask(batch: &mut Batch, user: u32) -> Asked {
    Asked {
        own: [THREAD_KEYRING, PROCESS_KEYRING].map(|which| serial(batch, which)),
        of_user: [serial(batch, USER_SESSION_KEYRING), find(batch, user)],
    }
}

fn keyctl(batch: &mut Batch, args: impl IntoIterator<Item = Arg>) -> CallId {
    batch.push(libc::SYS_keyctl, args)
}

/// Asks for the number of a keyring, and for none to be made.
fn serial(batch: &mut Batch, which: u64) -> CallId {
    keyctl(batch, [GET_KEYRING_ID, which, 0].map(Arg::Value))
}

/// Looks for the session keyring of a user among the keys of the thread.
fn find(batch: &mut Batch, user: u32) -> CallId {
    let text = |text: String| Arg::In(text.into_bytes());
    let name = text(format!("_uid_ses.{user}\0"));
    let args = [text("keyring\0".into()), name, Arg::Value(0), Arg::Value(0)];
    batch.push(libc::SYS_request_key, args)
}

/// A thread whose answers are judged.
pub struct Thread<'a> {
    /// Its process.
    pub target: &'a Target,
    /// Its ID.
    pub tid: u32,
    /// Its real user.
    pub user: u32,
}

/// What keys a thread has in keyrings of its own and of its process, if any.
pub fn own(
    thread: &Thread<'_>,
    asked: Asked,
    answers: &Results,
    run: Run<'_>,
) -> Result<Option<Refusal>, ProcessError> {
    for (id, what) in asked.own.into_iter().zip(["thread", "process"]) {
        match answers.value(id) {
            Err(Errno::NOSYS) => return Ok(None),
            Err(Errno::NOKEY) => {}
            Ok(ring) => return named(thread, what, ring, run).map(Some),
            Err(e) => return Ok(Some(refused(thread, what, &format!("unreadable: {e}")))),
        }
    }
    Ok(None)
}

impl Asked {
    /// Whether the thread finds the session keyring of its user.
    pub fn finds_session_of_user(&self, answers: &Results) -> bool {
        let [of_user, found] = self.of_user.map(|id| answers.value(id));
        found.is_ok() && found == of_user
    }

    /// How a thread with this status is to be asked for its session keyring, if it has one.
    pub fn session(&self, answers: &Results, uses: &mut Uses, status: &Status) -> Option<How> {
        if answers.value(self.own[0]) == Err(Errno::NOSYS) {
            return None;
        }
        let [of_user, found] = self.of_user.map(|id| answers.value(id));
        how(of_user, found, |ring| {
            uses.has_only_the_kernel(ring, status)
        })
    }
}

/// How a thread is to be asked by the number of its user's session keyring, and what it finds of that name.
fn how(
    of_user: Result<u64, Errno>,
    found: Result<u64, Errno>,
    mut unused: impl FnMut(u64) -> bool,
) -> Option<How> {
    match (of_user, found) {
        (Ok(ring), Ok(found)) if ring == found && unused(ring) => None,
        // It has one which does not lead there. Another error says nothing of that.
        (Ok(of_user), Err(Errno::NOKEY)) => Some(How {
            of_user: Some(of_user),
            aside: false,
        }),
        (of_user, _) => Some(How {
            of_user: of_user.ok(),
            aside: true,
        }),
    }
}

/// How a thread is asked for its session keyring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct How {
    /// That of its user.
    of_user: Option<u64>,
    /// Whether another thread answers in its place.
    aside: bool,
}

impl How {
    /// Adds the question.
    pub fn ask(self, batch: &mut Batch) -> CallId {
        let args = [GET_KEYRING_ID, SESSION_KEYRING, 0].map(Arg::Value);
        match self.aside {
            true => batch.push_aside(libc::SYS_keyctl, args),
            false => batch.push(libc::SYS_keyctl, args),
        }
    }
}

/// Who uses the session keyrings of users, as it was at some moment of a stop.
#[derive(Debug, Default)]
pub struct Uses {
    of_each: Vec<(u64, u64)>,
    /// Whether it was asked for while the program made no calls.
    settled: bool,
}

impl Uses {
    /// Asks for those of the users of threads.
    pub fn read<'a>(&mut self, threads: impl Iterator<Item = &'a Status>) {
        self.of_each.clear();
        let users: BTreeMap<u32, u32> = threads.map(|s| (s.uid[0], s.gid[0])).collect();
        for (user, group) in users {
            let read = list(user, group).and_then(|list| keys::uses(&list));
            match read {
                Ok(read) => self.of_each.extend(read),
                Err(error) => tracing::debug!(user, %error, "its list of keys is not to be had"),
            }
        }
    }

    /// Whether nobody has this session keyring of a user but the kernel itself. What was read while threads
    /// asked for it may count these; so it is read once more then.
    fn has_only_the_kernel(&mut self, ring: u64, status: &Status) -> bool {
        let is_so = |uses: &Self| {
            let of_it = uses.of_each.iter().filter(|(other, _)| *other == ring);
            of_it.map(|(_, uses)| *uses).max() == Some(1)
        };
        if !is_so(self) && !self.settled {
            self.read(std::iter::once(status));
            self.settled = true;
        }
        is_so(self)
    }
}

/// The list of keys as a user sees it, whose own keyrings are there.
fn list(user: u32, group: u32) -> io::Result<Arc<List>> {
    static KEPT: Mutex<BTreeMap<u32, Option<Arc<List>>>> = Mutex::new(BTreeMap::new());
    let mut kept = KEPT.lock().unwrap_or_else(PoisonError::into_inner);
    if kept.len() >= LISTS && !kept.contains_key(&user) {
        kept.clear();
    }
    let absent = || io::Error::from(io::ErrorKind::NotFound);
    if let Some(list) = kept.get(&user) {
        return list.clone().ok_or_else(absent);
    }
    let list = match rustix::process::geteuid().as_raw() == user {
        true => List::open(),
        false => landlock::keys_seen_by(user, group),
    };
    let list = list.map(Arc::new);
    kept.insert(user, list.as_ref().ok().cloned());
    list
}

/// Judges the session keyring that a thread has by this answer. `harmless` are those that were judged for
/// other threads at the same stop.
pub fn session(
    thread: &Thread<'_>,
    how: How,
    answer: Result<u64, Errno>,
    harmless: &mut BTreeSet<u64>,
    run: Run<'_>,
) -> Result<Option<Refusal>, ProcessError> {
    let ring = match answer {
        Ok(ring) => ring,
        Err(Errno::KEYREVOKED | Errno::KEYEXPIRED) => return Ok(None),
        // Nothing is known of it yet: the next stop asks again.
        Err(e @ (Errno::AGAIN | Errno::NOMEM)) if how.aside => {
            let what = format!(
                "making a thread which answers for thread {} (pids.max, RLIMIT_NPROC, memory)",
                thread.tid
            );
            return Err(thread.target.kernel(what, e));
        }
        Err(e) => {
            let what = match how.aside {
                true => format!("hidden: that of its user cannot be told from it: {e}"),
                false => format!("unreadable: {e}"),
            };
            return Ok(Some(refused(thread, "session", &what)));
        }
    };
    if Some(ring) == how.of_user || ours() == Ok(ring) || harmless.contains(&ring) {
        return Ok(None);
    }
    let (own, keys) = contents(ring, run)?;
    let strangers = keys
        .as_ref()
        .is_none_or(|keys| !keys.iter().all(Key::is_of_the_machine));
    let fine = own.is_of_user() || own.description == "_ses" && !strangers;
    if fine {
        harmless.insert(ring);
        return Ok(None);
    }
    Ok(Some(refused(
        thread,
        "session",
        &shown(&own, keys.as_deref()),
    )))
}

/// The session keyring of this process, which stays the same.
fn ours() -> Result<u64, Errno> {
    static OURS: OnceLock<Result<u64, Errno>> = OnceLock::new();
    *OURS.get_or_init(keys::session_keyring)
}

fn named(
    thread: &Thread<'_>,
    what: &str,
    ring: u64,
    run: Run<'_>,
) -> Result<Refusal, ProcessError> {
    let (own, keys) = contents(ring, run)?;
    Ok(refused(thread, what, &shown(&own, keys.as_deref())))
}

fn refused(thread: &Thread<'_>, what: &str, shown: &str) -> Refusal {
    let place = format!("thread {}", thread.tid);
    let what = format!("a {what} keyring of its own ({shown})");
    let remedy = "have it keep keys in the keyring of its user (`@u` of keyctl), which stays on the \
                  machine, and track it from within its own session";
    thread.target.refusal(place, what, remedy)
}

/// A key as the kernel describes it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Key {
    serial: u64,
    sort: String,
    owner: String,
    description: String,
}

impl Key {
    /// Reads `type;user;group;permissions;description`; what cannot be described has no type.
    fn parse(text: &[u8]) -> Self {
        let end = text.iter().position(|b| *b == 0).unwrap_or(text.len());
        let text = String::from_utf8_lossy(&text[..end]);
        let mut words = text.splitn(5, ';');
        let mut word = || words.next().unwrap_or_default().to_owned();
        let (sort, owner) = (word(), word());
        let (_group, _permissions) = (word(), word());
        Self {
            serial: 0,
            sort,
            owner,
            description: word(),
        }
    }

    /// The same with its number.
    fn with(self, serial: u64) -> Self {
        Self { serial, ..self }
    }

    /// Whether it is called like one of those that the kernel keeps for users.
    fn is_called_of_user(&self) -> bool {
        let names = ["_uid.", "_uid_ses."].map(|name| format!("{name}{}", self.owner));
        self.sort == "keyring" && names.contains(&self.description)
    }

    /// One of those that the kernel keeps for users.
    fn is_of_user(&self) -> bool {
        let kept = |user: u32| keys::keyrings_of(user).is_ok_and(|all| all.contains(&self.serial));
        self.is_called_of_user() && self.owner.parse().is_ok_and(kept)
    }

    fn is_of_the_machine(&self) -> bool {
        let of_service = ("user", "0", "invocation_id");
        let all = (&self.sort[..], &self.owner[..], &self.description[..]);
        self.is_of_user() || all == of_service
    }
}

fn shown(ring: &Key, keys: Option<&[Key]>) -> String {
    let name = match &ring.description[..] {
        "" | "_ses" | "_tid" | "_pid" => String::new(),
        name => format!("`{}`, ", name.escape_default()),
    };
    let Some(keys) = keys else {
        return format!("{name}its keys may not be read, or are too many");
    };
    let of = |key: &Key| match &key.sort[..] {
        "" => "a key that may not be looked at".into(),
        sort => format!("{sort} `{}`", key.description.escape_default()),
    };
    let mut list: Vec<String> = keys
        .iter()
        .filter(|k| !k.is_of_the_machine())
        .map(of)
        .collect();
    let more = list.len().saturating_sub(NAMED);
    list.truncate(NAMED);
    if more > 0 {
        list.push(format!("{more} more"));
    }
    if list.is_empty() {
        return format!("{name}empty");
    }
    format!("{name}with {}", list.join(", "))
}

/// A keyring, and its keys where they may be read.
fn contents(ring: u64, run: Run<'_>) -> Result<(Key, Option<Vec<Key>>), ProcessError> {
    let mut batch = Batch::new();
    let own = describe(&mut batch, ring);
    let room = 4 * KEYS;
    let args = [
        Arg::Value(READ),
        Arg::Value(ring),
        Arg::Out(room),
        Arg::Value(room as u64),
    ];
    let read = keyctl(&mut batch, args);
    let answers = run(batch)?;
    let own = Key::parse(answers.out(own, 2)).with(ring);
    // The answer is how much room all would take.
    let length = match answers.value(read) {
        Ok(length) if length <= room as u64 => length as usize,
        _ => return Ok((own, None)),
    };
    let (serials, _) = answers.out(read, 2)[..length].as_chunks::<4>();
    let mut batch = Batch::new();
    let each = serials.iter().map(|serial| {
        let serial = u64::from(u32::from_ne_bytes(*serial));
        (serial, describe(&mut batch, serial))
    });
    let each: Vec<(u64, CallId)> = each.collect();
    if each.is_empty() {
        return Ok((own, Some(Vec::new())));
    }
    let answers = run(batch)?;
    let of = |(serial, id): &(u64, CallId)| match answers.value(*id) {
        Ok(_) => Key::parse(answers.out(*id, 2)).with(*serial),
        Err(_) => Key::default(),
    };
    Ok((own, Some(each.iter().map(of).collect())))
}

fn describe(batch: &mut Batch, key: u64) -> CallId {
    let room = Arg::Value(DESCRIPTION as u64);
    keyctl(
        batch,
        [
            Arg::Value(DESCRIBE),
            Arg::Value(key),
            Arg::Out(DESCRIPTION),
            room,
        ],
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(text: &str) -> Key {
        Key::parse(text.as_bytes())
    }

    #[test]
    fn keyrings_of_users_are_known_by_number_and_not_by_name() {
        let user = rustix::process::getuid().as_raw();
        let Ok(all) = keys::keyrings_of(user) else {
            println!("SKIPPED 1 test: keyrings of users: the kernel has no keys");
            return;
        };
        for (serial, name) in all.into_iter().zip(["_uid", "_uid_ses"]) {
            let text = format!("keyring;{user};-1;1f3f0000;{name}.{user}\0\0");
            assert!(key(&text).with(serial).is_of_the_machine(), "{text}");
            assert!(!key(&text).with(1).is_of_the_machine(), "{text}, forged");
        }
        assert!(key("user;0;0;3f0b0000;invocation_id").is_of_the_machine());
        for other in [
            "keyring;1000;-1;1f3f0000;_uid.0",
            "keyring;0;0;3f030000;_ses",
            "user;0;0;3f010000;_uid.0",
            "user;1000;0;3f0b0000;invocation_id",
            "user;0;0",
            "",
        ] {
            assert!(!key(other).with(all[0]).is_of_the_machine(), "{other}");
        }
    }

    #[test]
    fn only_who_certainly_has_another_keyring_is_asked_itself() {
        let ask = |of_user, aside| Some(How { of_user, aside });
        let unused = |unused| move |_| unused;
        assert_eq!(how(Ok(7), Ok(7), unused(true)), None);
        assert_eq!(how(Ok(7), Ok(7), unused(false)), ask(Some(7), true));
        assert_eq!(how(Ok(7), Ok(8), unused(true)), ask(Some(7), true));
        assert_eq!(
            how(Ok(7), Err(Errno::NOKEY), unused(true)),
            ask(Some(7), false)
        );
        for error in [Errno::ACCESS, Errno::KEYREVOKED, Errno::NOMEM, Errno::INTR] {
            assert_eq!(how(Ok(7), Err(error), unused(true)), ask(Some(7), true));
        }
        // Where its user let nobody search that of its own.
        for found in [Ok(7), Err(Errno::NOKEY)] {
            assert_eq!(how(Err(Errno::NOKEY), found, unused(true)), ask(None, true));
        }
    }

    #[test]
    fn who_could_not_be_asked_now_is_not_refused() {
        let target = Target::open(std::process::id()).unwrap();
        let thread = Thread {
            target: &target,
            tid: target.pid,
            user: 0,
        };
        let judged = |aside, answer| {
            let how = How {
                of_user: None,
                aside,
            };
            let nobody: Run<'_> = &mut |_| unreachable!("nothing more is asked");
            session(&thread, how, Err(answer), &mut BTreeSet::new(), nobody)
        };
        for error in [Errno::AGAIN, Errno::NOMEM] {
            let failed = judged(true, error).unwrap_err();
            assert!(matches!(failed, ProcessError::Kernel { .. }), "{failed}");
            assert!(failed.to_string().contains("pids.max"), "{failed}");
        }
        let refused = judged(true, Errno::ACCESS).unwrap().unwrap();
        assert!(refused.what.contains("hidden"), "{}", refused.what);
        assert!(judged(true, Errno::KEYREVOKED).unwrap().is_none());
    }

    #[test]
    fn who_alone_has_the_keyring_of_a_user_is_known_by_what_counts_most() {
        let mut uses = Uses {
            of_each: vec![(7, 1), (8, 2), (9, 1), (9, 3)],
            settled: true,
        };
        let status = Status::default();
        assert!(uses.has_only_the_kernel(7, &status));
        for ring in [8, 9, 10] {
            assert!(!uses.has_only_the_kernel(ring, &status), "{ring}");
        }
    }

    #[test]
    fn a_refusal_names_some_keys_and_counts_the_others() {
        let ring = key("keyring;0;0;3f030000;mine");
        assert_eq!(shown(&ring, Some(&[])), "`mine`, empty");
        let keys: Vec<Key> = (0..6).map(|n| key(&format!("user;0;0;0;a;{n}"))).collect();
        let all = shown(&key("keyring;0;0;3f030000;_ses"), Some(&keys));
        assert_eq!(
            all,
            "with user `a;0`, user `a;1`, user `a;2`, user `a;3`, 2 more"
        );
        assert!(shown(&ring, None).contains("may not be read"));
        assert!(shown(&ring, Some(&[Key::default()])).contains("may not be looked at"));
    }
}
