//! The control API's server: routes, limits, and how errors look on the wire.
//!
//! A request runs to its end in a task of its own, also when its client has gone: nothing is left half done because
//! somebody pressed ^C.

use std::future::Future;
use std::io;
use std::sync::Arc;

use axum::Router;
use axum::body::Bytes;
use axum::extract::{DefaultBodyLimit, Path, Query, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse as _, Response};
use axum::routing::{get, post};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::agent_api::{AgentApi, WitnessApi};
use super::api::{ErrorBody, ErrorKind, PairOpenRequest};
use super::socket::ControlSocket;

/// The longest request body, in bytes.
pub const MAX_REQUEST: usize = 64 << 10;

/// The parameters of a question for events.
#[derive(Debug, Deserialize)]
struct Events {
    /// How many, the newest.
    last: usize,
}

/// Serves an agent's control API until `stop` is ready; requests under way are finished first.
///
/// # Errors
/// If accepting connections fails for good.
pub async fn serve_agent<A: AgentApi>(
    socket: ControlSocket,
    api: Arc<A>,
    stop: impl Future<Output = ()> + Send + 'static,
) -> io::Result<()> {
    serve(socket, agent_routes(api), stop).await
}

/// Serves a witness's control API until `stop` is ready.
///
/// # Errors
/// If accepting connections fails for good.
pub async fn serve_witness<W: WitnessApi>(
    socket: ControlSocket,
    api: Arc<W>,
    stop: impl Future<Output = ()> + Send + 'static,
) -> io::Result<()> {
    serve(socket, witness_routes(api), stop).await
}

async fn serve(
    socket: ControlSocket,
    routes: Router,
    stop: impl Future<Output = ()> + Send + 'static,
) -> io::Result<()> {
    let (listener, _guard) = socket.into_parts();
    let routes = routes.fallback(no_such_route).layer(DefaultBodyLimit::max(MAX_REQUEST));
    axum::serve(listener, routes).with_graceful_shutdown(stop).await
}

fn agent_routes<A: AgentApi>(api: Arc<A>) -> Router {
    // One line per route: the method's name in the trait is the handler.
    macro_rules! handle {
        ($method:ident) => {
            post(async |State(api): State<Arc<A>>, body: Bytes| match parse(&body) {
                Ok(request) => answer(async move { api.$method(request).await }).await,
                Err(error) => failure(&error),
            })
        };
    }
    Router::new()
        .route("/v1/status", get(async |State(api): State<Arc<A>>| answer(async move { api.status().await }).await))
        .route(
            "/v1/vms/{name}",
            get(async |State(api): State<Arc<A>>, Path(name): Path<String>| {
                answer(async move { api.vm_status(&name).await }).await
            }),
        )
        .route(
            "/v1/vms/{name}/events",
            get(async |State(api): State<Arc<A>>, Path(name): Path<String>, Query(asked): Query<Events>| {
                answer(async move { api.vm_events(&name, asked.last).await }).await
            }),
        )
        .route("/v1/run", handle!(run))
        .route("/v1/end", handle!(end))
        .route("/v1/protect", handle!(protect))
        .route("/v1/unprotect", handle!(unprotect))
        .route("/v1/rehearse", handle!(rehearse))
        .route("/v1/failover", handle!(failover))
        .route("/v1/drill", handle!(drill))
        .route("/v1/may-start", handle!(may_start))
        .route("/v1/pair/open", handle!(pair_open))
        .route("/v1/pair/join", handle!(pair_join))
        .route("/v1/doctor", handle!(doctor))
        .with_state(api)
}

fn witness_routes<W: WitnessApi>(api: Arc<W>) -> Router {
    Router::new()
        .route("/v1/status", get(async |State(api): State<Arc<W>>| answer(async move { api.status().await }).await))
        .route(
            "/v1/pair/open",
            post(async |State(api): State<Arc<W>>, body: Bytes| match parse::<PairOpenRequest>(&body) {
                Ok(request) => answer(async move { api.pair_open(request).await }).await,
                Err(error) => failure(&error),
            }),
        )
        .with_state(api)
}

async fn no_such_route() -> Response {
    failure(
        &ErrorBody::new(ErrorKind::Invalid, "this agent has no such request")
            .advise("Use the same version of understudy for the command line and the agent."),
    )
}

fn parse<T: DeserializeOwned>(body: &[u8]) -> Result<T, ErrorBody> {
    serde_json::from_slice(body)
        .map_err(|error| ErrorBody::new(ErrorKind::Invalid, "the request cannot be read").because(&error))
}

async fn answer<T: Serialize + Send + 'static>(
    work: impl Future<Output = Result<T, ErrorBody>> + Send + 'static,
) -> Response {
    match tokio::spawn(work).await {
        Ok(Ok(value)) => json(StatusCode::OK, &value),
        Ok(Err(error)) => failure(&error),
        Err(_) => failure(
            &ErrorBody::new(ErrorKind::Failed, "the request ended early inside the agent")
                .advise("See the agent's log."),
        ),
    }
}

fn failure(error: &ErrorBody) -> Response {
    let status = match error.kind {
        ErrorKind::Invalid => StatusCode::BAD_REQUEST,
        ErrorKind::NotFound => StatusCode::NOT_FOUND,
        ErrorKind::Refused => StatusCode::UNPROCESSABLE_ENTITY,
        ErrorKind::NotProtected | ErrorKind::Busy => StatusCode::CONFLICT,
        ErrorKind::Unavailable => StatusCode::SERVICE_UNAVAILABLE,
        ErrorKind::Failed => StatusCode::INTERNAL_SERVER_ERROR,
    };
    json(status, error)
}

fn json<T: Serialize>(status: StatusCode, value: &T) -> Response {
    (status, axum::Json(value)).into_response()
}
