//! [`PString`]: text in the heap.

use crate::block::Access;
use crate::error::Error;
use crate::transaction::Tx;
use crate::vector::PVec;
use resilient_heap_derive::Persist;

/// Text in the heap: UTF-8, eight bytes where it is.
#[derive(Default, Persist)]
#[persist(crate)]
#[repr(transparent)]
pub struct PString<'h> {
    bytes: PVec<'h, u8>,
}

impl<'h> PString<'h> {
    /// No text.
    #[must_use]
    pub const fn empty() -> Self {
        Self { bytes: PVec::new() }
    }

    /// Puts text into the heap.
    ///
    /// # Errors
    /// [`Error::Full`], [`Error::TooLarge`]
    pub fn new(tx: &Tx<'h>, text: &str) -> Result<Self, Error> {
        let mut bytes = PVec::new();
        bytes.extend_from_slice(tx, text.as_bytes())?;
        Ok(Self { bytes })
    }

    /// The text.
    ///
    /// # Errors
    /// [`Error::Lost`]; [`Error::Invalid`] if somebody else wrote something that is no text.
    pub fn as_str<'a>(&'a self, access: &'a impl Access<'h>) -> Result<&'a str, Error> {
        let bytes = self.bytes.as_slice(access)?;
        core::str::from_utf8(bytes).map_err(|_| Error::Invalid {
            what: "a text is no UTF-8",
            at: 0,
        })
    }

    /// Adds text at the end.
    ///
    /// # Errors
    /// [`Error::Full`], [`Error::TooLarge`], [`Error::Lost`]
    pub fn push_str(&mut self, tx: &Tx<'h>, text: &str) -> Result<(), Error> {
        self.bytes.extend_from_slice(tx, text.as_bytes())
    }
}
