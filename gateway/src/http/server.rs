//! Connections of HTTP clients, and the bounds on them.

use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::extract::{Request, State};
use axum::http::StatusCode;
use axum::http::header::CONTENT_LENGTH;
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use http_body_util::BodyExt;
use hyper::body::Body as _;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::net::TcpListener;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_io_timeout::TimeoutStream;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::{Problem, answer};
use crate::Gateway;
use crate::door::Door;
use crate::metrics::Protocol;

/// Requests at once, whose answers have not been taken whole.
const REQUESTS: usize = 1_024;
/// All bodies that have not come whole share this many bytes, in units.
const ROOM: usize = (256 << 20) / UNIT;
pub(super) const UNIT: usize = 64 << 10;
/// Bytes of a request's head, and of what is read at once.
const HEAD: usize = 128 << 10;
/// How long the head of a request may take, and a client that doesn't take its answer.
const PATIENCE: Duration = Duration::from_secs(60);

/// What all connections share.
pub(crate) struct Shared {
    door: Door,
    requests: Arc<Semaphore>,
    room: Arc<Semaphore>,
}

impl Shared {
    pub(crate) fn new() -> Self {
        Self {
            door: Door::new(Protocol::Http),
            requests: Arc::new(Semaphore::new(REQUESTS)),
            room: Arc::new(Semaphore::new(ROOM)),
        }
    }

    /// Room for a body of so many bytes, if there is.
    pub(super) fn room(&self, bytes: usize) -> Option<OwnedSemaphorePermit> {
        let units = u32::try_from(bytes.div_ceil(UNIT)).unwrap_or(u32::MAX);
        self.room.clone().try_acquire_many_owned(units).ok()
    }
}

/// Serves until `stop`.
pub(crate) async fn serve(gateway: Arc<Gateway>, listener: TcpListener, stop: CancellationToken) {
    let routes = Router::new()
        .fallback(answer)
        .layer(middleware::from_fn_with_state(gateway.clone(), bounded))
        .with_state(gateway.clone());
    let tasks = TaskTracker::new();
    loop {
        let full = b"HTTP/1.1 503 Service Unavailable\r\nconnection: close\r\ncontent-length: 0\r\n\r\n";
        let (stream, place) = tokio::select! {
            next = gateway.http.door.next(&gateway, &listener, full) => next,
            () = stop.cancelled() => break,
        };
        let mut stream = TimeoutStream::new(stream);
        stream.set_write_timeout(Some(PATIENCE));
        let (routes, stop) = (routes.clone(), stop.clone());
        tasks.spawn(async move {
            let _place = place;
            let connection = http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(PATIENCE)
                .max_buf_size(HEAD)
                .serve_connection(TokioIo::new(Box::pin(stream)), TowerToHyperService::new(routes));
            let mut connection = std::pin::pin!(connection);
            let ended = tokio::select! {
                ended = connection.as_mut() => ended,
                () = stop.cancelled() => {
                    connection.as_mut().graceful_shutdown();
                    connection.await
                }
            };
            if let Err(error) = ended {
                tracing::debug!(%error, "a connection ended");
            }
        });
    }
    tasks.close();
    tasks.wait().await;
}

/// Refuses at once what there is no room for; a request has its place until its answer has been taken.
async fn bounded(State(gateway): State<Arc<Gateway>>, request: Request, next: Next) -> Response {
    // Whoever looks after the gateway is not held up by those it serves.
    if ["/livez", "/healthz", "/readyz", "/metrics"].contains(&request.uri().path()) {
        return next.run(request).await;
    }
    let Ok(place) = gateway.http.requests.clone().try_acquire_owned() else {
        let words = format!("{REQUESTS} requests are being worked on: try again");
        return Problem::new(StatusCode::SERVICE_UNAVAILABLE, "OVERLOADED", words).into_response();
    };
    let (mut parts, body) = next.run(request).await.into_parts();
    // Held bodies don't tell their length themselves.
    if let Some(length) = body.size_hint().exact()
        && ![StatusCode::NO_CONTENT, StatusCode::NOT_MODIFIED].contains(&parts.status)
    {
        parts.headers.entry(CONTENT_LENGTH).or_insert(length.into());
    }
    let body = body.map_frame(move |frame| {
        let _held = &place;
        frame
    });
    Response::from_parts(parts, Body::new(body))
}
