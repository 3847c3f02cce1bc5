//! Between the operator and the API server: counts what is written, and strikes at a
//! chosen write; cuts and holds up watches.

use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};

use axum::body::Body;
use futures::StreamExt;
use kube::client::{Body as Sent, DynBody};
use serde_json::Value;
use tokio::sync::watch;
use tonic::codegen::http::{Method, Request, Response, StatusCode};
use tower::{BoxError, Layer, Service};

/// What happens at a write.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Strike {
    /// Nothing.
    #[default]
    Never,
    /// The operator dies before this write is sent.
    Before(Moment),
    /// It dies after this one was done, before it learns that.
    After(Moment),
    /// Every second write finds that its object has changed meanwhile.
    Conflicts,
}

/// The n-th write (from 1 on) of a kind. Not the n-th of all: how often progress is written, time decides.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Moment {
    pub kind: String,
    pub n: usize,
}

/// One write.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Write {
    pub method: String,
    pub path: String,
    /// The body, if it is JSON.
    pub body: Value,
}

impl Write {
    /// Leases and events are everybody's.
    fn counts(&self) -> bool {
        !self.path.contains("/leases") && !self.path.contains("/events")
    }

    /// Whether it would change an object whatever it has become.
    fn is_blind(&self) -> bool {
        let says = |key: &str| self.body.pointer(&format!("/metadata/{key}")).is_some_and(Value::is_string);
        self.counts() && self.method == "PATCH" && !(says("uid") && says("resourceVersion"))
    }

    /// What it writes, whatever the namespace and the topology's version.
    pub fn kind(&self) -> String {
        let phase = self.body.pointer("/status/phase").and_then(Value::as_str).unwrap_or_default();
        let (_, object) = self.path.split_once("/namespaces/").unwrap_or_default();
        let (_, object) = object.split_once('/').unwrap_or_default();
        format!("{} {object} {phase}", self.method).trim_end().to_owned()
    }

    /// In one line.
    pub fn brief(&self) -> String {
        let phase = self.body.pointer("/status/phase").and_then(Value::as_str).unwrap_or_default();
        let version = self.body.pointer("/status/topologyVersion").map(ToString::to_string).unwrap_or_default();
        format!("{} {} {phase} {version}", self.method, self.path).trim_end().to_owned()
    }
}

#[derive(Default)]
struct State {
    strike: Strike,
    /// Writes but those of leases and events, since `reset`.
    writes: Vec<Write>,
    /// Deletes and changes that hit whatever has the name.
    careless: Vec<Write>,
    /// Requests that were refused for want of rights.
    forbidden: Vec<String>,
    /// When it struck dead.
    struck: Option<Moment>,
    dead: bool,
}

struct Inner {
    state: Mutex<State>,
    died: watch::Sender<bool>,
    /// Rises when all watches are cut.
    cuts: watch::Sender<u64>,
    /// While true nothing comes from a watch.
    held: watch::Sender<bool>,
}

/// See the module. All clones are one.
#[derive(Clone)]
pub struct Tap(Arc<Inner>);

impl Tap {
    pub fn new(strike: Strike) -> Self {
        let state = Mutex::new(State { strike, ..State::default() });
        let (died, cuts, held) = (watch::Sender::new(false), watch::Sender::new(0), watch::Sender::new(false));
        Self(Arc::new(Inner { state, died, cuts, held }))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Counts from here on, and strikes like this.
    pub fn reset(&self, strike: Strike) {
        let mut state = self.state();
        state.writes.clear();
        state.strike = strike;
    }

    /// Writes since the last reset.
    pub fn writes(&self) -> Vec<Write> {
        self.state().writes.clone()
    }

    /// Panics if the operator did what it must never do.
    pub fn clean(&self) {
        let state = self.state();
        assert!(
            state.careless.is_empty(),
            "writes that name no uid of what they were decided on: {:#?}",
            state.careless
        );
        assert!(state.forbidden.is_empty(), "rights that the operator has not: {:#?}", state.forbidden);
    }

    /// Returns once it has struck dead.
    pub async fn died(&self) {
        let mut died = self.0.died.subscribe();
        let _ = died.wait_for(|died| *died).await;
    }

    /// When it struck dead, if it did.
    pub fn struck(&self) -> Option<Moment> {
        self.state().struck.clone()
    }

    pub fn is_dead(&self) -> bool {
        self.state().dead
    }

    /// Ends all watch streams.
    pub fn cut_watches(&self) {
        self.0.cuts.send_modify(|cuts| *cuts += 1);
    }

    /// While held, watches bring nothing: caches are stale.
    pub fn hold_watches(&self, held: bool) {
        self.0.held.send_replace(held);
    }

    /// Nothing reaches the API server any more, whatever still runs.
    pub fn cut_off(&self) {
        self.state().dead = true;
        self.0.died.send_replace(true);
    }

    /// Takes note of a write. What is to become of it?
    fn note(&self, write: Write) -> Fate {
        let mut state = self.state();
        if !write.counts() {
            return Fate::Sent;
        }
        if write.method == "DELETE" && write.body.pointer("/preconditions/uid").is_none_or(Value::is_null) {
            state.careless.push(write.clone());
        }
        let kind = write.kind();
        state.writes.push(write);
        let n = state.writes.iter().filter(|other| other.kind() == kind).count();
        let (number, now) = (state.writes.len(), Moment { kind, n });
        let fate = match &state.strike {
            Strike::Before(moment) if *moment == now => Fate::DiesBefore,
            Strike::After(moment) if *moment == now => Fate::DiesAfter,
            Strike::Conflicts if number % 2 == 1 => Fate::Conflict,
            _ => Fate::Sent,
        };
        if matches!(fate, Fate::DiesBefore | Fate::DiesAfter) {
            state.struck = Some(now);
        }
        fate
    }
}

#[derive(PartialEq, Eq)]
enum Fate {
    Sent,
    DiesBefore,
    DiesAfter,
    Conflict,
}

impl<S> Layer<S> for Tap {
    type Service = Tapped<S>;
    fn layer(&self, inner: S) -> Tapped<S> {
        Tapped { tap: self.clone(), inner }
    }
}

/// The service with the tap before it.
pub struct Tapped<S> {
    tap: Tap,
    inner: S,
}

type Answer = Response<Body>;
type Answering = Pin<Box<dyn Future<Output = Result<Answer, BoxError>> + Send>>;

impl<S> Service<Request<Sent>> for Tapped<S>
where
    S: Service<Request<Sent>, Response = Response<Box<DynBody>>, Error = BoxError>,
    S::Future: Send + 'static,
{
    type Response = Answer;
    type Error = BoxError;
    type Future = Answering;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, request: Request<Sent>) -> Answering {
        let tap = self.tap.clone();
        if tap.is_dead() {
            return Box::pin(std::future::pending());
        }
        let query = request.uri().query().unwrap_or_default().to_owned();
        let (method, path) = (request.method().clone(), request.uri().path().to_owned());
        let reads = method == Method::GET || query.contains("dryRun=All");
        let asks = path.contains("/selfsubject");
        let mut blind = None;
        let fate = if reads || asks {
            Fate::Sent
        } else {
            let body = request.body().try_clone();
            let write = Write { method: method.to_string(), path: path.clone(), body: json(body) };
            blind = Some(write.clone()).filter(Write::is_blind);
            tap.note(write)
        };
        match fate {
            Fate::DiesBefore => {
                tap.cut_off();
                return Box::pin(std::future::pending());
            }
            Fate::Conflict => return Box::pin(async { Ok(conflict()) }),
            Fate::Sent | Fate::DiesAfter => {}
        }
        let watches = query.split('&').any(|pair| pair == "watch=true" || pair == "watch=1");
        let answer = self.inner.call(request);
        Box::pin(async move {
            let answer = answer.await;
            if fate == Fate::DiesAfter {
                tap.cut_off();
            }
            if tap.is_dead() {
                std::future::pending::<()>().await;
            }
            let answer = answer?.map(Body::new);
            // One that made the object had none to name.
            if let Some(write) = blind.filter(|_| answer.status() == StatusCode::OK) {
                tap.state().careless.push(write);
            }
            if answer.status() == StatusCode::FORBIDDEN {
                let (head, body) = answer.into_parts();
                let body = axum::body::to_bytes(body, 1 << 20).await?;
                // By a role, that is; admission says the same of what can't be.
                if String::from_utf8_lossy(&body).contains(" cannot ") {
                    tap.state().forbidden.push(format!("{method} {path}"));
                }
                return Ok(Response::from_parts(head, Body::from(body)));
            }
            if !watches {
                return Ok(answer);
            }
            Ok(answer.map(|body| watched(body, tap.0.cuts.subscribe(), tap.0.held.subscribe())))
        })
    }
}

/// A request's body is there at once.
fn json(body: Option<Sent>) -> Value {
    use futures::FutureExt;
    let bytes = body.and_then(|body| body.collect_bytes().now_or_never()).and_then(Result::ok);
    bytes.and_then(|bytes| serde_json::from_slice(&bytes).ok()).unwrap_or(Value::Null)
}

/// As the API server refuses a write whose resourceVersion is an old one.
fn conflict() -> Answer {
    let status = serde_json::json!({
        "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure", "reason": "Conflict", "code": 409,
        "message": "the object has been modified; please apply your changes to the latest version and try again",
    });
    let mut answer = Response::new(Body::from(status.to_string()));
    *answer.status_mut() = StatusCode::CONFLICT;
    answer
}

/// A watch's answer, which can be cut and held up.
fn watched(body: Body, mut cuts: watch::Receiver<u64>, held: watch::Receiver<bool>) -> Body {
    cuts.mark_unchanged();
    let cut = async move {
        if cuts.changed().await.is_err() {
            std::future::pending::<()>().await;
        }
    };
    let pieces = body.into_data_stream().take_until(Box::pin(cut));
    let late = futures::stream::unfold((pieces, held), |(mut pieces, mut held)| async move {
        let piece = pieces.next().await?;
        let _ = held.wait_for(|held| !*held).await;
        Some((piece, (pieces, held)))
    });
    Body::from_stream(late)
}
