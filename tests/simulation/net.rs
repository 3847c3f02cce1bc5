//! The simulated network and clocks, as a part of Vasto sees them.

use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};
use std::time::Duration;

use futures::Stream;
use hyper_util::rt::TokioIo;
use rand::{Rng, RngExt, SeedableRng, rngs::StdRng};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tonic::transport::Endpoint;
use tonic::transport::server::Connected;
use turmoil::net::{TcpListener, TcpStream};
use vasto_client::Env;
use vasto_client::env::Delivery;

/// Unix ms at the beginning: 2026-01-01.
pub const EPOCH_MS: u64 = 1_767_225_600_000;

/// Virtual time since the beginning.
pub fn elapsed() -> Duration {
    turmoil::sim_elapsed().unwrap_or_default()
}

/// A machine's own clock and disk, which may go wrong.
#[derive(Debug, Default)]
pub struct Quirks {
    /// How far its clock is ahead, ms; negative: behind.
    pub skew_ms: i64,
    /// A piece of work on its disk takes up to so many ms.
    pub slow_ms: u64,
    /// Messages of streams from other stores come twice, behind the next one or not at all, one in so many; 0: none does.
    pub unruly: u32,
}

/// What a process on this machine takes from the world.
pub fn env(seed: u64, quirks: Arc<Mutex<Quirks>>) -> Env {
    let random = Arc::new(Mutex::new(StdRng::seed_from_u64(seed)));
    let (clock, disk, streams) = (quirks.clone(), quirks.clone(), quirks);
    let (chance, luck) = (random.clone(), random.clone());
    let now = move || {
        let skew = clock.lock().unwrap().skew_ms;
        (EPOCH_MS + elapsed().as_millis() as u64).saturating_add_signed(skew)
    };
    let dial = |endpoint: Endpoint| endpoint.connect_with_connector_lazy(tower::service_fn(connect));
    let pace = move || {
        let most = disk.lock().unwrap().slow_ms;
        Duration::from_millis(if most == 0 { 0 } else { chance.lock().unwrap().random_range(0..=most) })
    };
    let fate = move || {
        let one_in = streams.lock().unwrap().unruly;
        if one_in == 0 || !luck.lock().unwrap().random_ratio(1, one_in) {
            return Delivery::InTurn;
        }
        [Delivery::Twice, Delivery::Late, Delivery::Never][luck.lock().unwrap().random_range(0..3)]
    };
    Env::new(now, move || random.lock().unwrap().next_u64(), dial).on_one_thread(pace).unruly(fate)
}

async fn connect(uri: tonic::transport::Uri) -> io::Result<TokioIo<TcpStream>> {
    let host = uri.host().unwrap_or_default().to_owned();
    let stream = TcpStream::connect((host, uri.port_u16().unwrap_or_default())).await?;
    Ok(TokioIo::new(stream))
}

/// A connection that was accepted.
pub struct Connection(TcpStream);

/// Connections to this host's port.
pub async fn listen(port: u16) -> io::Result<impl Stream<Item = io::Result<Connection>> + Unpin> {
    let listener = TcpListener::bind(("0.0.0.0", port)).await?;
    let accepted = futures::stream::unfold(listener, |listener| async {
        let accepted = listener.accept().await.map(|(stream, _)| Connection(stream));
        Some((accepted, listener))
    });
    Ok(Box::pin(accepted))
}

impl AsyncRead for Connection {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_read(cx, buffer)
    }
}

impl AsyncWrite for Connection {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.0).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(cx)
    }
}

impl Connected for Connection {
    type ConnectInfo = ();

    fn connect_info(&self) {}
}
