//! `vasto probe`: a GET over plain HTTP, for images without curl. Exits with 0 on 200,
//! else with 1 and the server's own words.

use std::time::Duration;

use clap::Args;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::exit::{Code, fault};

const WITHIN: Duration = Duration::from_secs(5);
/// More of an answer is not read.
const ANSWER_BYTES: u64 = 1 << 20;
/// Nor of one that is passed on.
const WHOLE_BYTES: u64 = 64 << 20;

/// Arguments of `vasto probe`.
#[derive(Args, Debug)]
pub(crate) struct Probe {
    /// What to ask, such as http://127.0.0.1:8282/readyz.
    #[arg(value_parser = parse)]
    url: Url,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Url {
    host: String,
    port: u16,
    path: String,
}

/// Takes http://HOST[:PORT][/PATH].
fn parse(text: &str) -> Result<Url, String> {
    let wrong = || "it must be http://HOST:PORT/PATH, for example http://127.0.0.1:8282/readyz".to_owned();
    let rest = text.strip_prefix("http://").ok_or_else(wrong)?;
    let (authority, path) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
    // A colon within brackets is part of an IPv6 address.
    let (host, port) = match authority.rsplit_once(':').filter(|(_, port)| !port.ends_with(']')) {
        Some((host, port)) => (host, port.parse().map_err(|_| wrong())?),
        None => (authority, 80),
    };
    let bad = |text: &str| text.chars().any(|c| c.is_whitespace() || c.is_control());
    if host.is_empty() || bad(host) || bad(path) {
        return Err(wrong());
    }
    let path = if path.is_empty() { "/" } else { path };
    Ok(Url { host: host.to_owned(), port, path: path.to_owned() })
}

pub(crate) async fn run(args: Probe) -> anyhow::Result<()> {
    let Url { host, port, path } = &args.url;
    let asked = format!("http://{host}:{port}{path}");
    let answer = match tokio::time::timeout(WITHIN, get(&args.url, ANSWER_BYTES)).await {
        Ok(Ok(answer)) => answer,
        Ok(Err(error)) => return Err(fault(Code::Failure, format!("{asked} does not answer: {error}"))),
        Err(_) => return Err(fault(Code::Failure, format!("{asked} did not answer within {WITHIN:?}"))),
    };
    match split(&answer) {
        Some((200, _)) => Ok(()),
        Some((status, body)) => Err(fault(Code::Failure, format!("{asked} answers {status}: {}", body.trim()))),
        None => Err(fault(Code::Failure, format!("{asked} does not answer as HTTP"))),
    }
}

/// What another operator's server says at this path, if it is well.
pub(crate) async fn fetch(host: &str, port: u16, path: &str) -> std::io::Result<String> {
    let url = Url { host: host.to_owned(), port, path: path.to_owned() };
    let answer = tokio::time::timeout(WITHIN, get(&url, WHOLE_BYTES)).await??;
    match split(&answer) {
        Some((200, body)) => Ok(body.to_owned()),
        _ => Err(std::io::Error::other("no good answer")),
    }
}

async fn get(url: &Url, most: u64) -> std::io::Result<String> {
    let bare = url.host.trim_start_matches('[').trim_end_matches(']');
    let mut stream = TcpStream::connect((bare, url.port)).await?;
    // In 1.0 the answer is whole and ends with the connection.
    let request = format!("GET {} HTTP/1.0\r\nHost: {}:{}\r\n\r\n", url.path, url.host, url.port);
    stream.write_all(request.as_bytes()).await?;
    let mut answer = Vec::new();
    stream.take(most).read_to_end(&mut answer).await?;
    Ok(String::from_utf8_lossy(&answer).into_owned())
}

/// The status and the body of an answer.
fn split(answer: &str) -> Option<(u16, &str)> {
    let (head, body) = answer.split_once("\r\n\r\n")?;
    let status = head.strip_prefix("HTTP/1.")?.get(2..5)?.parse().ok()?;
    Some((status, body))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::exit::one_line;
    use std::sync::Arc;
    use tokio_util::sync::CancellationToken;

    #[test]
    fn urls() {
        let url = |host: &str, port, path: &str| Ok(Url { host: host.into(), port, path: path.into() });
        assert_eq!(parse("http://127.0.0.1:8282/readyz"), url("127.0.0.1", 8282, "/readyz"));
        assert_eq!(parse("http://[::1]:8282/readyz"), url("[::1]", 8282, "/readyz"));
        assert_eq!(parse("http://[::1]"), url("[::1]", 80, "/"));
        assert_eq!(parse("http://store:1"), url("store", 1, "/"));
        for bad in ["https://x/", "127.0.0.1:8282", "http://", "http://:1/", "http://x:y/", "http://x/a b"] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn an_answer_is_a_status_and_a_body() {
        assert_eq!(split("HTTP/1.1 503 Service Unavailable\r\na: b\r\n\r\nnot yet\n"), Some((503, "not yet\n")));
        assert_eq!(split("HTTP/1.0 200 OK\r\n\r\n"), Some((200, "")));
        assert_eq!(split("SSH-2.0-x\r\n\r\n"), None);
        assert_eq!(split(""), None);
    }

    struct NotYet;

    impl crate::http::Source for NotYet {
        fn ready(&self) -> Result<(), String> {
            Err("shard 2 is being built".into())
        }
        fn metrics(&self) -> Option<String> {
            None
        }
    }

    #[tokio::test]
    async fn it_says_what_the_server_says() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let stop = CancellationToken::new();
        let server = tokio::spawn(crate::http::serve(listener, Arc::new(NotYet), stop.clone()));
        let probe = |path: &str| run(Probe { url: parse(&format!("http://{address}{path}")).unwrap() });
        assert!(probe("/livez").await.is_ok());
        let error = probe("/readyz").await.unwrap_err();
        assert!(one_line(&error).ends_with("answers 503: shard 2 is being built"), "{error}");
        stop.cancel();
        server.await.unwrap();
        assert!(one_line(&probe("/livez").await.unwrap_err()).contains("does not answer"));
    }
}
