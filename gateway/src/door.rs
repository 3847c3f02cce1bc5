//! How connections come in, the same for all sides: no more than there is room for, and counted until they end.

use std::sync::Arc;

use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use vasto_client::accept::accept;

use crate::Gateway;
use crate::metrics::Protocol;

/// Connections at once, of each side.
pub(crate) const CONNECTIONS: usize = 20_000;

/// The way in for one protocol.
pub(crate) struct Door {
    protocol: Protocol,
    room: Arc<Semaphore>,
}

/// A connection's place, which it gives back when it ends.
pub(crate) struct Place {
    gateway: Arc<Gateway>,
    protocol: Protocol,
    _room: OwnedSemaphorePermit,
}

impl Drop for Place {
    fn drop(&mut self) {
        self.gateway.counts.of(self.protocol).connections.dec();
    }
}

impl Door {
    pub(crate) fn new(protocol: Protocol) -> Self {
        Self { protocol, room: Arc::new(Semaphore::new(CONNECTIONS)) }
    }

    /// The next connection that there is room for; the others hear `full`. May be cancelled at any time.
    pub(crate) async fn next(&self, gateway: &Arc<Gateway>, listener: &TcpListener, full: &[u8]) -> (TcpStream, Place) {
        let traffic = gateway.counts.of(self.protocol);
        loop {
            let stream = accept(listener).await;
            let Ok(room) = self.room.clone().try_acquire_owned() else {
                traffic.turned_away.inc();
                // It fits into the socket's own buffer, or is not worth a wait.
                let _ = stream.try_write(full);
                continue;
            };
            traffic.connections.inc();
            return (stream, Place { gateway: gateway.clone(), protocol: self.protocol, _room: room });
        }
    }
}
