//! How a hub is served: the settings of its server, the same for every driver.

use std::time::Duration;

use tonic::transport::Server;

/// A peer that is gone without a word loses its stream after these two. Nothing waits for that: a store counts as
/// away after [`super::SILENCE`]. More often would cost much with ten thousand watchers.
const KEEPALIVE: Duration = Duration::from_secs(10);
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(5);
/// What a peer may send on a stream before it is read; a connection has one stream, or two.
const STREAM_WINDOW: u32 = 64 << 10;
const CONNECTION_WINDOW: u32 = 256 << 10;

/// A server for [`super::OperatorService`].
pub fn server() -> Server {
    Server::builder()
        .http2_keepalive_interval(Some(KEEPALIVE))
        .http2_keepalive_timeout(Some(KEEPALIVE_TIMEOUT))
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
}
