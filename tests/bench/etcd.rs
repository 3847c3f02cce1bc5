//! etcd, where it is there: puts over its JSON gateway, which is what needs no client of its own. Each is synced, in
//! groups, so its peer is Vasto with `durability: Synced`.

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use base64::Engine as _;
use clap::Args;
use hdrhistogram::Histogram;
use rand::SeedableRng;
use rand::rngs::SmallRng;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpStream;
use tokio::task::JoinSet;

use crate::data::Data;
use crate::peers::find;
use crate::process::{Process, own_cpu, run as run_process, wait_for};
use crate::sample::{Sample, histogram, record};
use vasto_tests::cluster::free_port;

/// A server that ends with this value.
pub struct Etcd {
    /// The process.
    pub process: Process,
    port: u16,
}

impl Etcd {
    /// Starts it in a new folder, and waits until it takes a put.
    pub fn start(parent: &Path) -> anyhow::Result<Self> {
        let (port, peers) = (free_port(), free_port());
        let mut command = Command::new(find("etcd").context("etcd is missing")?);
        let (client, peer) = (format!("http://127.0.0.1:{port}"), format!("http://127.0.0.1:{peers}"));
        command.arg("--data-dir").arg(parent.join("etcd"));
        command.args(["--listen-client-urls", &client, "--advertise-client-urls", &client]);
        command.args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer]);
        command.args(["--initial-cluster", &format!("default={peer}"), "--log-level", "warn"]);
        let mut process = Process::start("etcd", parent, &mut command)?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        wait_for("etcd takes a put", Duration::from_secs(20), || {
            process.check()?;
            Ok(runtime.block_on(async { Connection::open(port).await?.put(b"ready", b"yes").await }).ok())
        })?;
        Ok(Self { process, port })
    }

    /// Measures it from a child.
    pub fn measure(
        &self,
        callers: u32,
        keys: u64,
        value_size: usize,
        seconds: f64,
        logs: &Path,
    ) -> anyhow::Result<Sample> {
        let mut command = Command::new(std::env::current_exe()?);
        command.arg("etcd-load");
        for (flag, value) in [
            ("--port", self.port.to_string()),
            ("--callers", callers.to_string()),
            ("--keys", keys.to_string()),
            ("--value-size", value_size.to_string()),
            ("--seconds", seconds.to_string()),
        ] {
            command.args([flag, &value]);
        }
        let within = Duration::from_secs_f64(seconds + 30.0);
        Sample::parse(&run_process("etcd-load", logs, within, &mut command)?.0)
    }
}

/// Arguments of `vasto-bench etcd-load`.
#[derive(Args, Clone, Debug)]
pub struct EtcdLoad {
    #[arg(long)]
    port: u16,
    #[arg(long)]
    callers: u32,
    #[arg(long)]
    keys: u64,
    #[arg(long)]
    value_size: usize,
    #[arg(long)]
    seconds: f64,
}

/// Runs the load and prints its measurement.
pub fn run(args: &EtcdLoad) -> anyhow::Result<()> {
    tokio::runtime::Runtime::new()?.block_on(load(args))?.print()
}

async fn load(args: &EtcdLoad) -> anyhow::Result<Sample> {
    let data = std::sync::Arc::new(Data::new(args.keys, args.value_size, true));
    let (start, before) = (Instant::now(), own_cpu());
    let end = start + Duration::from_secs_f64(args.seconds);
    let mut callers = JoinSet::new();
    for number in 0..args.callers {
        let (data, port) = (data.clone(), args.port);
        callers.spawn(async move {
            let mut random = SmallRng::seed_from_u64(number.into());
            let mut connection = Connection::open(port).await?;
            let mut latencies = histogram()?;
            loop {
                let from = Instant::now();
                if from >= end {
                    return Ok::<Histogram<u64>, anyhow::Error>(latencies);
                }
                connection.put(&data.random_key(&mut random), &data.value(&mut random)).await?;
                record(&mut latencies, from.elapsed());
            }
        });
    }
    let mut all = histogram()?;
    while let Some(done) = callers.join_next().await {
        all.add(done.context("a caller panicked")??)?;
    }
    let mut sample = Sample::new(&all, 1, start.elapsed());
    sample.client_cpu = Some((own_cpu() - before).as_secs_f64());
    Ok(sample)
}

/// One that is kept alive: HTTP/1.1, as little of it as etcd's answers need.
struct Connection(BufReader<TcpStream>);

impl Connection {
    async fn open(port: u16) -> anyhow::Result<Self> {
        let stream = TcpStream::connect(("127.0.0.1", port)).await?;
        stream.set_nodelay(true)?;
        Ok(Self(BufReader::new(stream)))
    }

    async fn put(&mut self, key: &[u8], value: &[u8]) -> anyhow::Result<()> {
        let encode = |bytes: &[u8]| base64::engine::general_purpose::STANDARD.encode(bytes);
        let body = format!("{{\"key\":\"{}\",\"value\":\"{}\"}}", encode(key), encode(value));
        let head = format!("POST /v3/kv/put HTTP/1.1\r\nHost: etcd\r\nContent-Length: {}\r\n\r\n", body.len());
        self.0.write_all((head + &body).as_bytes()).await?;
        let (mut status, mut length, mut line) = (String::new(), None, String::new());
        loop {
            line.clear();
            if self.0.read_line(&mut line).await? == 0 {
                bail!("etcd closed the connection");
            }
            let text = line.trim_end().to_ascii_lowercase();
            if status.is_empty() {
                status = text;
            } else if let Some(rest) = text.strip_prefix("content-length:") {
                length = rest.trim().parse::<usize>().ok();
            } else if text.is_empty() {
                break;
            }
        }
        let mut body = vec![0; length.context("etcd's answer has no Content-Length")?];
        self.0.read_exact(&mut body).await?;
        if !status.contains(" 200") {
            bail!("etcd answered {status}: {}", String::from_utf8_lossy(&body));
        }
        Ok(())
    }
}
