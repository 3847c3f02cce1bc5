//! Batches of which not more is read at once than an answer may have.

use bytes::Bytes;
use vasto_client::{Error, Keyspace, Op, Outcome};

/// Bytes of values that one read is meant to bring.
const VALUES: usize = 8 << 20;
/// Values that are read together, as long as nothing is known of their size. Each may have 8 MiB.
pub(crate) const FIRST_READS: usize = 16;
/// However small the last ones were: the next may all be large.
const MOST_READS: usize = 128;

/// Carries out operations in their order. Once the answers have more than `most` bytes of values, no more is read:
/// each further read fails, and all else is done. `reads`: how many go together, which is learnt on the way.
pub(crate) async fn carry_out(
    keyspace: &Keyspace,
    mut ops: Vec<Op>,
    most: usize,
    reads: &mut usize,
) -> Vec<Result<Outcome, Error>> {
    let mut outcomes = Vec::with_capacity(ops.len());
    let mut bytes = 0;
    while !ops.is_empty() {
        let rest = ops.split_off(ops.len().min((*reads).max(1)));
        let turn = std::mem::replace(&mut ops, rest);
        if bytes <= most {
            let answered = keyspace.batch(turn).await;
            let found = answered.iter().map(size).sum::<usize>();
            bytes += found;
            *reads = (VALUES / (found / answered.len().max(1)).max(1)).clamp(1, MOST_READS);
            outcomes.extend(answered);
            continue;
        }
        let done: Vec<bool> = turn.iter().map(|op| !op.is_read()).collect();
        let mut answered = keyspace.batch(turn.into_iter().filter(|op| !op.is_read())).await.into_iter();
        outcomes.extend(done.into_iter().map(|done| {
            let too_much = || {
                Err(Error::Invalid(format!(
                    "the answer has more than {} MiB: ask for fewer keys at a time",
                    most >> 20
                )))
            };
            answered.by_ref().take(usize::from(done)).next().unwrap_or_else(too_much)
        }));
    }
    outcomes
}

/// Bytes of a value that came.
fn size(outcome: &Result<Outcome, Error>) -> usize {
    match outcome {
        Ok(Outcome::Found(value) | Outcome::Returned(_, Some(value))) => value.bytes().map_or(8, Bytes::len),
        _ => 0,
    }
}
