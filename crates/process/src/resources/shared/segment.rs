//! System V shared memory: segments that members of the program map, or made and did not remove.
//!
//! A segment is made again with its ID, key, owner and mode, by the process that made it, and
//! mapped by `shmat(2)`, so that it counts and goes as before. One that a killed program left
//! behind is used again.
//!
//! # What it refuses
//! Segments that processes outside the program have mapped, and those on huge pages.

use crate::resources::system_v::{Members, ObjectState, shown};
use crate::target::Target;
use crate::{ProcessError, Refusal};
use outlive_linux::sysv::{Segment, Sort};
use outlive_state_tree::StateNode;

/// A System V shared memory segment.
#[derive(StateNode, Clone, Debug, PartialEq, Eq)]
#[state(compatible = "outlive,shared-segment-v1")]
pub struct SegmentState {
    /// What all System V objects have.
    #[state(child)]
    pub object: ObjectState,
    /// The process that made it; 0 where that is no member.
    pub maker: u32,
}

impl SegmentState {
    /// Describes a segment of which members have so many mappings.
    pub fn collect(
        segment: &Segment,
        mappings: u64,
        root: &Target,
        members: &Members,
    ) -> Result<Self, ProcessError> {
        if segment.attached > mappings {
            return Err(ProcessError::Refused(vec![shared(segment, root)]));
        }
        let maker = members.get(&segment.creator).copied().unwrap_or(0);
        Ok(Self {
            object: ObjectState::of(&segment.object),
            maker,
        })
    }
}

fn shared(segment: &Segment, root: &Target) -> Refusal {
    let what = format!(
        "{} is mapped by processes outside the program too",
        shown(Sort::Memory, &segment.object)
    );
    let remedy = "keep all that use it as one program, or end the others";
    root.refusal("", what, remedy)
}
