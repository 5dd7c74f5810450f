//! The page's files and its data, with the headers that hold a browser to them.

use axum::Router;
use axum::http::HeaderName;
use axum::http::header::{
    CACHE_CONTROL, CONTENT_SECURITY_POLICY, CONTENT_TYPE, REFERRER_POLICY, X_CONTENT_TYPE_OPTIONS,
};
use axum::response::IntoResponse as _;
use axum::routing::{MethodRouter, get};

use crate::metrics::Metrics;

/// Scripts, styles and data of this address alone, nothing inline; nobody may frame the page.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; \
                      base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

/// A file of the page: its path, its type, what is in it.
const FILES: [(&str, &str, &str); 4] = [
    ("/", "text/html; charset=utf-8", include_str!("index.html")),
    ("/page.css", "text/css; charset=utf-8", include_str!("page.css")),
    ("/page.js", "text/javascript; charset=utf-8", include_str!("page.js")),
    ("/icon.svg", "image/svg+xml", include_str!("icon.svg")),
];

fn headers(kind: &'static str) -> [(HeaderName, &'static str); 5] {
    [
        (CONTENT_TYPE, kind),
        (CACHE_CONTROL, "no-store"),
        (CONTENT_SECURITY_POLICY, POLICY),
        (X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (REFERRER_POLICY, "no-referrer"),
    ]
}

fn file(kind: &'static str, text: &'static str) -> MethodRouter {
    get(move || async move { (headers(kind), text) })
}

/// The page of the agent called `agent`.
pub(in crate::metrics) fn routes(metrics: Metrics, agent: String) -> Router {
    let data = get(move || {
        let text = serde_json::to_string(&metrics.page(&agent)).expect("the page is plain data");
        async move { (headers("application/json"), text).into_response() }
    });
    FILES
        .iter()
        .fold(Router::new(), |router, &(path, kind, text)| router.route(path, file(kind, text)))
        .route("/page.json", data)
}
