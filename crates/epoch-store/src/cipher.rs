//! Keys, and what is done with them: nothing here knows what the bytes mean.
//!
//! ```text
//! secret, 32 bytes, of the user
//!   +-- uuid, generation, salt of the file ----> key of the file
//!         +-- header: tags of superblock, slots and seal (BLAKE3)
//!         +-- epoch, attempt: 16 bytes at random, drawn when the epoch is begun
//!               +-- contents: AES-256-GCM, nonce = offset and kind
//!               +-- record: the tag of the trailer (BLAKE3)
//! ```
//!
//! # Rules
//! - No two messages have the same key and the same nonce. Each attempt to write an epoch has a key of its own,
//!   also one that writes over the bytes of an attempt which was cut short; and within an attempt the places of a kind
//!   only grow, which [`Cipher::encrypt`] insists on, also after a write that failed. The second copy of a table is a
//!   copy of the encrypted bytes.
//! - Random bytes come from the kernel or there is no epoch: nothing takes their place.
//! - Keys are wiped from memory when they are dropped, but those that `ring` made of the key of an attempt's contents:
//!   these lead to nothing else than that attempt. Keys are never printed: a [`Fingerprint`] is.
//!
//! # What it does not do
//! It makes no key of a passphrase: those who have the medium can try as many as they like.

use crate::format::Kind;
use crate::planted::bug;
use ring::aead::{AES_256_GCM, Aad, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use zeroize::{Zeroize, Zeroizing};

/// Bytes of a [`Secret`].
pub const SECRET_LEN: usize = 32;

/// Shows that bytes were written by somebody who has the key.
pub type Tag = [u8; 16];
/// Tells attempts to write the same epoch apart.
pub type Attempt = [u8; 16];

type Bytes = Zeroizing<[u8; SECRET_LEN]>;

/// The key of a store.
#[derive(Clone)]
pub struct Secret(Arc<Bytes>);

/// Why bytes are no key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadSecret {
    /// Neither of the two forms.
    #[error(
        "a key is 32 bytes, or 64 hexadecimal digits (with or without a newline), and this is {0} bytes: \
         make one by `head -c 32 /dev/urandom`; a passphrase is none"
    )]
    Length(usize),
    /// Something else than digits.
    #[error("it has the length of 64 hexadecimal digits, and not all of it are such")]
    NoDigits,
    /// All bytes are the same.
    #[error("all of its bytes are the same: make one by `head -c 32 /dev/urandom`")]
    Constant,
    /// All 32 bytes are letters, digits and the like, as random ones never are.
    #[error(
        "it is 32 bytes of text, and a passphrase is no key: make one by `head -c 32 /dev/urandom`"
    )]
    Text,
}

/// Tells keys apart, and says nothing else of them.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Fingerprint(pub [u8; 8]);

impl fmt::Display for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Fingerprint({self})")
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Secret({})", self.fingerprint())
    }
}

impl Secret {
    /// Takes what a file, a command or a credential gave: 32 bytes, or 64 hexadecimal digits with or without a
    /// newline behind.
    ///
    /// # Errors
    /// [`BadSecret`]: it is something else.
    pub fn parse(given: &[u8]) -> Result<Self, BadSecret> {
        let mut key = Zeroizing::new([0; SECRET_LEN]);
        let digits = given.strip_suffix(b"\n").unwrap_or(given);
        if given.len() == SECRET_LEN {
            key.copy_from_slice(given);
        } else if digits.len() == 2 * SECRET_LEN {
            for (byte, pair) in key.iter_mut().zip(digits.as_chunks::<2>().0) {
                let nibble = |digit: u8| char::from(digit).to_digit(16);
                let both = nibble(pair[0]).zip(nibble(pair[1]));
                let (high, low) = both.ok_or(BadSecret::NoDigits)?;
                *byte = (high << 4 | low) as u8;
            }
        } else {
            return Err(BadSecret::Length(given.len()));
        }
        let is_text = |byte: &u8| byte.is_ascii_graphic() || byte.is_ascii_whitespace();
        if given.len() == SECRET_LEN && given.iter().all(is_text) {
            return Err(BadSecret::Text);
        }
        if key.iter().all(|byte| *byte == key[0]) {
            return Err(BadSecret::Constant);
        }
        Ok(Self(Arc::new(key)))
    }

    /// What may be shown of it. A key of random bytes cannot be found by it.
    #[must_use]
    pub fn fingerprint(&self) -> Fingerprint {
        let hash = derive(
            "outlive 2026 epoch store: fingerprint of a key",
            &[&self.0[..]],
        );
        let mut first = [0; 8];
        first.copy_from_slice(&hash[..8]);
        Fingerprint(first)
    }
}

/// A key made of others. The parts have fixed lengths, so that no two lists of parts are the same bytes.
fn derive(what: &str, parts: &[&[u8]]) -> Bytes {
    let mut hasher = blake3::Hasher::new_derive_key(what);
    for part in parts {
        hasher.update(part);
    }
    let mut hash = hasher.finalize();
    let key = Zeroizing::new(*hash.as_bytes());
    hash.zeroize();
    hasher.zeroize();
    key
}

fn keyed(key: &Bytes, kind: u8, at: u64, bytes: &[u8]) -> Tag {
    let mut hasher = blake3::Hasher::new_keyed(key);
    hasher
        .update(&[kind])
        .update(&at.to_le_bytes())
        .update(bytes);
    let mut tag = [0; 16];
    tag.copy_from_slice(&hasher.finalize().as_bytes()[..16]);
    hasher.zeroize();
    tag
}

/// Whether two tags are the same, in a time that does not tell where they differ.
pub fn same(a: &Tag, b: &Tag) -> bool {
    let differing = a.iter().zip(b).fold(0, |all, (a, b)| all | (a ^ b));
    differing == 0 || bug("tags not compared")
}

/// The kinds of records of the header.
const SUPERBLOCK: u8 = 1;
const STAMP: u8 = 2;
const TRAILER: u8 = 3;

/// The keys of one file.
pub struct FileCipher {
    key: Bytes,
    header: Bytes,
}

impl FileCipher {
    pub fn new(secret: &Secret, uuid: &[u8; 16], generation: u64, salt: &[u8; 32]) -> Self {
        let generation = generation.to_le_bytes();
        let key = derive(
            "outlive 2026 epoch store: key of a file",
            &[&secret.0[..], uuid, &generation, salt],
        );
        let header = derive("outlive 2026 epoch store: key of a header", &[&key[..]]);
        Self { key, header }
    }

    /// The tag of a superblock. Both copies have the same.
    pub fn superblock_tag(&self, bytes: &[u8]) -> Tag {
        keyed(&self.header, SUPERBLOCK, 0, bytes)
    }

    /// The tag of what a slot or the seal says, the same in both of its places: `whose` tells them apart.
    pub fn stamp_tag(&self, whose: u64, bytes: &[u8]) -> Tag {
        keyed(&self.header, STAMP, whose, bytes)
    }

    /// The keys of one attempt to write an epoch.
    pub fn of(&self, epoch: u64, attempt: Attempt) -> Cipher {
        let number = epoch.to_le_bytes();
        let parts: [&[u8]; 3] = [&self.key[..], &number, &attempt];
        let contents = derive("outlive 2026 epoch store: contents of an epoch", &parts);
        Cipher {
            contents: aead(&contents),
            record: derive("outlive 2026 epoch store: record of an epoch", &parts),
            attempt,
            used: Default::default(),
        }
    }
}

#[expect(
    clippy::expect_used,
    reason = "a key has the length that the algorithm wants, which is all that is checked"
)]
fn aead(key: &Bytes) -> LessSafeKey {
    let key = UnboundKey::new(&AES_256_GCM, &key[..]);
    LessSafeKey::new(key.expect("32 bytes"))
}

/// The keys of one attempt to write an epoch.
pub struct Cipher {
    contents: LessSafeKey,
    record: Bytes,
    attempt: Attempt,
    /// Of each kind of bytes, the end of the places that something was encrypted for.
    used: [AtomicU64; KINDS],
}

/// More than there are kinds of bytes.
const KINDS: usize = 16;

impl Cipher {
    pub fn attempt(&self) -> Attempt {
        self.attempt
    }

    /// Encrypts what will stand at this place, once and never again. `beside` is not encrypted, and has to be the
    /// same when it is decrypted. `None`, and nothing is encrypted, where it is too long for the algorithm (64 GiB), or
    /// something of this kind was encrypted for this place or a later one before: the nonce could be the same.
    pub fn encrypt(&self, kind: Kind, at: u64, beside: &[u8], bytes: &mut [u8]) -> Option<Tag> {
        let used = self.used.get(kind as usize)?;
        let again = used.fetch_max(at.checked_add(1)?, Ordering::Relaxed) > at;
        if again {
            return None;
        }
        let (nonce, beside) = (nonce(kind, at), Aad::from(beside));
        let tag = self
            .contents
            .seal_in_place_separate_tag(nonce, beside, bytes)
            .ok()?;
        tag.as_ref().try_into().ok()
    }

    /// Decrypts, and says whether that is what was encrypted for this place. Where it is not, the bytes are no more
    /// what they were.
    #[must_use]
    pub fn decrypt(&self, kind: Kind, at: u64, beside: &[u8], tag: &Tag, bytes: &mut [u8]) -> bool {
        let (nonce, beside) = (nonce(kind, at), Aad::from(beside));
        let opened =
            self.contents
                .open_in_place_separate_tag(nonce, beside, (*tag).into(), bytes, 0..);
        opened.is_ok()
    }

    /// The tag of the trailer whose first copy stands at this place.
    pub fn record_tag(&self, at: u64, bytes: &[u8]) -> Tag {
        keyed(&self.record, TRAILER, at, bytes)
    }
}

impl fmt::Debug for Cipher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Cipher").finish_non_exhaustive()
    }
}

impl fmt::Debug for FileCipher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FileCipher").finish_non_exhaustive()
    }
}

fn nonce(kind: Kind, at: u64) -> Nonce {
    let at = if bug("one nonce for all places") {
        0
    } else {
        at
    };
    let mut nonce = [0; NONCE_LEN];
    nonce[..8].copy_from_slice(&at.to_le_bytes());
    nonce[8] = kind as u8;
    Nonce::assume_unique_for_key(nonce)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn secret(first: u8) -> Secret {
        let mut bytes = [7; SECRET_LEN];
        bytes[0] = first;
        Secret::parse(&bytes).unwrap()
    }

    fn file(first: u8) -> FileCipher {
        FileCipher::new(&secret(first), &[1; 16], 1, &[2; 32])
    }

    #[test]
    fn both_forms_of_a_key_are_the_same_key() {
        let digits = "01".repeat(31) + "fE";
        let mut bytes = [1; SECRET_LEN];
        bytes[31] = 0xfe;
        let raw = Secret::parse(&bytes).unwrap().fingerprint();
        assert_eq!(Secret::parse(digits.as_bytes()).unwrap().fingerprint(), raw);
        let line = digits + "\n";
        assert_eq!(Secret::parse(line.as_bytes()).unwrap().fingerprint(), raw);
        assert_eq!(raw.to_string().len(), 16);
    }

    #[test]
    fn what_is_no_key_is_refused() {
        let refused = |given: &[u8]| Secret::parse(given).unwrap_err();
        assert_eq!(refused(b"correct horse\n"), BadSecret::Length(14));
        assert_eq!(refused(&[1; 33]), BadSecret::Length(33));
        assert_eq!(refused(&[b'g'; 64]), BadSecret::NoDigits);
        assert_eq!(refused(&[0; 32]), BadSecret::Constant);
        assert_eq!(refused(&[b'0'; 65]), BadSecret::Length(65));
        assert_eq!(refused(b"0".repeat(64).as_slice()), BadSecret::Constant);
        assert_eq!(
            refused(b"correct horse battery staple 123"),
            BadSecret::Text
        );
    }

    #[test]
    fn a_key_is_never_printed() {
        let shown = format!("{:?}", secret(9));
        assert_eq!(shown, format!("Secret({})", secret(9).fingerprint()));
    }

    /// Everything that a message is bound to.
    #[test]
    fn another_key_file_epoch_attempt_kind_or_place_does_not_open() {
        let right = file(1).of(5, [3; 16]);
        let mut sent = vec![9; 4096];
        let tag = right.encrypt(Kind::Page, 4096, b"", &mut sent).unwrap();
        let opens = |cipher: Cipher, kind, at, beside: &[u8]| {
            let mut got = sent.clone();
            cipher.decrypt(kind, at, beside, &tag, &mut got) && got == [9; 4096]
        };
        assert!(opens(file(1).of(5, [3; 16]), Kind::Page, 4096, b""));
        assert!(!opens(file(2).of(5, [3; 16]), Kind::Page, 4096, b""));
        let other = FileCipher::new(&secret(1), &[9; 16], 1, &[2; 32]);
        assert!(!opens(other.of(5, [3; 16]), Kind::Page, 4096, b""));
        let other = FileCipher::new(&secret(1), &[1; 16], 2, &[2; 32]);
        assert!(!opens(other.of(5, [3; 16]), Kind::Page, 4096, b""));
        let other = FileCipher::new(&secret(1), &[1; 16], 1, &[3; 32]);
        assert!(!opens(other.of(5, [3; 16]), Kind::Page, 4096, b""));
        assert!(!opens(file(1).of(6, [3; 16]), Kind::Page, 4096, b""));
        assert!(!opens(file(1).of(5, [4; 16]), Kind::Page, 4096, b""));
        assert!(!opens(file(1).of(5, [3; 16]), Kind::Tree, 4096, b""));
        assert!(!opens(file(1).of(5, [3; 16]), Kind::Page, 8192, b""));
        assert!(!opens(file(1).of(5, [3; 16]), Kind::Page, 4096, b"x"));
    }

    #[test]
    fn nothing_is_encrypted_twice_for_a_place() {
        let cipher = file(1).of(5, [3; 16]);
        let tagged = |kind, at| cipher.encrypt(kind, at, b"", &mut [1; 8]).is_some();
        assert!(tagged(Kind::Page, 4096) && tagged(Kind::Page, 8192));
        assert!(!tagged(Kind::Page, 8192) && !tagged(Kind::Page, 4096));
        assert!(tagged(Kind::Tree, 0) && !tagged(Kind::Tree, 0));
        assert!(tagged(Kind::Tree, 1) && !tagged(Kind::Tree, u64::MAX));
        assert!(tagged(Kind::Page, 12288));
    }

    #[test]
    fn another_attempt_has_other_bytes() {
        let stored = |attempt| {
            let mut bytes = vec![9; 4096];
            let cipher = file(1).of(5, attempt);
            cipher.encrypt(Kind::Page, 4096, b"", &mut bytes).unwrap();
            bytes
        };
        assert_eq!(stored([1; 16]), stored([1; 16]));
        assert_ne!(stored([1; 16]), stored([2; 16]));
    }

    proptest! {
        #[test]
        fn any_flipped_bit_is_found(mut bytes: [u8; 32], bit in 0usize..(32 + 16) * 8) {
            let cipher = file(1).of(1, [0; 16]);
            let plain = bytes;
            let mut tag = cipher.encrypt(Kind::Index, 0, b"beside", &mut bytes).unwrap();
            let mut whole = bytes;
            prop_assert!(cipher.decrypt(Kind::Index, 0, b"beside", &tag, &mut whole));
            prop_assert_eq!(whole, plain);
            match bit / 8 {
                at @ 0..32 => bytes[at] ^= 1 << (bit % 8),
                at => tag[at - 32] ^= 1 << (bit % 8),
            }
            prop_assert!(!cipher.decrypt(Kind::Index, 0, b"beside", &tag, &mut bytes));
        }
    }
}
