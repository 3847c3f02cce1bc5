//! The map over HTTP: keys as paths, values as bodies; batches and scans as JSON. `openapi.yaml` beside this crate's
//! sources describes it, and is served.
//!
//! Bounded as Redis' side is: connections, requests at once, bytes of bodies that have not come whole, and the time
//! that a head, a body or the taking of an answer may need.

mod json;
mod server;

use std::sync::Arc;
use std::time::Duration;

use axum::body::{Body, to_bytes};
use axum::extract::{Request, State};
use axum::http::header::{
    ALLOW, CONTENT_LENGTH, CONTENT_TYPE, ETAG, HOST, IF_MATCH, IF_NONE_MATCH, IF_UNMODIFIED_SINCE, ORIGIN, RETRY_AFTER,
    X_CONTENT_TYPE_OPTIONS,
};
use axum::http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode};
use axum::response::{IntoResponse, Response};
use bytes::{Bytes, BytesMut};
use futures::StreamExt;
use tokio::time::{Instant, timeout};
use vasto_client::hash::partition_hash;
use vasto_client::{
    Code, Data, Error, Keyspace, MAX_VALUE, Merge, Op, Options, Outcome, Returning, ScanOptions, Stamp, Value,
};

use crate::metrics::Protocol;
use crate::{Gateway, number};
pub(crate) use server::{Shared, serve};

/// The most bytes of a batch.
const MAX_BATCH: usize = 16 << 20;
/// The most bytes of values in the answer to one.
const MAX_ANSWER: usize = 64 << 20;
/// Bytes of lines that are sent together.
const LINES: usize = 64 << 10;
/// How long a body may take to come.
const PATIENCE: Duration = Duration::from_secs(60);
const TEXT: &str = "text/plain; charset=utf-8";
const BYTES: &str = "application/octet-stream";
const JSON: &str = "application/json";
const JSON_LINES: &str = "application/x-ndjson";
const OPEN_METRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";
/// In a request: how long the value is to be kept. In an answer: how long it will be, in milliseconds.
static TTL: HeaderName = HeaderName::from_static("vasto-ttl");
static TTL_MS: HeaderName = HeaderName::from_static("vasto-ttl-ms");
/// `bytes` or `number`.
static TYPE: HeaderName = HeaderName::from_static("vasto-type");
const OPENAPI: &str = include_str!("../openapi.yaml");

/// Why a request is not done.
#[derive(Debug)]
struct Problem {
    status: StatusCode,
    code: &'static str,
    message: String,
    /// The methods that are served there.
    allowed: Option<&'static str>,
}

impl Problem {
    fn new(status: StatusCode, code: &'static str, message: impl Into<String>) -> Self {
        Self { status, code, message: message.into(), allowed: None }
    }

    fn invalid(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "INVALID", message)
    }
}

impl From<&Error> for Problem {
    fn from(error: &Error) -> Self {
        let (status, code) = match error.code() {
            Code::Missing => (StatusCode::NOT_FOUND, "NO_KEYSPACE"),
            Code::Invalid => (StatusCode::BAD_REQUEST, "INVALID"),
            Code::Mismatch => (StatusCode::CONFLICT, "MISMATCH"),
            Code::Overloaded => (StatusCode::SERVICE_UNAVAILABLE, "OVERLOADED"),
            Code::NoSpace => (StatusCode::INSUFFICIENT_STORAGE, "NO_SPACE"),
            // The client library may learn of more.
            Code::Unknown => (StatusCode::BAD_GATEWAY, "UNKNOWN"),
            Code::Unavailable => (StatusCode::SERVICE_UNAVAILABLE, "UNAVAILABLE"),
            Code::Deadline => (StatusCode::GATEWAY_TIMEOUT, "DEADLINE"),
        };
        Self::new(status, code, error.to_string())
    }
}

impl From<Error> for Problem {
    fn from(error: Error) -> Self {
        Self::from(&error)
    }
}

impl IntoResponse for Problem {
    fn into_response(self) -> Response {
        let body = serde_json::json!({ "error": json::Trouble { code: self.code, message: &self.message } });
        let mut response = respond(self.status, JSON, format!("{body}\n"));
        if self.status == StatusCode::SERVICE_UNAVAILABLE {
            response.headers_mut().insert(RETRY_AFTER, HeaderValue::from_static("1"));
        }
        if let Some(allowed) = self.allowed {
            response.headers_mut().insert(ALLOW, HeaderValue::from_static(allowed));
        }
        response
    }
}

fn respond(status: StatusCode, content_type: &'static str, body: impl Into<Body>) -> Response {
    let mut response = Response::new(body.into());
    *response.status_mut() = status;
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
    headers.insert(X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    response
}

/// Answers one request.
async fn answer(State(gateway): State<Arc<Gateway>>, request: Request) -> Response {
    let begun = Instant::now();
    let result = route(&gateway, request).await;
    let failed = usize::from(result.is_err());
    gateway.counts.of(Protocol::Http).answered(1, failed, begun.elapsed());
    result.unwrap_or_else(IntoResponse::into_response)
}

async fn route(gateway: &Arc<Gateway>, request: Request) -> Result<Response, Problem> {
    let path = request.uri().path().to_owned();
    if let Some(rest) = path.strip_prefix("/v1/") {
        of_no_other_site(request.method(), request.headers())?;
        return match rest.split_once('/') {
            None => {
                let keyspace = open(gateway, rest).await?;
                match *request.method() {
                    Method::GET => scan(&keyspace, request.uri().query()),
                    Method::POST => batch(gateway, &keyspace, request).await,
                    _ => Err(not_allowed("GET, POST")),
                }
            }
            Some((_, "")) => Err(Problem::invalid("the key is empty; it must have 1 to 32768 bytes")),
            Some((name, key)) => one(gateway, name, unescape(key).into(), request).await,
        };
    }
    if request.method() != Method::GET && request.method() != Method::HEAD {
        return Err(not_allowed("GET, HEAD"));
    }
    match path.as_str() {
        "/healthz" | "/livez" => Ok(respond(StatusCode::OK, TEXT, "ok\n")),
        "/readyz" => match gateway.ready().await {
            Ok(()) => Ok(respond(StatusCode::OK, TEXT, "ok\n")),
            Err(why) => Ok(respond(StatusCode::SERVICE_UNAVAILABLE, TEXT, format!("{why}\n"))),
        },
        "/metrics" => Ok(respond(StatusCode::OK, OPEN_METRICS, gateway.metrics())),
        "/openapi.yaml" => Ok(respond(StatusCode::OK, "application/yaml", OPENAPI)),
        "/" | "/v1" => Ok(respond(
            StatusCode::OK,
            TEXT,
            "This is a gateway of Vasto: GET, PUT, DELETE /v1/{keyspace}/{key}; /openapi.yaml says what else there is.\n",
        )),
        other => Err(Problem::new(
            StatusCode::NOT_FOUND,
            "NO_SUCH_PATH",
            format!(
                "{other:?} is not served here: keys are at /v1/{{keyspace}}/{{key}}, the description at /openapi.yaml"
            ),
        )),
    }
}

/// Refuses a change that another site's page asks a browser for.
fn of_no_other_site(method: &Method, headers: &HeaderMap) -> Result<(), Problem> {
    let text = |name| headers.get(name).map(|value: &HeaderValue| value.to_str().unwrap_or("?"));
    let (Some(origin), host) = (text(ORIGIN), text(HOST).unwrap_or_default()) else { return Ok(()) };
    let own = origin.split_once("://").is_some_and(|(_, rest)| rest == host);
    if own || [Method::GET, Method::HEAD].contains(method) {
        return Ok(());
    }
    let words = format!("the request comes from a page of {origin:?}: only reads may");
    Err(Problem::new(StatusCode::FORBIDDEN, "OTHER_SITE", words))
}

fn not_allowed(allowed: &'static str) -> Problem {
    let problem = Problem::new(StatusCode::METHOD_NOT_ALLOWED, "METHOD_NOT_ALLOWED", format!("use {allowed}"));
    Problem { allowed: Some(allowed), ..problem }
}

async fn open(gateway: &Gateway, name: &str) -> Result<Keyspace, Problem> {
    let name = String::from_utf8(unescape(name))
        .map_err(|_| Problem::invalid("the keyspace's name is no text; it has letters, digits and '-'"))?;
    Ok(gateway.maps.open(&name).await?)
}

fn unescape(text: &str) -> Vec<u8> {
    percent_encoding::percent_decode_str(text).collect()
}

// ---- one key

async fn one(gateway: &Gateway, name: &str, key: Bytes, request: Request) -> Result<Response, Problem> {
    let (parts, body) = request.into_parts();
    let now_ms = gateway.env.now_ms();
    let query = Query::read(parts.uri.query())?;
    match parts.method {
        Method::GET | Method::HEAD => {
            query.only(&[])?;
            let head = parts.method == Method::HEAD;
            let op = if head { Op::head(key) } else { Op::get(key) };
            let keyspace = open(gateway, name).await?;
            match value(&keyspace, op).await? {
                None => Err(no_key()),
                Some(value) if !head && matches(&parts.headers, &tag(value.stamp, &value.data)) => {
                    let mut response = StatusCode::NOT_MODIFIED.into_response();
                    response.headers_mut().insert(ETAG, tag(value.stamp, &value.data));
                    Ok(response)
                }
                Some(value) => Ok(show(value, now_ms, head)),
            }
        }
        Method::PUT => {
            query.only(&["ttl", "type"])?;
            unconditional(&parts.headers)?;
            let ttl = ttl(&parts.headers, &query)?;
            let is_number = match query.get("type") {
                None | Some("bytes") => false,
                Some("number") => true,
                Some(other) => return Err(Problem::invalid(format!("type is {other:?}; it must be bytes or number"))),
            };
            let keyspace = open(gateway, name).await?;
            let bytes = receive(gateway, &parts.headers, body, MAX_VALUE).await?;
            let data = if is_number { Data::Number(parse(&bytes)?) } else { Data::Bytes(bytes) };
            let options = Options { ttl, ..Options::new() };
            written(&keyspace, Op::put(key, data.clone()).with(options), Some(&data)).await
        }
        Method::DELETE => {
            query.only(&[])?;
            unconditional(&parts.headers)?;
            let keyspace = open(gateway, name).await?;
            written(&keyspace, Op::delete(key), None).await
        }
        Method::POST => {
            query.only(&["op"])?;
            unconditional(&parts.headers)?;
            let op = query.get("op").map(str::to_owned);
            let keyspace = open(gateway, name).await?;
            let bytes = receive(gateway, &parts.headers, body, MAX_VALUE).await?;
            let merge = match op.as_deref() {
                Some("add") => Merge::Add(parse(&bytes)?),
                Some("max") => Merge::Max(parse(&bytes)?),
                Some("min") => Merge::Min(parse(&bytes)?),
                Some("append") => Merge::Append(bytes),
                _ => {
                    return Err(Problem::invalid(
                        "op must be add, max, min or append, as in POST /v1/packages/visits?op=add",
                    ));
                }
            };
            // The sum is worth telling; whoever appends knows what, and not how much there was.
            let mut options = Options::new().returning(Returning::After);
            options.head = matches!(merge, Merge::Append(_));
            match value(&keyspace, Op::merge(key, merge).with(options)).await? {
                Some(value) if value.number().is_some() => Ok(show(value, now_ms, false)),
                _ => Ok(done(None)),
            }
        }
        _ => Err(not_allowed("GET, HEAD, PUT, DELETE, POST")),
    }
}

fn no_key() -> Problem {
    Problem::new(StatusCode::NOT_FOUND, "NO_KEY", "the key holds nothing")
}

async fn only(keyspace: &Keyspace, op: Op) -> Result<Outcome, Problem> {
    let outcome = keyspace.batch([op]).await.pop();
    Ok(outcome.unwrap_or_else(|| Err(Error::Invalid("nothing was asked".to_owned())))?)
}

async fn value(keyspace: &Keyspace, op: Op) -> Result<Option<Value>, Problem> {
    Ok(only(keyspace, op).await?.value())
}

/// A change of which the value is known, if it leaves one.
async fn written(keyspace: &Keyspace, op: Op, data: Option<&Data>) -> Result<Response, Problem> {
    Ok(done(match only(keyspace, op).await? {
        Outcome::Written(stamp) | Outcome::Returned(stamp, _) => data.map(|data| tag(stamp, data)),
        Outcome::Found(_) | Outcome::Nothing => None,
    }))
}

/// A change was made; the value it left has this tag.
fn done(tag: Option<HeaderValue>) -> Response {
    let mut response = StatusCode::NO_CONTENT.into_response();
    if let Some(tag) = tag {
        response.headers_mut().insert(ETAG, tag);
    }
    response
}

/// A value, or its head.
fn show(value: Value, now_ms: u64, head: bool) -> Response {
    // Of a head the bytes are not known, and the stamp alone may stay where a merge changes them.
    let tag = (!head || value.number().is_some()).then(|| tag(value.stamp, &value.data));
    let (kind, content_type, body, length) = match value.data {
        Data::Number(number) => {
            let text = number::show(number);
            let length = text.len() as u64;
            ("number", TEXT, Body::from(text), length)
        }
        Data::Bytes(bytes) => ("bytes", BYTES, Body::from(bytes), value.size),
    };
    let mut response = respond(StatusCode::OK, content_type, body);
    let headers = response.headers_mut();
    headers.insert(CONTENT_LENGTH, length.into());
    if let Some(tag) = tag {
        headers.insert(ETAG, tag);
    }
    headers.insert(TYPE.clone(), HeaderValue::from_static(kind));
    if let Some(end) = value.expiry_ms {
        headers.insert(TTL_MS.clone(), end.saturating_sub(now_ms).into());
    }
    response
}

/// A version of a value: who wrote it, when, and what it is, since merges by themselves leave the stamp as it was.
pub(crate) fn version(stamp: Stamp, data: &Data) -> String {
    let content = match data {
        Data::Bytes(bytes) => partition_hash(bytes),
        Data::Number(number) => number.to_bits(),
    };
    format!("{:x}-{:x}-{content:x}", stamp.time, stamp.origin)
}

fn tag(stamp: Stamp, data: &Data) -> HeaderValue {
    // Of hex digits and quotes alone.
    HeaderValue::try_from(format!("\"{}\"", version(stamp, data))).unwrap_or(HeaderValue::from_static("\"\""))
}

/// Whether the caller has this version already.
fn matches(headers: &HeaderMap, wanted: &HeaderValue) -> bool {
    headers.get_all(IF_NONE_MATCH).iter().any(|given| {
        let given = given.to_str().unwrap_or_default();
        given
            .split(',')
            .map(str::trim)
            .any(|one| one == "*" || one.trim_start_matches("W/").as_bytes() == wanted.as_bytes())
    })
}

/// Refuses to write on a condition.
fn unconditional(headers: &HeaderMap) -> Result<(), Problem> {
    match [IF_MATCH, IF_NONE_MATCH, IF_UNMODIFIED_SINCE].iter().find(|name| headers.contains_key(*name)) {
        None => Ok(()),
        Some(name) => Err(Problem::new(
            StatusCode::NOT_IMPLEMENTED,
            "UNCONDITIONAL",
            format!(
                "{name} with a change: two callers could both be told yes, on different replicas; an eventually \
                 consistent store can't promise it"
            ),
        )),
    }
}

fn ttl(headers: &HeaderMap, query: &Query) -> Result<Option<Duration>, Problem> {
    let header = headers.get(&TTL).map(|value| value.to_str().unwrap_or_default());
    let Some(text) = query.get("ttl").or(header) else { return Ok(None) };
    let wrong =
        || Problem::invalid(format!("the ttl is {text:?}; it must be seconds, or a time like 500ms, 10s, 2h or 7d"));
    let ttl = match text.parse::<u64>() {
        Ok(seconds) => Duration::from_secs(seconds),
        Err(_) => humantime::parse_duration(text).map_err(|_| wrong())?,
    };
    if ttl.is_zero() { Err(wrong()) } else { Ok(Some(ttl)) }
}

fn parse(bytes: &[u8]) -> Result<f64, Problem> {
    let text = std::str::from_utf8(bytes).unwrap_or_default().trim();
    let number = text.parse::<f64>().ok().filter(|number| number.is_finite());
    number.ok_or_else(|| Problem::invalid("the body is no number; it must be one like 1, -2.5 or 1e6"))
}

/// The whole body, if it has no more than `most` bytes and there is room for it.
async fn receive(gateway: &Gateway, headers: &HeaderMap, body: Body, most: usize) -> Result<Bytes, Problem> {
    let declared = headers.get(CONTENT_LENGTH).and_then(|length| length.to_str().ok()?.parse::<usize>().ok());
    let too_long = || {
        let words = format!("the body has more than {most} bytes");
        Problem::new(StatusCode::PAYLOAD_TOO_LARGE, "TOO_LONG", words)
    };
    if declared.is_some_and(|length| length > most) {
        return Err(too_long());
    }
    // Those of one unit come at once; what they hold is bounded by the requests at once.
    let needed = declared.filter(|length| *length > server::UNIT).or(declared.is_none().then_some(most));
    let Some(_room) = gateway.http.room(needed.unwrap_or(0)) else {
        let words = "the gateway has no room for so long a body now: try again, or send less at a time";
        return Err(Problem::new(StatusCode::SERVICE_UNAVAILABLE, "OVERLOADED", words));
    };
    match timeout(PATIENCE, to_bytes(body, most)).await {
        Ok(Ok(bytes)) => Ok(bytes),
        Ok(Err(error)) if std::error::Error::source(&error).is_some_and(|e| e.to_string().contains("length limit")) => {
            Err(too_long())
        }
        Ok(Err(error)) => Err(Problem::invalid(format!("the body did not come whole: {error}"))),
        Err(_) => {
            let words = format!("the body did not come within {} s", PATIENCE.as_secs());
            Err(Problem::new(StatusCode::REQUEST_TIMEOUT, "TOO_SLOW", words))
        }
    }
}

// ---- many keys

async fn batch(gateway: &Gateway, keyspace: &Keyspace, request: Request) -> Result<Response, Problem> {
    Query::read(request.uri().query())?.only(&[])?;
    let (parts, body) = request.into_parts();
    unconditional(&parts.headers)?;
    let bytes = receive(gateway, &parts.headers, body, MAX_BATCH).await?;
    let asked: json::Batch = serde_json::from_slice(&bytes).map_err(|error| {
        Problem::invalid(format!(
            "the body is no batch: {error}; it must be like {{\"operations\":[{{\"op\":\"get\",\"key\":\"bash\"}}]}}"
        ))
    })?;
    let mut ops = Vec::with_capacity(asked.operations.len());
    for (index, operation) in asked.operations.into_iter().enumerate() {
        ops.push(operation.op().map_err(|why| Problem::invalid(format!("operations[{index}]: {why}")))?);
    }
    let mut reads = crate::batch::FIRST_READS;
    let outcomes = crate::batch::carry_out(keyspace, ops, MAX_ANSWER, &mut reads).await;
    let results: Vec<json::Result> = outcomes.into_iter().map(json::Result::from).collect();
    let body = serde_json::to_vec(&serde_json::json!({ "results": results }))
        .map_err(|error| Problem::new(StatusCode::INTERNAL_SERVER_ERROR, "INTERNAL", error.to_string()))?;
    Ok(respond(StatusCode::OK, JSON, body))
}

/// A stream of lines; an error that comes on the way is the last of them.
fn scan(keyspace: &Keyspace, query: Option<&str>) -> Result<Response, Problem> {
    let query = Query::read(query)?;
    query.only(&["prefix", "after", "limit", "values"])?;
    let mut options = ScanOptions::new();
    if let Some(prefix) = query.bytes("prefix") {
        options = options.prefix(prefix);
    }
    if let Some(after) = query.bytes("after") {
        options = options.after(after);
    }
    if let Some(limit) = query.get("limit") {
        let wrong = || Problem::invalid(format!("limit is {limit:?}; it must be a whole number above 0"));
        options = options.limit(limit.parse().ok().filter(|limit| *limit > 0).ok_or_else(wrong)?);
    }
    match query.get("values") {
        None | Some("true") => {}
        Some("false") => options = options.head(),
        Some(other) => return Err(Problem::invalid(format!("values is {other:?}; it must be true or false"))),
    }
    let head = options.head;
    let entries = keyspace.scan(options).ready_chunks(1024);
    let lines = entries.map(move |entries| {
        let mut lines = BytesMut::with_capacity(LINES);
        for entry in entries {
            lines.extend_from_slice(&json::line(entry, head));
            lines.extend_from_slice(b"\n");
        }
        Ok::<Bytes, std::convert::Infallible>(lines.freeze())
    });
    Ok(respond(StatusCode::OK, JSON_LINES, Body::from_stream(lines)))
}

/// What stands behind the question mark.
struct Query(Vec<(String, Vec<u8>)>);

impl Query {
    fn read(query: Option<&str>) -> Result<Self, Problem> {
        let mut pairs: Vec<(String, Vec<u8>)> = Vec::new();
        for pair in query.unwrap_or_default().split('&').filter(|pair| !pair.is_empty()) {
            let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
            let name = String::from_utf8_lossy(&unescape(name)).into_owned();
            if pairs.iter().any(|(known, _)| *known == name) {
                return Err(Problem::invalid(format!("{name:?} is given twice")));
            }
            pairs.push((name, unescape(&value.replace('+', " "))));
        }
        Ok(Self(pairs))
    }

    /// Refuses all but these.
    fn only(&self, known: &[&str]) -> Result<(), Problem> {
        match self.0.iter().find(|(name, _)| !known.contains(&name.as_str())) {
            None => Ok(()),
            Some((name, _)) if known.is_empty() => {
                Err(Problem::invalid(format!("{name:?} is not known here; nothing stands behind the question mark")))
            }
            Some((name, _)) => Err(Problem::invalid(format!("{name:?} is not known here; {} are", known.join(", ")))),
        }
    }

    fn bytes(&self, name: &str) -> Option<Vec<u8>> {
        self.0.iter().find(|(known, _)| known == name).map(|(_, value)| value.clone())
    }

    fn get(&self, name: &str) -> Option<&str> {
        let value = self.0.iter().find(|(known, _)| known == name).map(|(_, value)| value)?;
        Some(std::str::from_utf8(value).unwrap_or("\u{fffd}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_version_is_of_the_value_too() {
        let stamp = Stamp { time: 7, origin: 3 };
        let of = |data: Data| version(stamp, &data);
        assert_eq!(of("a".into()), of("a".into()));
        assert_ne!(of("a".into()), of("b".into()), "an append of a peer may leave the stamp");
        assert_ne!(of(1.0.into()), of(2.0.into()), "an add leaves it");
    }

    #[test]
    fn another_sites_page_changes_nothing() {
        let headers = |origin: &str| {
            let pairs = [(HOST, "localhost:8280"), (ORIGIN, origin)];
            pairs.map(|(name, value)| (name, HeaderValue::from_str(value).unwrap())).into_iter().collect()
        };
        let refused = |method: Method, origin: &str| of_no_other_site(&method, &headers(origin)).is_err();
        assert!(refused(Method::POST, "https://example.org") && refused(Method::DELETE, "null"));
        assert!(!refused(Method::GET, "https://example.org") && !refused(Method::PUT, "http://localhost:8280"));
        assert!(of_no_other_site(&Method::POST, &HeaderMap::new()).is_ok(), "what is no browser says none");
    }
}
