//! The service `vasto.v1.Keyspaces`: what kubectl is on Kubernetes, over the local driver.

use std::sync::Arc;

use futures::stream::{self, BoxStream, StreamExt};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status};
use vasto_client::v1::keyspaces_server::Keyspaces;
use vasto_client::v1::{
    ApplyRequest, DeleteRequest, DeleteResponse, DescribeRequest, ListRequest, ListResponse, ReplaceRequest, Resource,
    ScaleRequest,
};
use vasto_crds::{Keyspace, parse};

use crate::edit::{Change, Refusal};
use crate::local::{Handle, Resources};

/// The service, for a tonic server.
pub(crate) struct KeyspacesService {
    handle: Handle,
    stop: CancellationToken,
}

impl KeyspacesService {
    pub(crate) fn new(handle: Handle, stop: CancellationToken) -> Self {
        Self { handle, stop }
    }

    async fn change(&self, change: Change) -> Result<Response<Resource>, Status> {
        let changed = self.handle.change(change).await?;
        Ok(Response::new(resource(&changed)))
    }
}

impl From<Refusal> for Status {
    fn from(refusal: Refusal) -> Self {
        let text = refusal.to_string();
        match refusal {
            Refusal::Missing { .. } => Self::not_found(text),
            Refusal::Invalid(_) => Self::invalid_argument(text),
            Refusal::Conflict(_) => Self::failed_precondition(text),
            Refusal::Unavailable(_) => Self::unavailable(text),
        }
    }
}

fn resource(keyspace: &Keyspace) -> Resource {
    Resource { json: keyspace.to_json() }
}

#[tonic::async_trait]
impl Keyspaces for KeyspacesService {
    async fn apply(&self, request: Request<ApplyRequest>) -> Result<Response<Resource>, Status> {
        let document = request.into_inner().document;
        let keyspaces = parse(&document, "the document").map_err(|e| Status::invalid_argument(e.to_string()))?;
        let [keyspace]: [Keyspace; 1] = keyspaces.try_into().map_err(|all: Vec<Keyspace>| {
            Status::invalid_argument(format!("the document has {} Keyspaces: send each by itself", all.len()))
        })?;
        self.change(Change::Apply(Box::new(keyspace))).await
    }

    async fn list(&self, _: Request<ListRequest>) -> Result<Response<ListResponse>, Status> {
        self.handle.settled().await;
        let all = self.handle.resources().borrow().clone();
        Ok(Response::new(ListResponse { items: all.values().map(|k| resource(k)).collect() }))
    }

    type DescribeStream = BoxStream<'static, Result<Resource, Status>>;

    async fn describe(&self, request: Request<DescribeRequest>) -> Result<Response<Self::DescribeStream>, Status> {
        let DescribeRequest { name, watch } = request.into_inner();
        let mut resources = self.handle.resources();
        if !resources.borrow().contains_key(&name) {
            self.handle.settled().await;
        }
        let all = resources.borrow_and_update().clone();
        let Some(first) = all.get(&name).cloned() else {
            let existing = all.keys().cloned().collect();
            return Err(Refusal::Missing { name, existing }.into());
        };
        let now = stream::iter([Ok(resource(&first))]);
        if !watch {
            return Ok(Response::new(now.boxed()));
        }
        let stop = self.stop.clone();
        let later = stream::unfold((resources, first, name), Self::later);
        Ok(Response::new(now.chain(later).take_until(stop.cancelled_owned()).boxed()))
    }

    async fn scale(&self, request: Request<ScaleRequest>) -> Result<Response<Resource>, Status> {
        let ScaleRequest { name, shards, replication_factor } = request.into_inner();
        let replication_factor = (replication_factor != 0).then_some(replication_factor);
        self.change(Change::Scale { name, shards, replication_factor }).await
    }

    async fn replace(&self, request: Request<ReplaceRequest>) -> Result<Response<Resource>, Status> {
        let ReplaceRequest { name, store, accept_data_loss } = request.into_inner();
        self.change(Change::Replace { name, store, accept_data_loss }).await
    }

    async fn delete(&self, request: Request<DeleteRequest>) -> Result<Response<DeleteResponse>, Status> {
        self.change(Change::Delete { name: request.into_inner().name }).await?;
        Ok(Response::new(DeleteResponse {}))
    }
}

type Watching = (watch::Receiver<Resources>, Arc<Keyspace>, String);

impl KeyspacesService {
    /// The next state of a resource that differs from the last one sent; ends when it is gone.
    async fn later((mut resources, last, name): Watching) -> Option<(Result<Resource, Status>, Watching)> {
        loop {
            resources.changed().await.ok()?;
            let now = resources.borrow_and_update().get(&name).cloned()?;
            if !Arc::ptr_eq(&now, &last) {
                return Some((Ok(resource(&now)), (resources, now, name)));
            }
        }
    }
}
