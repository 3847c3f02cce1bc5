//! `vasto store`: one store on its own, or as a child of `vasto up --processes`.

use std::io::Read;
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::Context as _;
use clap::Args;
use tokio_util::sync::CancellationToken;
use tracing::info;
use vasto_store::Monitor;

use crate::context::{Context, parse_address};
use crate::exit::{Code, fault};
use crate::http;
use crate::listen::{listen, listen_as_before, stop_on_signals};
use crate::output::emit_line;

/// Arguments of `vasto store`.
#[derive(Args, Debug)]
pub(crate) struct Store {
    /// Its name in the topology, such as store-0; a data folder belongs to one name.
    #[arg(long, required_unless_present = "pod")]
    name: Option<String>,
    /// On Kubernetes, instead of --name: the pod that it runs in, such as packages-store-0.
    #[arg(long, conflicts_with = "name", requires_all = ["keyspace", "uid"])]
    pod: Option<String>,
    /// With --pod: the keyspace that the pod belongs to; the store serves no other.
    #[arg(long, value_name = "NAMESPACE/NAME", requires = "pod", value_parser = parse_keyspace)]
    keyspace: Option<(String, String)>,
    /// With --pod: the uid of that keyspace, so that data of an earlier one of its name is told apart.
    #[arg(long, requires = "pod", value_parser = parse_uid)]
    uid: Option<String>,
    /// Its data folder, made if it isn't there.
    #[arg(long, value_name = "DIR")]
    data: PathBuf,
    /// Where to listen.
    #[arg(long, value_name = "HOST:PORT", default_value = "127.0.0.1:8279", value_parser = parse_address)]
    listen: String,
    /// Where others reach it, if that is not where it listens (or, with --pod, by the pod's name).
    #[arg(long, value_name = "HOST:PORT", value_parser = parse_address)]
    advertise: Option<String>,
    /// Answer probes and Prometheus here: /livez, /readyz, /metrics.
    #[arg(long, value_name = "HOST:PORT", value_parser = parse_address)]
    http: Option<String>,
    /// Listen on the port that this file names, else on any, and keep it there.
    #[arg(long, value_name = "FILE", hide = true)]
    keep_port: Option<PathBuf>,
    /// Stop when standard input ends: so a child goes with its parent, however that went.
    #[arg(long, hide = true)]
    until_input_ends: bool,
}

fn parse_keyspace(text: &str) -> Result<(String, String), String> {
    match text.split_once('/') {
        Some((namespace, name)) if !namespace.is_empty() && !name.is_empty() && !name.contains('/') => {
            Ok((namespace.to_owned(), name.to_owned()))
        }
        _ => Err("it must be NAMESPACE/NAME, for example default/packages".into()),
    }
}

fn parse_uid(text: &str) -> Result<String, String> {
    // It names a folder.
    let fits = !text.is_empty() && text.chars().all(|c| c.is_ascii_alphanumeric() || c == '-');
    if fits { Ok(text.to_owned()) } else { Err("it must be the Keyspace's metadata.uid: letters, digits and -".into()) }
}

/// The store in a pod: its name in topologies, and `host:port` by which others reach it there.
fn in_pod(pod: &str, namespace: &str, keyspace: &str, port: u16) -> Result<(String, String), String> {
    match pod.strip_prefix(keyspace).and_then(|rest| rest.strip_prefix('-')) {
        Some(name) if !name.is_empty() => {
            // The headless Service that publishes the pods' names.
            Ok((name.to_owned(), format!("{pod}.{keyspace}-store.{namespace}.svc:{port}")))
        }
        _ => Err(format!(
            "the pod {pod:?} is none of the keyspace {namespace}/{keyspace}: its name must begin with {keyspace}-, \
             as in {keyspace}-store-0"
        )),
    }
}

impl http::Source for Monitor {
    fn ready(&self) -> Result<(), String> {
        Monitor::ready(self)
    }
    fn metrics(&self) -> Option<String> {
        Some(self.encode())
    }
}

pub(crate) async fn run(context: &Context, args: Store) -> anyhow::Result<()> {
    let stop = stop_on_signals()?;
    let named = args.name.as_ref().or(args.pod.as_ref());
    let what = format!("store {}", named.map_or("", String::as_str));
    let listener = match &args.keep_port {
        Some(file) => listen_as_before(&what, file).await?,
        None => listen(&what, &args.listen, "--listen").await?,
    };
    let address = listener.local_addr()?;
    let (name, advertise) = match (args.name, &args.pod, &args.keyspace) {
        (Some(name), ..) => (name, None),
        (None, Some(pod), Some((namespace, keyspace))) => {
            let (name, address) =
                in_pod(pod, namespace, keyspace, address.port()).map_err(|why| fault(Code::Usage, why))?;
            (name, Some(address))
        }
        _ => return Err(fault(Code::Usage, "a store needs --name, or --pod with --keyspace and --uid")),
    };
    if args.until_input_ends {
        stop_when_input_ends(stop.clone());
    }
    let mut options = vasto_store::Options::new(name, args.data, context.global.operator.clone());
    options.advertise = args.advertise.or(advertise);
    options.only = args.uid;
    // Until the store has stopped: how it stops is worth knowing.
    let answering = CancellationToken::new();
    let _answering = answering.clone().drop_guard();
    if let Some(address) = &args.http {
        let listener = listen(&what, address, "--http").await?;
        tokio::spawn(http::serve(listener, Arc::new(options.monitor.clone()), answering));
    }
    emit_line(format!("{what} listens on {address}, operator {}", context.global.operator))?;
    vasto_store::serve(options, context.env.clone(), listener, stop).await.context(what)
}

fn stop_when_input_ends(stop: CancellationToken) {
    // Not a task: a read of standard input can't be interrupted, and must not hold up the end.
    std::thread::spawn(move || {
        let mut input = std::io::stdin().lock();
        let mut sink = [0; 64];
        while !matches!(input.read(&mut sink), Ok(0) | Err(_)) {}
        info!("the parent has gone: stopping");
        stop.cancel();
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[test]
    fn a_store_in_a_pod_goes_by_the_pods_name() {
        assert_eq!(
            in_pod("orders-store-1", "shop", "orders", 8279),
            Ok(("store-1".into(), "orders-store-1.orders-store.shop.svc:8279".into()))
        );
        // A keyspace whose name another's begins with.
        let why = in_pod("orders-2-store-1", "shop", "orders-3", 1).unwrap_err();
        assert!(why.contains("must begin with orders-3-"), "{why}");
        for other in ["ordersstore-1", "orders", "orders-", "store-1"] {
            assert!(in_pod(other, "shop", "orders", 1).is_err(), "{other}");
        }
    }

    #[test]
    fn a_store_has_a_name_or_a_pod_with_all_that_belongs_to_it() {
        let pod = "--pod orders-store-1 --keyspace shop/orders --uid 5f9a-1";
        for (line, fits) in [
            ("--name store-1", true),
            (pod, true),
            (&format!("{pod} --http 0.0.0.0:8282"), true),
            ("", false),
            ("--pod orders-store-1", false),
            ("--pod orders-store-1 --keyspace shop/orders", false),
            ("--keyspace shop/orders --uid 5f9a-1", false),
            ("--name store-1 --uid 5f9a-1", false),
            (&format!("{pod} --name store-1"), false),
            (&pod.replace("shop/orders", "orders"), false),
            (&pod.replace("5f9a-1", "../x"), false),
        ] {
            let line = format!("vasto store --data d {line}");
            assert_eq!(crate::Cli::try_parse_from(line.split_whitespace()).is_ok(), fits, "{line}");
        }
    }
}
