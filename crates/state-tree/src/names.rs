//! Names, versions and limits: what every tree keeps to, whoever wrote it.
//!
//! The rules are those of the Devicetree Specification v0.4 (2.2.1 node names, 2.2.4 property
//! names), narrowed so that `dtc` accepts every tree written here. The reader and the writer call
//! the same functions, so that nothing can be written which would not be read again.

/// Longest property name, bytes (Devicetree Specification 2.2.4.1).
pub const MAX_PROPERTY_NAME: usize = 31;
/// Longest node name before the `@`, bytes (Devicetree Specification 2.2.1.1).
pub const MAX_NODE_NAME: usize = 31;
/// Longest unit address after the `@`, bytes: a 64-bit number in hexadecimal.
pub const MAX_UNIT_ADDRESS: usize = 16;
/// Longest `compatible` string, bytes.
pub const MAX_COMPATIBLE: usize = 63;
/// Deepest nesting; the root is at depth 1.
pub const MAX_DEPTH: usize = 32;
/// Most properties a node can have, `compatible` included. Children are not limited.
pub const MAX_PROPERTIES: usize = 256;
/// Largest blob that is written or read, bytes.
pub const MAX_BLOB: usize = 256 << 20;

/// The property which every node has, as its first one.
pub const COMPATIBLE: &str = "compatible";

/// Properties to which device tree tools give a meaning of their own: `dtc` drops or rewrites
/// them, so that a tree would not survive the journey through text.
const RESERVED: [&str; 3] = ["name", "phandle", "linux,phandle"];

/// Why a name is not legal.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NameFault {
    /// Nothing there.
    #[error("it is empty")]
    Empty,
    /// Longer than the limit, bytes.
    #[error("it is longer than {0} bytes")]
    TooLong(usize),
    /// A byte that names cannot have.
    #[error("it contains the byte {0:#04x}")]
    Byte(u8),
    /// A name with a meaning of its own in device trees.
    #[error("device tree tools give it a meaning of their own")]
    Reserved,
}

fn only(text: &str, max: usize, legal: fn(u8) -> bool) -> Result<(), NameFault> {
    if text.is_empty() {
        return Err(NameFault::Empty);
    }
    if text.len() > max {
        return Err(NameFault::TooLong(max));
    }
    text.bytes()
        .find(|&b| !legal(b))
        .map_or(Ok(()), |b| Err(NameFault::Byte(b)))
}

fn in_node_name(b: u8) -> bool {
    b.is_ascii_alphanumeric() || b",._+-".contains(&b)
}

/// Checks a property name.
pub(crate) fn check_property_name(name: &str) -> Result<(), NameFault> {
    only(name, MAX_PROPERTY_NAME, |b| {
        in_node_name(b) || b == b'#' || b == b'?'
    })?;
    if RESERVED.contains(&name) {
        Err(NameFault::Reserved)
    } else {
        Ok(())
    }
}

/// Checks the name of a node other than the root: `name` or `name@unit-address`.
pub(crate) fn check_node_name(name: &str) -> Result<(), NameFault> {
    match name.split_once('@') {
        None => only(name, MAX_NODE_NAME, in_node_name),
        Some((base, unit)) => {
            only(base, MAX_NODE_NAME, in_node_name)?;
            only(unit, MAX_UNIT_ADDRESS, in_node_name)
        }
    }
}

/// Checks a `compatible` string: printable ASCII without blanks and quotes.
pub(crate) fn check_compatible(compatible: &str) -> Result<(), NameFault> {
    only(compatible, MAX_COMPATIBLE, in_node_name)
}

/// Splits `outlive,thread-v2` into its stem `outlive,thread` and its version 2; `None` where the
/// string does not end in a version of that form.
#[must_use]
pub fn split_version(compatible: &str) -> Option<(&str, u32)> {
    let (stem, digits) = compatible.rsplit_once("-v")?;
    let canonical = digits.bytes().all(|b| b.is_ascii_digit()) && !digits.starts_with('0');
    let version = digits.parse().ok()?;
    (canonical && !stem.is_empty()).then_some((stem, version))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn property_names() {
        assert_eq!(check_property_name("regs-saved"), Ok(()));
        assert_eq!(check_property_name(&"x".repeat(31)), Ok(()));
        assert_eq!(
            check_property_name(&"x".repeat(32)),
            Err(NameFault::TooLong(31))
        );
        assert_eq!(check_property_name(""), Err(NameFault::Empty));
        assert_eq!(check_property_name("a b"), Err(NameFault::Byte(b' ')));
        assert_eq!(check_property_name("a@0"), Err(NameFault::Byte(b'@')));
        assert_eq!(check_property_name("name"), Err(NameFault::Reserved));
        assert_eq!(check_property_name("phandle"), Err(NameFault::Reserved));
    }

    #[test]
    fn node_names() {
        assert_eq!(check_node_name("timers@1f"), Ok(()));
        assert_eq!(check_node_name("stack"), Ok(()));
        assert_eq!(check_node_name("stack@"), Err(NameFault::Empty));
        assert_eq!(check_node_name("@1"), Err(NameFault::Empty));
        assert_eq!(check_node_name("a@1@2"), Err(NameFault::Byte(b'@')));
        assert_eq!(check_node_name("a/b"), Err(NameFault::Byte(b'/')));
        assert_eq!(
            check_node_name(&"n".repeat(32)),
            Err(NameFault::TooLong(31))
        );
    }

    #[test]
    fn versions() {
        assert_eq!(
            split_version("outlive,thread-v1"),
            Some(("outlive,thread", 1))
        );
        assert_eq!(
            split_version("outlive,a-v2-v10"),
            Some(("outlive,a-v2", 10))
        );
        assert_eq!(split_version("outlive,thread"), None);
        assert_eq!(split_version("outlive,thread-v"), None);
        assert_eq!(split_version("outlive,thread-v+1"), None);
        assert_eq!(split_version("outlive,thread-v01"), None);
        assert_eq!(split_version("-v1"), None);
        assert_eq!(split_version("a-v99999999999"), None);
    }
}
