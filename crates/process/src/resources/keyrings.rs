//! Keys of a program (`keyrings(7)`), which are refused: those in its thread, process and session
//! keyrings.
//!
//! # Rules
//! - Every thread is asked, as each has keyrings of its own, and nobody is given one by asking. Who
//!   has no session keyring would be, with that of its user, if it was asked for it. So it is asked
//!   first whether it finds its user's by name: it does where it has none, or that one. Where it
//!   does not, though there is one, it has another, and may be asked for it.
//! - Keyrings of users (`_uid.N`, `_uid_ses.N`), and what is in them, belong to the machine, like
//!   files: a program finds them there again.
//! - The session keyring of who tracks the program belongs to the session in which both were started.
//!   A restored program has that of who restores it.
//! - A session keyring without a name in which there is nothing, or only links to keyrings of users and
//!   the number that systemd gives a service, says nothing of the program; nor does one that was
//!   revoked, as at the end of a session. Such a program also gets that of who restores it.
//! - All else is refused: keys that nobody has but the program, and keyrings that others join by name.
//!
//! # Limits
//! Who has linked the session keyring of its user into one of its own is taken for one that has none.

use crate::target::Target;
use crate::{ProcessError, Refusal};
use outlive_linux::Errno;
use outlive_linux::keys::{self, GET_KEYRING_ID, SESSION_KEYRING};
use outlive_linux::remote::{Arg, Batch, CallId, Results};
use std::collections::BTreeSet;
use std::sync::OnceLock;

const DESCRIBE: u64 = 6;
const READ: u64 = 11;
const THREAD_KEYRING: u64 = -1i64 as u64;
const PROCESS_KEYRING: u64 = -2i64 as u64;
const USER_SESSION_KEYRING: u64 = -5i64 as u64;
/// Keys of a keyring that are looked at: one with more is refused in any case.
const KEYS: usize = 64;
/// Bytes of a description that are looked at.
const DESCRIPTION: usize = 256;
/// Keys that a message names, at most.
const NAMED: usize = 4;

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

/// What keys of its own a thread has, if any. `harmless` are session keyrings that were judged for other threads
/// at the same stop.
pub fn refusal(
    thread: &Thread<'_>,
    asked: Asked,
    answers: &Results,
    harmless: &mut BTreeSet<u64>,
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
    let [of_user, found] = asked.of_user;
    if answers.value(found).is_ok() {
        return Ok(None);
    }
    if let Err(e) = answers.value(of_user) {
        let what = format!("hidden: that of its user cannot be told from it: {e}");
        return Ok(Some(refused(thread, "session", &what)));
    }
    session(thread, harmless, run)
}

/// Judges the session keyring of a thread that has one which is not that of its user.
fn session(
    thread: &Thread<'_>,
    harmless: &mut BTreeSet<u64>,
    run: Run<'_>,
) -> Result<Option<Refusal>, ProcessError> {
    let mut batch = Batch::new();
    let id = serial(&mut batch, SESSION_KEYRING);
    let ring = match run(batch)?.value(id) {
        Ok(ring) => ring,
        Err(Errno::KEYREVOKED | Errno::KEYEXPIRED) => return Ok(None),
        Err(e) => {
            return Ok(Some(refused(
                thread,
                "session",
                &format!("unreadable: {e}"),
            )));
        }
    };
    if ours() == Ok(ring) || harmless.contains(&ring) {
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
            sort,
            owner,
            description: word(),
        }
    }

    /// One of those that the kernel keeps for users.
    fn is_of_user(&self) -> bool {
        let names = ["_uid.", "_uid_ses."].map(|name| format!("{name}{}", self.owner));
        self.sort == "keyring" && names.contains(&self.description)
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
    let own = Key::parse(answers.out(own, 2));
    // The answer is how much room all would take.
    let length = match answers.value(read) {
        Ok(length) if length <= room as u64 => length as usize,
        _ => return Ok((own, None)),
    };
    let (serials, _) = answers.out(read, 2)[..length].as_chunks::<4>();
    let mut batch = Batch::new();
    let each = serials
        .iter()
        .map(|s| describe(&mut batch, u32::from_ne_bytes(*s).into()));
    let each: Vec<CallId> = each.collect();
    if each.is_empty() {
        return Ok((own, Some(Vec::new())));
    }
    let answers = run(batch)?;
    let of = |id: &CallId| match answers.value(*id) {
        Ok(_) => Key::parse(answers.out(*id, 2)),
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
    fn keyrings_of_users_belong_to_the_machine_and_all_else_does_not() {
        for of_machine in [
            "keyring;1000;-1;1f3f0000;_uid.1000\0",
            "keyring;0;-1;1f3f0000;_uid_ses.0\0\0",
            "user;0;0;3f0b0000;invocation_id",
        ] {
            assert!(key(of_machine).is_of_the_machine(), "{of_machine}");
        }
        for other in [
            "keyring;1000;-1;1f3f0000;_uid.0",
            "keyring;0;0;3f030000;_ses",
            "user;0;0;3f010000;_uid.0",
            "user;1000;0;3f0b0000;invocation_id",
            "user;0;0",
            "",
        ] {
            assert!(!key(other).is_of_the_machine(), "{other}");
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
