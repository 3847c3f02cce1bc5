//! A gateway as a process of its own: what the three sides share, what hostile clients get, and a stop.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};
use std::time::{Duration, Instant};

use vasto_tests::cluster::{Cluster, Gateway};

const KEYSPACE: &str = "
apiVersion: vasto.io/v1alpha1
kind: Keyspace
metadata: {name: gateway}
spec: {shards: 2, replicationFactor: 2}
";
const PATIENCE: Duration = Duration::from_secs(20);

async fn start() -> (Cluster, Gateway) {
    let cluster = Cluster::start(2, KEYSPACE);
    cluster.settled("gateway", 2, 2, 60).await;
    let gateway = Gateway::start(&cluster.operator_address(), &cluster.path().join("gateway.log"));
    (cluster, gateway)
}

fn connect(address: &str) -> TcpStream {
    let stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.set_write_timeout(Some(PATIENCE)).unwrap();
    stream
}

/// What is answered until as many bytes have come, or the end.
fn read(stream: &mut TcpStream, bytes: usize) -> String {
    let mut answer = vec![0; bytes];
    let mut got = 0;
    while got < bytes {
        match stream.read(&mut answer[got..]) {
            Ok(0) | Err(_) => break,
            Ok(more) => got += more,
        }
    }
    String::from_utf8_lossy(&answer[..got]).into_owned()
}

fn ask(stream: &mut TcpStream, command: &str, answer: &str) {
    stream.write_all(command.as_bytes()).unwrap();
    assert_eq!(read(stream, answer.len()), answer, "{command}");
}

/// The status and the body of an HTTP exchange.
fn http(address: &str, method: &str, path: &str, body: &str) -> (u16, String) {
    let mut stream = connect(address);
    let length = body.len();
    let head = format!("{method} {path} HTTP/1.0\r\nhost: x\r\ncontent-length: {length}\r\n\r\n");
    stream.write_all((head + body).as_bytes()).unwrap();
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).unwrap();
    let answer = String::from_utf8_lossy(&answer).into_owned();
    let status = answer.split(' ').nth(1).unwrap().parse().unwrap();
    let body = answer.split_once("\r\n\r\n").unwrap().1.to_owned();
    (status, body)
}

#[tokio::test(flavor = "multi_thread")]
async fn what_one_side_writes_the_others_read_and_a_stop_answers_what_was_asked() {
    let (_cluster, mut gateway) = start().await;
    let mut redis = connect(&gateway.redis);
    ask(&mut redis, "SET a 10\r\nINCR a\r\nAPPEND b hello\r\n", "+OK\r\n:11\r\n:5\r\n");
    assert_eq!(http(&gateway.http, "GET", "/v1/gateway/a", ""), (200, "11".into()));
    assert_eq!(http(&gateway.http, "POST", "/v1/gateway/a?op=add", "0.5"), (200, "11.5".into()));
    assert_eq!(http(&gateway.http, "DELETE", "/v1/gateway/b", "").0, 204);
    ask(&mut redis, "GET a\r\nGET b\r\n", "$4\r\n11.5\r\n$-1\r\n");
    assert_eq!(
        http(&gateway.http, "GET", "/v1/gateway?prefix=a", ""),
        (200, "{\"key\":\"a\",\"value\":11.5}\n".into())
    );
    let (status, metrics) = http(&gateway.http, "GET", "/metrics", "");
    assert!(
        status == 200 && metrics.contains("vasto_gateway_requests_total{protocol=\"redis\",result=\"ok\"} 5"),
        "{metrics}"
    );
    assert_eq!(http(&gateway.http, "GET", "/readyz", ""), (200, "ok\n".into()));
    // Both are idle: neither holds up the stop.
    let mut idle = connect(&gateway.http);
    let asked = Instant::now();
    assert_eq!(gateway.stop(), 0);
    assert!(asked.elapsed() < Duration::from_secs(4), "{:?}", asked.elapsed());
    assert_eq!(read(&mut redis, 1) + &read(&mut idle, 1), "", "closed");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_hostile_get_an_error_and_others_are_served_on() {
    let (_cluster, gateway) = start().await;
    let before = gateway.memory();
    let mut kept = Vec::new();
    for (sent, answer) in [
        ("*1000000000\r\n", "-ERR Protocol error: invalid multibulk length\r\n"),
        ("*1\r\n$2000000000\r\n", "-ERR Protocol error: invalid bulk length\r\n"),
        ("*2\r\n$3\r\nGET\r\n:1\r\n", "-ERR Protocol error: expected '$', got ':'\r\n"),
        ("GET \"a\r\n", "-ERR Protocol error: unbalanced quotes in request\r\n"),
        ("POST / HTTP/1.1\r\nHost: x\r\n\r\nSET a 1\r\n", "-ERR Protocol error: this is Redis' protocol, not HTTP\r\n"),
        ("PING\r\n*x\r\n", "+PONG\r\n-ERR Protocol error: invalid multibulk length\r\n"),
    ] {
        let mut stream = connect(&gateway.redis);
        stream.write_all(sent.as_bytes()).unwrap();
        assert_eq!(read(&mut stream, 1000), answer, "{sent}");
    }
    // A line without end: refused once it is too long, whatever is behind it.
    let mut endless = connect(&gateway.redis);
    let line = vec![b'x'; 1 << 20];
    let refused = (0..64).any(|_| endless.write_all(&line).is_err()) || !read(&mut endless, 100).is_empty();
    assert!(refused);
    // Long arguments that never come whole: what they may hold together is bounded.
    let part = vec![b'x'; 1 << 20];
    let mut refused = 0;
    for _ in 0..60 {
        let mut stream = connect(&gateway.redis);
        stream.set_read_timeout(Some(Duration::from_millis(1))).unwrap();
        let sent = stream
            .write_all(b"*3\r\n$3\r\nSET\r\n$1\r\na\r\n$16000000\r\n")
            .and_then(|()| (0..8).try_for_each(|_| stream.write_all(&part)));
        refused += usize::from(sent.is_err() || read(&mut stream, 10).starts_with("-ERR"));
        kept.push(stream);
    }
    let mut redis = connect(&gateway.redis);
    ask(&mut redis, "PING\r\n", "+PONG\r\n");
    assert!(refused > 10, "{refused} of 60 that hold 480 MiB are refused");
    let grown = gateway.memory().saturating_sub(before);
    assert!(grown < 600 << 20, "{} MiB more", grown >> 20);
    kept.clear();
    // One who has nothing more to say still gets the answers.
    let mut half = connect(&gateway.redis);
    half.write_all(b"SET half 1\r\nGET half\r\n").unwrap();
    half.shutdown(Shutdown::Write).unwrap();
    assert_eq!(read(&mut half, 1000), "+OK\r\n$1\r\n1\r\n");
    // What is no HTTP, too long, or not to the end.
    assert_eq!(http(&gateway.http, "GET", "/v1/gateway/%", "").0, 404, "a lone percent is a key");
    assert_eq!(http(&gateway.http, "PUT", &format!("/v1/gateway/{}", "k".repeat(40_000)), "x").0, 400);
    assert_eq!(http(&gateway.http, "GET", "/v1/-%00/x", "").0, 400);
    let mut garbage = connect(&gateway.http);
    garbage.write_all(b"\x16\x03\x01 hello\r\n\r\n").unwrap();
    assert!(read(&mut garbage, 12).starts_with("HTTP/1.1 400"));
    let mut long = connect(&gateway.http);
    long.write_all(b"PUT /v1/gateway/a HTTP/1.1\r\nhost: x\r\ncontent-length: 9000000\r\n\r\n").unwrap();
    assert!(read(&mut long, 12).starts_with("HTTP/1.1 413"));
    // A keyspace that isn't there is told so, however often it is asked for.
    for turn in 0..200 {
        let (status, body) = http(&gateway.http, "GET", &format!("/v1/nowhere-{turn}/a"), "");
        assert_eq!(status, 404, "{body}");
    }
    ask(&mut redis, "GET half\r\n", "$1\r\n1\r\n");
}

#[tokio::test(flavor = "multi_thread")]
async fn many_who_are_idle_cost_little() {
    const MANY: usize = 10_000;
    let (_soft, hard) = nix::sys::resource::getrlimit(nix::sys::resource::Resource::RLIMIT_NOFILE).unwrap();
    nix::sys::resource::setrlimit(nix::sys::resource::Resource::RLIMIT_NOFILE, hard, hard).unwrap();
    assert!(hard > MANY as u64 + 1_000, "this machine allows {hard} open files, which are too few for this test");
    let (_cluster, gateway) = start().await;
    let before = gateway.memory();
    let mut idle: Vec<TcpStream> = (0..MANY).map(|_| connect(&gateway.redis)).collect();
    // Each is served: it is there, not in some backlog.
    for stream in &mut idle {
        stream.write_all(b"PING\r\n").unwrap();
    }
    for stream in &mut idle {
        assert_eq!(read(stream, 7), "+PONG\r\n");
    }
    let each = gateway.memory().saturating_sub(before) / MANY as u64;
    assert!(each < 24 << 10, "{each} bytes for each idle connection");
}
