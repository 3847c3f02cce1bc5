//! The client library of Vasto, and what every part shares of the wire: the
//! generated protocol, jump hash, and the rules that a topology implies.
//! Nothing here knows how a store keeps records or how the operator plans.
//!
//! A keyspace is as simple to use as a map:
//!
//! ```no_run
//! # async fn example() -> Result<(), vasto_client::Error> {
//! use vasto_client::{Client, Op, ScanOptions};
//!
//! let client = Client::connect("127.0.0.1:8278")?;
//! let map = client.keyspace("packages").await?;
//!
//! map.put("bash", "the shell").await?;
//! map.add("visits", 1.0).await?;
//! assert!(map.get("bash").await?.is_some());
//! map.delete("bash").await?;
//!
//! let answers = map.batch([Op::put("a", "1"), Op::get("visits")]).await;
//! assert_eq!(answers.len(), 2);
//!
//! let mut scan = map.scan(ScanOptions::new().prefix("lib"));
//! while let Some(entry) = scan.next().await {
//!     println!("{:?}", entry?.key);
//! }
//! # Ok(())
//! # }
//! ```

pub mod accept;
mod background;
mod client;
pub mod env;
mod error;
pub mod hash;
mod inspect;
mod keyspace;
mod op;
mod pipe;
mod pool;
mod route;
mod scan;
mod session;
pub mod threads;
pub mod topology;
mod value;
mod watch;

pub use client::Client;
pub use env::Env;
pub use error::{Code, Error};
pub use inspect::{Compacted, Inspection, Located, LocatedStore};
pub use keyspace::Keyspace;
pub use op::{MAX_KEY, MAX_VALUE, Merge, Op, Options, Outcome, PutOptions, Returning};
pub use scan::{Scan, ScanOptions};
pub use value::{Data, Entry, Stamp, Value};

/// The wire, generated from `client/proto`.
#[allow(missing_docs, clippy::large_enum_variant, clippy::doc_markdown)]
pub mod v1 {
    tonic::include_proto!("vasto.v1");
}
