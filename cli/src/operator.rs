//! `vasto operator`: an operator on its own. In a Kubernetes cluster, or (with
//! `--local`) for stores that others start.

use std::path::PathBuf;
use std::sync::Arc;

use anyhow::Context as _;
use clap::Args;
use tokio_util::sync::CancellationToken;
use vasto_operator::console::Console;
use vasto_operator::kube::{self, Monitor, Timings};
use vasto_operator::local::{self, External};

use crate::context::{Context, parse_address};
use crate::exit::{Code, fault};
use crate::http;
use crate::listen::{listen, stop_on_signals};
use crate::output::emit_line;

/// Arguments of `vasto operator`.
#[derive(Args, Debug)]
pub(crate) struct Operator {
    /// Without Kubernetes: keep keyspaces as YAML files in this folder, made if it isn't there.
    #[arg(long, value_name = "DIR", conflicts_with_all = ["namespace", "image", "service"])]
    local: Option<PathBuf>,
    /// With --local: apply the keyspaces of this YAML file, and follow its edits. May be given several times.
    #[arg(short, long, value_name = "FILE", requires = "local")]
    file: Vec<PathBuf>,
    /// Where to listen.
    #[arg(long, value_name = "HOST:PORT", default_value = "127.0.0.1:8278", value_parser = parse_address)]
    listen: String,
    /// Where to answer probes, show metrics (on Kubernetes) and the console, a page for people.
    #[arg(long, value_name = "HOST:PORT", value_parser = parse_address)]
    http: Option<String>,
    /// Serve the Keyspaces of this namespace only.
    #[arg(long, value_name = "NAMESPACE")]
    namespace: Option<String>,
    /// The container image for the stores of new keyspaces.
    #[arg(long, value_name = "IMAGE", env = "VASTO_IMAGE")]
    image: Option<String>,
    /// Where stores reach the operators: their Service.
    #[arg(long, value_name = "HOST:PORT", env = "VASTO_SERVICE", value_parser = parse_address)]
    service: Option<String>,
    /// The pod that this runs in.
    #[arg(long, value_name = "NAME", env = "POD_NAME", hide = true)]
    pod: Option<String>,
    /// The pod's namespace, which has the Lease.
    #[arg(long, value_name = "NAMESPACE", env = "POD_NAMESPACE", hide = true)]
    pod_namespace: Option<String>,
    /// The pod's address, for stores that look for the leader.
    #[arg(long, value_name = "IP", env = "POD_IP", hide = true)]
    pod_ip: Option<String>,
}

pub(crate) async fn run(context: &Context, args: Operator) -> anyhow::Result<()> {
    let stop = stop_on_signals()?;
    match args.local.clone() {
        Some(dir) => run_local(context, args, dir, stop).await,
        None => run_kube(context, args, stop).await,
    }
}

async fn run_local(context: &Context, args: Operator, dir: PathBuf, stop: CancellationToken) -> anyhow::Result<()> {
    let listener = listen("the operator", &args.listen, "--listen").await?;
    let mut options = local::Options::new(dir, context.env.clone());
    options.files = args.file;
    let console = options.console.clone();
    let operator = local::Operator::open(options)?;
    if let Some(http) = &args.http {
        let listener = listen("the operator's console", http, "--http").await?;
        tokio::spawn(http::serve(listener, Arc::new(console), stop.clone()));
    }
    emit_line(format!("operator listens on {}", listener.local_addr()?))?;
    Ok(operator.serve(listener, Arc::new(External), stop).await?)
}

impl http::Source for Monitor {
    fn ready(&self) -> Result<(), String> {
        self.ready()
    }

    fn metrics(&self) -> Option<String> {
        Some(self.encode())
    }

    fn console(&self) -> Option<&Console> {
        Some(self.console())
    }
}

/// An operator without Kubernetes.
impl http::Source for Console {
    fn ready(&self) -> Result<(), String> {
        self.state().map(|_| ()).ok_or_else(|| "the operator has not begun yet".to_owned())
    }

    fn metrics(&self) -> Option<String> {
        None
    }

    fn console(&self) -> Option<&Console> {
        Some(self)
    }
}

async fn run_kube(context: &Context, args: Operator, stop: CancellationToken) -> anyhow::Result<()> {
    let missing = |flag: &str, what: &str| {
        let message =
            format!("{flag} is missing: {what}; without Kubernetes use --local DIR, or vasto up, which needs neither");
        fault(Code::Usage, message)
    };
    let image = args.image.ok_or_else(|| missing("--image", "the container image for stores"))?;
    let service = args.service.ok_or_else(|| missing("--service", "where stores reach the operators"))?;
    let client = ::kube::Client::try_default().await.context(
        "no Kubernetes cluster is known: run this in a pod with a service account, or with a kubeconfig that works for kubectl",
    )?;
    let listener = listen("the operator", &args.listen, "--listen").await?;
    let address = listener.local_addr()?;
    let monitor = Monitor::new();
    if let Some(http) = &args.http {
        let listener = listen("the operator's probes", http, "--http").await?;
        tokio::spawn(http::serve(listener, Arc::new(monitor.clone()), stop.clone()));
    }
    let pod_namespace = args.pod_namespace.unwrap_or_else(|| client.default_namespace().to_owned());
    let options = kube::Options {
        client,
        namespace: args.namespace,
        image,
        service,
        pod: args.pod.unwrap_or_else(|| format!("{:016x}", context.env.random_id())),
        pod_namespace,
        advertise: args.pod_ip.map_or_else(|| address.to_string(), |ip| in_url(&ip, address.port())),
        env: context.env.clone(),
        timings: Timings::default(),
        monitor,
    };
    emit_line(format!("operator listens on {address}"))?;
    Ok(kube::serve(options, listener, stop).await?)
}

/// `host:port`, also of an IPv6 address.
fn in_url(ip: &str, port: u16) -> String {
    if ip.contains(':') { format!("[{ip}]:{port}") } else { format!("{ip}:{port}") }
}
