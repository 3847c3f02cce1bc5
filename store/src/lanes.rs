//! Which thread serves a connection: one of those for clients, in turn; or, where it only moves data in bulk, one that
//! the system runs behind all others.

use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use futures::StreamExt;
use tokio::net::{TcpListener, TcpStream};
use tokio::runtime::Handle;
use tokio::sync::mpsc;
use tokio::task::{JoinError, JoinSet};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::transport::server::Router;
use vasto_client::accept::accept;
use vasto_client::env::BULK_WINDOW;
use vasto_client::threads::Threads;

use crate::cut_by;

/// Connections that wait for their thread, or to say what they are for.
const ACCEPTED: usize = 256;
/// Who has not said by then what a connection is for is served like a client.
const SAID_WITHIN: Duration = Duration::from_secs(1);
/// Between two looks at what has come of a connection's beginning.
const LOOK: Duration = Duration::from_millis(1);

/// What each HTTP/2 connection begins with; RFC 9113, section 3.4.
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
/// Bytes before what a frame holds; section 4.1.
const FRAME_HEAD: usize = 9;
/// A frame's type; section 6.5.
const SETTINGS: u8 = 4;
/// Bytes of a setting: two of its name, four of its value.
const SETTING: usize = 6;
/// Its name; section 6.5.2.
const INITIAL_WINDOW_SIZE: [u8; 2] = [0, 4];

/// Serves each connection on one of these threads, in turn, and those by which data moves in bulk on that one.
pub(crate) async fn serve(
    listener: TcpListener,
    threads: Threads,
    behind: &Handle,
    router: Router,
    cut: CancellationToken,
) -> Result<(), tonic::transport::Error> {
    let mut serving = JoinSet::new();
    let mut lane_on = |thread: &Handle| {
        let (lane, connections) = mpsc::channel(ACCEPTED);
        let connections = ReceiverStream::new(connections).map(TcpStream::from_std);
        serving.spawn_on(router.clone().serve_with_incoming(cut_by(connections, cut.clone())), thread);
        lane
    };
    let lanes: Arc<[mpsc::Sender<std::net::TcpStream>]> = threads.all().iter().map(&mut lane_on).collect();
    let bulk = lane_on(behind);
    let mut sorting = JoinSet::new();
    loop {
        let connection = tokio::select! {
            connection = accept(&listener) => connection,
            Some(_) = sorting.join_next() => continue,
            Some(ended) = serving.join_next() => return match ended.map_err(JoinError::try_into_panic) {
                Ok(ended) => ended,
                Err(Ok(panic)) => std::panic::resume_unwind(panic),
                // Its thread has ended: the process does.
                Err(Err(_)) => Ok(()),
            },
        };
        let (threads, lanes, bulk) = (threads.clone(), lanes.clone(), bulk.clone());
        // Many that say nothing keep nobody else from being served.
        let crowded = sorting.len() >= ACCEPTED;
        let sorted = async move {
            let lane = if !crowded && is_bulk(&connection).await { &bulk } else { &lanes[threads.turn()] };
            match connection.into_std() {
                // A thread that is this far behind is waited for; one that has ended is noticed above.
                Ok(connection) => _ = lane.send(connection).await,
                Err(error) => tracing::warn!(%error, "a connection can't be served"),
            }
        };
        if crowded {
            sorted.await;
        } else {
            sorting.spawn(sorted);
        }
    }
}

/// Whether a connection is there for data in bulk, by the window that its client announces first of all; see
/// `Env::dial_bulk`.
async fn is_bulk(connection: &TcpStream) -> bool {
    let window = async {
        // The settings of any client that is known take a third of it.
        let mut begin = [0; 256];
        loop {
            let seen = connection.peek(&mut begin).await.unwrap_or(0);
            match announced_window(&begin[..seen]) {
                Poll::Ready(window) => return window,
                Poll::Pending if seen == 0 || seen == begin.len() => return None,
                Poll::Pending => tokio::time::sleep(LOOK).await,
            }
        }
    };
    tokio::time::timeout(SAID_WITHIN, window).await == Ok(Some(BULK_WINDOW))
}

/// The stream window in a client's first settings; `Pending`: more has to come before that is known.
fn announced_window(begin: &[u8]) -> Poll<Option<u32>> {
    let Some(frame) = begin.strip_prefix(PREFACE) else {
        return if PREFACE.starts_with(begin) { Poll::Pending } else { Poll::Ready(None) };
    };
    let Some((head, rest)) = frame.split_at_checked(FRAME_HEAD) else { return Poll::Pending };
    if head[3] != SETTINGS {
        return Poll::Ready(None);
    }
    let length = u32::from_be_bytes([0, head[0], head[1], head[2]]) as usize;
    let settings = &rest[..rest.len().min(length)];
    let mut values = settings.chunks_exact(SETTING).filter_map(|setting| setting.strip_prefix(&INITIAL_WINDOW_SIZE));
    match values.next_back().and_then(|value| value.try_into().ok()) {
        None if rest.len() < length => Poll::Pending,
        value => Poll::Ready(value.map(u32::from_be_bytes)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::convert::Infallible;
    use std::future::{Ready, ready};
    use std::task::Context;
    use tokio::io::AsyncWriteExt;
    use tonic::Status;
    use tonic::body::Body;
    use tonic::codegen::{Service, http};
    use tonic::server::NamedService;
    use tonic::transport::Server;
    use vasto_client::Env;
    use vasto_client::v1::CompactRequest;
    use vasto_client::v1::store_client::StoreClient;

    fn begin(settings: &[(u16, u32)]) -> Vec<u8> {
        let length = (settings.len() * SETTING) as u32;
        let mut bytes = [PREFACE, &length.to_be_bytes()[1..], &[SETTINGS, 0, 0, 0, 0, 0]].concat();
        for (name, value) in settings {
            bytes.extend(name.to_be_bytes());
            bytes.extend(value.to_be_bytes());
        }
        bytes
    }

    #[test]
    fn a_window_is_known_as_soon_as_it_has_come() {
        let whole = begin(&[(2, 0), (4, 77), (3, 5)]);
        let known = whole.len() - SETTING;
        for seen in 0..known {
            assert_eq!(announced_window(&whole[..seen]), Poll::Pending, "{seen} bytes");
        }
        assert_eq!(announced_window(&whole[..known]), Poll::Ready(Some(77)));
        assert_eq!(announced_window(&whole), Poll::Ready(Some(77)));
        // What follows the settings is none.
        assert_eq!(announced_window(&[begin(&[(2, 0)]), vec![0, 4, 0, 0, 0, 9]].concat()), Poll::Ready(None));
        assert_eq!(announced_window(&begin(&[])), Poll::Ready(None));
        assert_eq!(announced_window(b"GET / HTTP/1.1"), Poll::Ready(None));
        assert_eq!(announced_window(&[PREFACE, &[0; FRAME_HEAD]].concat()), Poll::Ready(None));
    }

    /// Fails each call with the name of the thread that serves it.
    #[derive(Clone)]
    struct WhoServes;

    impl Service<http::Request<Body>> for WhoServes {
        type Response = http::Response<Body>;
        type Error = Infallible;
        type Future = Ready<Result<Self::Response, Infallible>>;

        fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
            Poll::Ready(Ok(()))
        }

        fn call(&mut self, _: http::Request<Body>) -> Self::Future {
            let name = std::thread::current().name().unwrap_or_default().to_owned();
            ready(Ok(Status::unavailable(name).into_http()))
        }
    }

    impl NamedService for WhoServes {
        const NAME: &'static str = "vasto.v1.Store";
    }

    #[tokio::test]
    async fn clients_are_served_in_turn_and_what_comes_in_bulk_behind_them() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let (env, threads, cut) = (Env::real(), Threads::start(2).unwrap(), CancellationToken::new());
        let (behind, router) = (env.background(), Server::builder().add_service(WhoServes));
        let ended = cut.clone();
        let serving = tokio::spawn(async move { serve(listener, threads, &behind, router, ended).await });
        // Silent ones hold up nobody.
        let _silent = [TcpStream::connect(&address).await.unwrap(), TcpStream::connect(&address).await.unwrap()];
        let mut names = Vec::new();
        for bulk in [false, true, false, true] {
            let channel = if bulk { env.dial_bulk(&address) } else { env.dial(&address) };
            let answer = StoreClient::new(channel.unwrap()).compact(CompactRequest::default()).await;
            names.push(answer.unwrap_err().message().to_owned());
        }
        let served: Vec<&str> = names.iter().map(|name| name.split('-').next().unwrap_or_default()).collect();
        assert_eq!(served, ["serve", "behind", "serve", "behind"], "{names:?}");
        cut.cancel();
        serving.abort();
    }

    #[tokio::test]
    async fn what_comes_in_bulk_is_told_from_all_else() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let env = Env::real();
        let mut found = Vec::new();
        for channel in [env.dial(&address).unwrap(), env.dial_bulk(&address).unwrap()] {
            let asking =
                tokio::spawn(async move { StoreClient::new(channel).compact(CompactRequest::default()).await.is_ok() });
            found.push(is_bulk(&accept(&listener).await).await);
            assert!(!asking.await.unwrap());
        }
        assert_eq!(found, [false, true]);
        // Whoever says something else, or nothing.
        for said in [&b"PING"[..], b""] {
            let mut stream = TcpStream::connect(&address).await.unwrap();
            stream.write_all(said).await.unwrap();
            stream.shutdown().await.unwrap();
            assert!(!is_bulk(&accept(&listener).await).await);
        }
    }
}
