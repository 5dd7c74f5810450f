//! The control API's server: routes, limits, and how errors look on the wire.
//!
//! A request runs to its end in a task of its own, also when its client has gone: nothing is left half done because
//! somebody pressed ^C.

use std::future::{Future, IntoFuture as _};
use std::io;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::Bytes;
use axum::extract::{DefaultBodyLimit, Path, Query, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse as _, Response};
use axum::routing::{get, post};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tokio::sync::oneshot;

use super::agent_api::{AgentApi, WitnessApi};
use super::api::{ErrorBody, ErrorKind, PairOpenRequest};
use super::socket::ControlSocket;

/// The longest request body, in bytes.
pub const MAX_REQUEST: usize = 64 << 10;

/// How long requests that are under way may take when the server is to stop. Who is connected and asks nothing must not hold it.
const FINISH_WITHIN: Duration = Duration::from_secs(5);

/// The parameters of a question for events.
#[derive(Debug, Deserialize)]
struct Events {
    /// How many, the newest.
    last: usize,
}

/// Serves an agent's control API until `stop` is ready; requests under way are finished first, if they are in 5 s.
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
    until_stopped(listener, routes, stop, FINISH_WITHIN).await
}

async fn until_stopped(
    listener: tokio::net::UnixListener,
    routes: Router,
    stop: impl Future<Output = ()> + Send + 'static,
    finish: Duration,
) -> io::Result<()> {
    let (tell, told) = oneshot::channel();
    let stop = async move {
        stop.await;
        // Nobody hears only if there is nobody to stop.
        let _ = tell.send(());
    };
    let late = async {
        // Without the word it is the server that ended.
        if told.await.is_err() {
            std::future::pending::<()>().await;
        }
        tokio::time::sleep(finish).await;
    };
    tokio::select! {
        served = axum::serve(listener, routes).with_graceful_shutdown(stop).into_future() => served,
        () = late => {
            tracing::warn!("somebody is still connected to the control socket, and is left alone");
            Ok(())
        }
    }
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
            "/v1/vms/{name}/change",
            get(async |State(api): State<Arc<A>>, Path(name): Path<String>| {
                answer(async move { api.vm_change(&name).await }).await
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

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::net::{UnixListener, UnixStream};

    /// An agent that did not end once had handed no microVM over by the time its patience was up.
    #[tokio::test]
    async fn who_is_connected_and_asks_nothing_does_not_keep_the_server_from_stopping() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("socket");
        let listener = UnixListener::bind(&path).unwrap();
        let (tell, told) = oneshot::channel::<()>();
        let stop = async move { drop(told.await) };
        let routes = Router::new().route("/", get(async || "here"));
        let server = tokio::spawn(until_stopped(listener, routes, stop, Duration::from_millis(50)));
        let mut half = UnixStream::connect(&path).await.unwrap();
        half.write_all(b"GET / HTTP/1.1\r\n").await.unwrap();
        // The server has seen the one before it.
        let mut whole = UnixStream::connect(&path).await.unwrap();
        whole.write_all(b"GET / HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").await.unwrap();
        let mut answer = String::new();
        whole.read_to_string(&mut answer).await.unwrap();
        assert!(answer.ends_with("here"), "{answer}");
        drop(tell);
        let ended = tokio::time::timeout(Duration::from_secs(60), server).await;
        ended.expect("it stops").unwrap().unwrap();
        drop(half);
    }
}
