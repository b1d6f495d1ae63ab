//! Pages and runs of pages.

/// Bytes in a page, the unit of every capture. Larger pages of the processor are runs of these.
pub const PAGE_SIZE: usize = 4096;

/// Names a space that pages live in: the address space of one process, a shared object, guest
/// RAM, a heap. The subject chooses the numbers and says in its state tree what each stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SpaceId(pub u32);

/// `count` consecutive pages of one space, from page `first` on (an address divided by
/// [`PAGE_SIZE`]).
///
/// Invariant: `count` is at least 1 and `first + count` does not exceed 2^52, so that every byte
/// address of the run fits into 64 bits. [`Run::new`] is the only way to make one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Run {
    space: SpaceId,
    first: u64,
    count: u64,
}

/// One past the largest page index.
const END: u64 = 1 << 52;

impl Run {
    /// A run, or `None` where it is empty or would leave the 64-bit address range.
    #[must_use]
    pub fn new(space: SpaceId, first: u64, count: u64) -> Option<Self> {
        let end = first.checked_add(count)?;
        (count > 0 && end <= END).then_some(Self {
            space,
            first,
            count,
        })
    }

    /// The space that the pages live in.
    #[must_use]
    pub fn space(&self) -> SpaceId {
        self.space
    }

    /// Index of the first page.
    #[must_use]
    pub fn first(&self) -> u64 {
        self.first
    }

    /// Number of pages, at least 1.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.count
    }

    /// One past the index of the last page.
    #[must_use]
    pub fn end(&self) -> u64 {
        self.first + self.count
    }

    /// Length in bytes.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.count * PAGE_SIZE as u64
    }

    /// Byte address of the first page.
    #[must_use]
    pub fn address(&self) -> u64 {
        self.first * PAGE_SIZE as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_cannot_be_empty_or_leave_the_address_range() {
        let s = SpaceId(0);
        assert_eq!(Run::new(s, 5, 0), None);
        assert_eq!(Run::new(s, u64::MAX, 2), None);
        assert_eq!(Run::new(s, END - 1, 2), None);
        let last = Run::new(s, END - 1, 1).unwrap();
        assert_eq!(last.end(), END);
        assert_eq!(last.address(), u64::MAX - 4095);
    }
}
