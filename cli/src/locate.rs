//! `vasto locate`: where a key lives, by the same rules as clients and stores.

use clap::Args;
use serde_json::json;

use crate::context::Context;
use crate::data::KeyArg;
use crate::output::{emit, emit_json, table};

/// Arguments of `vasto locate`.
#[derive(Args, Debug)]
pub(crate) struct Locate {
    /// The keyspace's name.
    keyspace: String,
    #[command(flatten)]
    key: KeyArg,
}

pub(crate) async fn run(context: &Context, args: Locate) -> anyhow::Result<()> {
    let (key, partition_key) = args.key.bytes()?;
    let keyspace = context.keyspace(&args.keyspace).await?;
    let found = keyspace.locate(partition_key.as_ref().unwrap_or(&key))?;
    if context.json() {
        return emit_json(&json!({
            "hash": format!("{:016x}", found.hash),
            "shard": found.shard,
            "shards": found.shards,
            "replicas": found.stores.iter().map(|s| json!({
                "store": s.store,
                "address": s.address,
                "replica": format!("{:016x}", s.replica),
                "serving": s.serving,
            })).collect::<Vec<_>>(),
        }));
    }
    let mut text = format!("hash   {:016x}\nshard  {} of {}\n", found.hash, found.shard, found.shards);
    text += &table(
        &["STORE", "ADDRESS", "REPLICA", "SERVING"],
        found.stores.into_iter().map(|s| {
            let replica = if s.replica == 0 { "vacant".to_string() } else { format!("{:016x}", s.replica) };
            let serving = if s.serving { "yes" } else { "no" };
            [s.store, s.address.unwrap_or_else(|| "-".into()), replica, serving.to_string()]
        }),
    );
    emit(text)
}
