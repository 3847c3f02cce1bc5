//! What probes, Prometheus and people ask of a server, over plain HTTP: whether it works (`/livez`), whether it is
//! ready (`/readyz`), what it does (`/metrics`); of an operator also how all is (`/`, the console).
//!
//! Everything is bounded: 64 connections at once, each for one request and for
//! ten seconds at most, so that nobody who is slow or unkind holds it up for long.

use std::io::{self, ErrorKind, IoSlice};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use axum::Router;
use axum::extract::State;
use axum::http::header::{CONNECTION, CONTENT_SECURITY_POLICY, CONTENT_TYPE};
use axum::http::{HeaderValue, Method, StatusCode, Uri};
use axum::response::{IntoResponse, Response};
use axum::serve::Listener;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::Sleep;
use tokio_util::sync::CancellationToken;
use vasto_operator::console::{self, Console};

use crate::probe;

/// Connections at once; more wait in the listener's backlog.
const CONNECTIONS: usize = 64;
/// How long a connection lasts at most.
const LASTS: Duration = Duration::from_secs(10);
const TEXT: &str = "text/plain; charset=utf-8";
const JSON: &str = "application/json";
const OPEN_METRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// The server that is asked about.
pub(crate) trait Source: Send + Sync + 'static {
    /// Whether it serves what it is there for; if not, why.
    fn ready(&self) -> Result<(), String>;
    /// All metrics as OpenMetrics text, if it has any. May block for a moment.
    fn metrics(&self) -> Option<String>;
    /// What people may look at, if it is an operator.
    fn console(&self) -> Option<&Console> {
        None
    }
}

/// Answers until `stop`.
pub(crate) async fn serve(listener: TcpListener, source: Arc<dyn Source>, stop: CancellationToken) {
    serve_for(LASTS, listener, source, stop).await;
}

async fn serve_for(lasts: Duration, listener: TcpListener, source: Arc<dyn Source>, stop: CancellationToken) {
    // Operators listen on the same port, each in a pod of its own.
    let port = listener.local_addr().map_or(0, |address| address.port());
    let listener = Bounded { listener, room: Arc::new(Semaphore::new(CONNECTIONS)), lasts };
    let routes = Router::new().fallback(answer).with_state((source, port));
    tokio::select! {
        _ = axum::serve(listener, routes) => {}
        () = stop.cancelled() => {}
    }
}

async fn answer(State((source, port)): State<(Arc<dyn Source>, u16)>, method: Method, uri: Uri) -> Response {
    if method != Method::GET && method != Method::HEAD {
        return text(StatusCode::METHOD_NOT_ALLOWED, format!("{method} is not served here: use GET"));
    }
    match uri.path() {
        "/livez" => text(StatusCode::OK, "ok"),
        "/readyz" => match source.ready() {
            Ok(()) => text(StatusCode::OK, "ok"),
            Err(why) => text(StatusCode::SERVICE_UNAVAILABLE, why),
        },
        "/metrics" => match tokio::task::spawn_blocking(move || source.metrics()).await {
            Ok(Some(metrics)) => respond(StatusCode::OK, OPEN_METRICS, metrics),
            Ok(None) => text(StatusCode::NOT_FOUND, "there are no metrics here: each store process has its own"),
            Err(error) => text(StatusCode::INTERNAL_SERVER_ERROR, format!("the metrics can't be told: {error}")),
        },
        "/" if source.console().is_some() => page(),
        "/console.json" if source.console().is_some() => state(&*source, uri.query(), port).await,
        path => {
            let also = if source.console().is_some() { ", or / for the console" } else { "" };
            text(StatusCode::NOT_FOUND, format!("{path} is not served here: ask for /livez, /readyz or /metrics{also}"))
        }
    }
}

/// The console. It may load nothing, and may speak to this server alone.
fn page() -> Response {
    let mut response = respond(StatusCode::OK, "text/html; charset=utf-8", console::PAGE.to_owned());
    let policy = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; \
                  img-src data:; frame-ancestors 'none'; base-uri 'none'; form-action 'none'";
    response.headers_mut().insert(CONTENT_SECURITY_POLICY, HeaderValue::from_static(policy));
    response
}

/// What the console draws: of the leader, if that is another operator and can be reached.
async fn state(source: &dyn Source, query: Option<&str>, port: u16) -> Response {
    let Some(console) = source.console() else { return StatusCode::NOT_FOUND.into_response() };
    // Asked by another operator, this one answers for itself: two that take each other for the leader end there.
    if let (Some(Some(leader)), None) = (console.leader_elsewhere(), query)
        && let Some((host, _)) = leader.rsplit_once(':')
        && let Ok(answer) = probe::fetch(host, port, "/console.json?here").await
    {
        return respond(StatusCode::OK, JSON, answer);
    }
    match console.state() {
        Some(state) => respond(StatusCode::OK, JSON, state.to_string()),
        None => text(StatusCode::SERVICE_UNAVAILABLE, "the operator has not begun yet"),
    }
}

/// A line.
fn text(status: StatusCode, line: impl Into<String>) -> Response {
    respond(status, TEXT, line.into() + "\n")
}

fn respond(status: StatusCode, content_type: &'static str, body: String) -> Response {
    (status, [(CONTENT_TYPE, content_type), (CONNECTION, "close")], body).into_response()
}

/// Accepts no more connections than there is room for.
struct Bounded {
    listener: TcpListener,
    room: Arc<Semaphore>,
    lasts: Duration,
}

impl Listener for Bounded {
    type Io = Brief;
    type Addr = std::net::SocketAddr;

    async fn accept(&mut self) -> (Brief, Self::Addr) {
        // It is never closed.
        let place = self.room.clone().acquire_owned().await.ok();
        let (stream, address) = Listener::accept(&mut self.listener).await;
        (Brief { stream, end: Box::pin(tokio::time::sleep(self.lasts)), _place: place }, address)
    }

    fn local_addr(&self) -> io::Result<Self::Addr> {
        self.listener.local_addr()
    }
}

/// A connection that fails when its time is over.
struct Brief {
    stream: TcpStream,
    end: Pin<Box<Sleep>>,
    _place: Option<OwnedSemaphorePermit>,
}

impl Brief {
    fn over(&mut self, cx: &mut Context<'_>) -> Poll<io::Error> {
        ready!(self.end.as_mut().poll(cx));
        Poll::Ready(io::Error::new(ErrorKind::TimedOut, "the connection has lasted long enough"))
    }
}

impl AsyncRead for Brief {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match self.over(cx) {
            Poll::Ready(error) => Poll::Ready(Err(error)),
            Poll::Pending => Pin::new(&mut self.stream).poll_read(cx, buffer),
        }
    }
}

impl AsyncWrite for Brief {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        match self.over(cx) {
            Poll::Ready(error) => Poll::Ready(Err(error)),
            Poll::Pending => Pin::new(&mut self.stream).poll_write(cx, bytes),
        }
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        match self.over(cx) {
            Poll::Ready(error) => Poll::Ready(Err(error)),
            Poll::Pending => Pin::new(&mut self.stream).poll_write_vectored(cx, bytes),
        }
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    struct Fixed(Result<(), String>);

    impl Source for Fixed {
        fn ready(&self) -> Result<(), String> {
            self.0.clone()
        }
        fn metrics(&self) -> Option<String> {
            Some("# EOF\n".into())
        }
    }

    async fn start(lasts: Duration, ready: Result<(), String>) -> std::net::SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(serve_for(lasts, listener, Arc::new(Fixed(ready)), CancellationToken::new()));
        address
    }

    async fn ask(address: std::net::SocketAddr, request: &str) -> String {
        let mut stream = TcpStream::connect(address).await.unwrap();
        stream.write_all(format!("{request} HTTP/1.1\r\nHost: x\r\n\r\n").as_bytes()).await.unwrap();
        let mut answer = String::new();
        // To the end: the server closes after one answer.
        let reading = stream.read_to_string(&mut answer);
        tokio::time::timeout(Duration::from_secs(5), reading).await.expect("it closes").unwrap();
        answer
    }

    #[tokio::test]
    async fn each_path_answers_as_it_should() {
        let well = start(LASTS, Ok(())).await;
        let ill = start(LASTS, Err("shard 2 is being built".into())).await;
        for (address, request, status, words) in [
            (well, "GET /livez", "200", "ok"),
            (ill, "GET /livez", "200", "ok"),
            (well, "GET /readyz", "200", "ok"),
            (ill, "GET /readyz", "503", "shard 2 is being built"),
            (well, "GET /metrics", "200", "# EOF"),
            (well, "GET /metrics", "200", "application/openmetrics-text; version=1.0.0"),
            (well, "GET /", "404", "ask for /livez, /readyz or /metrics"),
            (well, "POST /livez", "405", "use GET"),
        ] {
            let answer = ask(address, request).await;
            assert!(answer.starts_with(&format!("HTTP/1.1 {status} ")), "{request}: {answer}");
            assert!(answer.contains(words), "{request}: {answer}");
        }
    }

    #[tokio::test]
    async fn those_who_say_nothing_are_sent_away_and_others_get_their_turn() {
        let address = start(Duration::from_millis(200), Ok(())).await;
        let mut silent = Vec::new();
        for _ in 0..CONNECTIONS {
            silent.push(TcpStream::connect(address).await.unwrap());
        }
        let asked = tokio::time::Instant::now();
        assert!(ask(address, "GET /livez").await.contains("200"));
        assert!(asked.elapsed() > Duration::from_millis(100), "there was no room before");
        for stream in &mut silent {
            assert_eq!(stream.read(&mut [0]).await.unwrap_or(0), 0);
        }
    }
}
