//! Listening and stopping, for all servers: ports with words for what is in
//! the way, and the signals that ask to stop.

use std::io::{self, ErrorKind};
use std::path::Path;

use nix::sys::resource::{Resource, getrlimit, setrlimit};
use tokio::net::{TcpListener, TcpSocket, lookup_host};
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::exit::{Code, fault};

/// Connections that may wait to be accepted: when a server comes back, all its clients do at once, and who finds no
/// room tries again only after a second or more. Linux takes no more than `net.core.somaxconn`, which is this too.
const BACKLOG: u32 = 4_096;

/// A server has a file for each connection: as many as may be, not as many as are usual.
pub(crate) fn raise_open_files() {
    let raised =
        getrlimit(Resource::RLIMIT_NOFILE).and_then(|(_, hard)| setrlimit(Resource::RLIMIT_NOFILE, hard, hard));
    if let Err(error) = raised {
        warn!(%error, "the limit of open files stays as it is");
    }
}

/// As `TcpListener::bind`, with room for more connections that wait.
async fn bind(address: &str) -> io::Result<TcpListener> {
    let mut failed = io::Error::new(ErrorKind::NotFound, "the name has no address");
    for address in lookup_host(address).await? {
        let socket = if address.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
        socket.set_reuseaddr(true)?;
        match socket.bind(address).and_then(|()| socket.listen(BACKLOG)) {
            Ok(listener) => return Ok(listener),
            Err(error) => failed = error,
        }
    }
    Err(failed)
}

/// Listens on `host:port`; `what` wants to, and `flag` is how to choose another.
pub(crate) async fn listen(what: &str, address: &str, flag: &str) -> anyhow::Result<TcpListener> {
    bind(address).await.map_err(|error| {
        let (why, right) = match error.kind() {
            ErrorKind::AddrInUse => (
                "the port is in use".to_string(),
                format!("stop what listens there (another vasto?), or choose another port with {flag}"),
            ),
            ErrorKind::AddrNotAvailable => {
                ("this machine has no such address".to_string(), format!("choose one of its own with {flag}"))
            }
            ErrorKind::PermissionDenied => {
                ("it is not allowed".to_string(), format!("choose a port above 1023 with {flag}"))
            }
            _ => (error.to_string(), format!("choose another address with {flag}")),
        };
        fault(Code::Failure, format!("{what} can't listen on {address}: {why}; {right}"))
    })
}

/// Listens on this machine alone, on the port kept in this file if it is free, else on any; keeps the port.
///
/// Others find a store at its new address soon, but at its old one at once.
pub(crate) async fn listen_as_before(what: &str, file: &Path) -> anyhow::Result<TcpListener> {
    let before = std::fs::read_to_string(file).ok().and_then(|text| text.trim().parse::<u16>().ok());
    if let Some(port) = before
        && let Ok(listener) = bind(&format!("127.0.0.1:{port}")).await
    {
        return Ok(listener);
    }
    let listener = listen(what, "127.0.0.1:0", "--listen").await?;
    let port = listener.local_addr()?.port();
    if let Err(error) = std::fs::write(file, format!("{port}\n")) {
        warn!(file = %file.display(), %error, "the port is not kept: it will be another one next time");
    }
    Ok(listener)
}

/// A token that SIGINT and SIGTERM cancel. A second signal ends the process at once.
pub(crate) fn stop_on_signals() -> anyhow::Result<CancellationToken> {
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    let stop = CancellationToken::new();
    let asked = stop.clone();
    tokio::spawn(async move {
        for first in [true, false] {
            let name = tokio::select! {
                _ = interrupt.recv() => "SIGINT",
                _ = terminate.recv() => "SIGTERM",
            };
            if first {
                info!(signal = name, "stopping; a second signal stops at once");
                asked.cancel();
            }
        }
        std::process::exit(i32::from(Code::Failure as u8));
    });
    Ok(stop)
}
