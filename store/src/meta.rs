//! The rows of a replica's `meta` column family: what it is, where it stands
//! in its peers' changes, and the ceilings that keep a stamp or a seq from
//! being used twice.

use prost::Message;
use vasto_client::v1::{Position, SnapshotRequired};

use crate::engine::{Batch, Engine, Error, MetaRow, Pin};

const ID: &[u8] = b"id";
const ORIGIN: &[u8] = b"origin";
const CLEAN: &[u8] = b"clean";
const CLOCK: &[u8] = b"clock";
const SEQ: &[u8] = b"seq";
const BIRTH: &[u8] = b"birth";
const FENCE: &[u8] = b"fence";
const CLEANED: &[u8] = b"cleaned";
const TRIMMED: &[u8] = b"trimmed";
const HORIZON: &[u8] = b"horizon";
const SERVED: &[u8] = b"served";
const POSITION: &[u8] = b"position/";

/// Whose change was fenced, and the last seq before the fence.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Fence {
    /// The `switch_version` of the change.
    pub version: u64,
    /// Everything that the replica accepted under the old view has a seq up to this.
    pub seq: u64,
}

/// All of `meta`, as read when a replica is opened.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Meta {
    /// The replica's id.
    pub id: u64,
    /// Who takes writes here in this life.
    pub origin: u64,
    /// The last stop was clean: `clock` and `seq` are exact, not ceilings.
    pub clean: bool,
    /// A stamp time that no stamp given or stored here exceeds.
    pub clock: u64,
    /// A seq that no change here exceeds.
    pub seq: u64,
    /// The epoch, the birth seq and where all that stood before it came from. None: not born.
    pub birth: Option<SnapshotRequired>,
    /// The last fence.
    pub fence: Fence,
    /// The `switch_version` of the last change whose foreign keys are gone.
    pub cleaned: u64,
    /// Lines of `changes` up to this seq are gone.
    pub trimmed: u64,
    /// Stamp time up to which tombstones may have been collected here, or where it was copied from.
    pub horizon: u64,
    /// It has stood in a `current` view.
    pub served: bool,
    /// How far it has applied its peers' changes.
    pub positions: Vec<Position>,
}

fn number(rows: &[MetaRow], key: &[u8]) -> u64 {
    rows.iter()
        .find(|(k, _)| k == key)
        .and_then(|(_, v)| <[u8; 8]>::try_from(v.as_slice()).ok())
        .map_or(0, u64::from_be_bytes)
}

/// Reads all of `meta`.
pub fn read(engine: &Engine) -> Result<Meta, Error> {
    let rows = engine.metas(b"")?;
    let bytes = |key: &[u8]| rows.iter().find(|(k, _)| k == key).map(|(_, v)| v.as_slice());
    let fence = bytes(FENCE).unwrap_or_default();
    Ok(Meta {
        id: number(&rows, ID),
        origin: number(&rows, ORIGIN),
        clean: bytes(CLEAN).is_some(),
        clock: number(&rows, CLOCK),
        seq: number(&rows, SEQ),
        birth: bytes(BIRTH).and_then(|b| SnapshotRequired::decode(b).ok()),
        fence: match fence.split_first_chunk::<8>() {
            Some((version, seq)) => Fence {
                version: u64::from_be_bytes(*version),
                seq: <[u8; 8]>::try_from(seq).map_or(0, u64::from_be_bytes),
            },
            None => Fence::default(),
        },
        cleaned: number(&rows, CLEANED),
        trimmed: number(&rows, TRIMMED),
        horizon: number(&rows, HORIZON),
        served: bytes(SERVED).is_some(),
        positions: to_positions(engine.metas(POSITION)?),
    })
}

/// The positions at a pinned instant.
pub fn positions_at(pin: &Pin<'_>) -> Result<Vec<Position>, Error> {
    Ok(to_positions(pin.metas(POSITION)?))
}

fn to_positions(rows: Vec<MetaRow>) -> Vec<Position> {
    rows.into_iter().filter_map(|(_, v)| Position::decode(v.as_slice()).ok()).collect()
}

/// What is put into `meta`, each with the records it belongs to.
impl Batch {
    /// A replica's id; once.
    pub fn put_id(&mut self, id: u64) {
        self.put_meta(ID, &id.to_be_bytes());
    }

    /// A new life: who takes writes from here on.
    pub fn put_origin(&mut self, origin: u64) {
        self.put_meta(ORIGIN, &origin.to_be_bytes());
    }

    /// Ceilings of clock and seq (or, with the clean mark, their exact values).
    pub fn put_ceilings(&mut self, clock: u64, seq: u64) {
        self.put_meta(CLOCK, &clock.to_be_bytes());
        self.put_meta(SEQ, &seq.to_be_bytes());
    }

    /// The last stop was clean.
    pub fn put_clean(&mut self, clean: bool) {
        if clean {
            self.put_meta(CLEAN, b"1");
        } else {
            self.delete_meta(CLEAN);
        }
    }

    /// The replica is born.
    pub fn put_birth(&mut self, birth: &SnapshotRequired) {
        self.put_meta(BIRTH, &birth.encode_to_vec());
    }

    /// A fence has passed.
    pub fn put_fence(&mut self, fence: Fence) {
        let mut row = [0; 16];
        row[..8].copy_from_slice(&fence.version.to_be_bytes());
        row[8..].copy_from_slice(&fence.seq.to_be_bytes());
        self.put_meta(FENCE, &row);
    }

    /// Foreign keys of this change are gone.
    pub fn put_cleaned(&mut self, version: u64) {
        self.put_meta(CLEANED, &version.to_be_bytes());
    }

    /// Lines up to this seq are gone.
    pub fn put_trimmed(&mut self, seq: u64) {
        self.put_meta(TRIMMED, &seq.to_be_bytes());
    }

    /// Tombstones up to this stamp time may be collected from here on.
    pub fn put_horizon(&mut self, time: u64) {
        self.put_meta(HORIZON, &time.to_be_bytes());
    }

    /// It stands in a `current` view.
    pub fn put_served(&mut self) {
        self.put_meta(SERVED, b"1");
    }

    /// How far a peer's changes are applied.
    pub fn put_position(&mut self, position: &Position) {
        self.put_meta(&position_key(position.replica), &position.encode_to_vec());
    }

    /// A peer's changes count as never applied.
    pub fn delete_position(&mut self, replica: u64) {
        self.delete_meta(&position_key(replica));
    }

    /// Makes a copy of another replica's files this replica's own: its id, and nothing of the other's life.
    pub fn forget_life(&mut self) {
        for key in [CLEAN, FENCE, CLEANED, TRIMMED, SERVED, BIRTH] {
            self.delete_meta(key);
        }
    }
}

fn position_key(replica: u64) -> Vec<u8> {
    [POSITION, &replica.to_be_bytes()].concat()
}
