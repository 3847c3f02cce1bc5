//! How servers take connections in, all of them alike.

use std::io;
use std::time::Duration;

use futures::{Stream, stream};
use tokio::net::{TcpListener, TcpStream};

/// After a connection that could not be accepted. Where files have run out, the next one can't be either.
const PAUSE: Duration = Duration::from_millis(100);

/// The next connection. What is sent on it leaves at once: a message is all that there is to send.
pub async fn accept(listener: &TcpListener) -> TcpStream {
    loop {
        match listener.accept().await {
            Ok((connection, _)) => {
                let _ = connection.set_nodelay(true);
                return connection;
            }
            Err(error) => {
                tracing::warn!(%error, "can't accept a connection; trying again");
                tokio::time::sleep(PAUSE).await;
            }
        }
    }
}

/// All connections that come to this listener, as a server takes them.
pub fn connections(listener: TcpListener) -> impl Stream<Item = io::Result<TcpStream>> + Send {
    stream::unfold(listener, |listener| async move { Some((Ok(accept(&listener).await), listener)) })
}
