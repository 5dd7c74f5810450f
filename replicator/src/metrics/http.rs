//! `/metrics` and the status page on a TCP address.

use std::io;
use std::net::SocketAddr;

use axum::http::header::CONTENT_TYPE;
use axum::response::IntoResponse as _;
use axum::routing::get;
use tokio::net::TcpListener;

use super::{Metrics, page};

/// The endpoint could not be opened.
#[derive(Debug, thiserror::Error)]
#[error("metrics cannot be served at {address}")]
pub struct MetricsServerError {
    /// Where.
    pub address: SocketAddr,
    /// Why.
    pub source: io::Error,
}

/// A bound endpoint that serves `/metrics`, and the status page at `/`. Not authenticated: bind it where only your Prometheus and
/// your operators reach it.
#[derive(Debug)]
pub struct MetricsServer {
    listener: TcpListener,
    metrics: Metrics,
    agent: String,
}

impl MetricsServer {
    /// Binds; port 0 takes a free one. The page is headed by `agent`, the agent's name.
    ///
    /// # Errors
    /// If the address cannot be bound.
    pub async fn bind(address: SocketAddr, metrics: Metrics, agent: &str) -> Result<Self, MetricsServerError> {
        let listener = TcpListener::bind(address).await.map_err(|source| MetricsServerError { address, source })?;
        Ok(Self { listener, metrics, agent: agent.to_owned() })
    }

    /// Where it listens.
    ///
    /// # Errors
    /// If the system does not say.
    pub fn address(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }

    /// Serves until dropped.
    ///
    /// # Errors
    /// If accepting fails for good.
    pub async fn serve(self) -> io::Result<()> {
        let metrics = self.metrics;
        let routes = page::routes(metrics.clone(), self.agent);
        let series = move || {
            let text = metrics.encode();
            async move { ([(CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], text).into_response() }
        };
        axum::serve(self.listener, routes.route("/metrics", get(series))).await
    }
}
