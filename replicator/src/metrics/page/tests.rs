use std::collections::BTreeSet;
use std::time::Duration;

use serde_json::Value;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use super::{EVENTS, Page};
use crate::control::api::{FailoverReport, HeldOutput, ProtectionState, Role, Suspicion, SyncProgress};
use crate::metrics::{Metrics, MetricsServer};
use crate::status::EpochObservation;

fn json(page: &Page) -> Value {
    serde_json::to_value(page).expect("plain data")
}

/// An agent that has seen everything that the page can show.
fn full() -> Metrics {
    let metrics = Metrics::new();
    let vm = metrics.vm("web-1");
    vm.set_role(Role::Primary);
    vm.set_peer("host-b");
    vm.set_generation(3);
    vm.set_state(&ProtectionState::Syncing(SyncProgress { done_pages: 5, total_pages: 9, round: 2 }));
    vm.observe_epoch(&EpochObservation { epoch: 7, ..EpochObservation::default() });
    vm.set_held(&HeldOutput { frames: 2, bytes: 120, oldest_ms: 1.5, released: 10, dropped: 3 });
    vm.rehearsed(true);
    vm.observe_failover(&FailoverReport::example());
    let peer = metrics.peer("host-b");
    peer.set_suspicion(&Suspicion::new(0.5, 20.0, false));
    peer.set_rtt(Duration::from_micros(400));
    metrics.witness("witness").set_reachable(true);
    metrics
}

/// Every string of a value, but the texts of events, which are made of words and figures of ours.
fn strings(value: &Value, found: &mut BTreeSet<String>) {
    match value {
        Value::String(text) => drop(found.insert(text.clone())),
        Value::Array(all) => all.iter().for_each(|one| strings(one, found)),
        Value::Object(fields) => {
            let told = fields.iter().filter(|(key, _)| !["text", "kind"].contains(&key.as_str()));
            told.for_each(|(_, one)| strings(one, found));
        }
        Value::Null | Value::Bool(_) | Value::Number(_) => {}
    }
}

#[test]
fn every_name_on_the_page_is_one_that_the_metrics_tell() {
    let metrics = full();
    let (page, text) = (json(&metrics.page("host-a")), metrics.encode());
    let mut found = BTreeSet::new();
    strings(&page, &mut found);
    assert!(found.remove("host-a"), "the agent's own name heads the page");
    assert!(found.contains("web-1") && found.contains("host-b"), "{found:?}");
    for name in found {
        assert!(text.contains(&format!("=\"{name}\"")), "{name} is not in the metrics");
    }
}

#[test]
fn figures_are_those_of_the_metrics() {
    let page = json(&full().page("host-a"));
    let vm = &page["vms"][0];
    assert_eq!(vm["epoch_committed"], 7);
    assert_eq!((&vm["held_frames"], &vm["held_bytes"]), (&2.into(), &120.into()));
    assert_eq!(vm["failovers"], 1);
    assert_eq!(vm["failover"]["activation_ms"], 32.0);
    assert_eq!(vm["sync"]["total_pages"], 9);
    assert_eq!(page["witnesses"][0]["reachable"], true);
    assert_eq!(page["peers"][0]["phi"], 0.5);
    let kinds: Vec<&str> = page["events"].as_array().unwrap().iter().filter_map(|one| one["kind"].as_str()).collect();
    assert_eq!(kinds, ["failover", "rehearsal", "state", "ownership", "role"], "the newest first");
}

#[test]
fn a_vm_that_is_protected_again_keeps_what_happened_and_one_that_is_removed_does_not() {
    let metrics = full();
    metrics.vm("web-1").set_state(&ProtectionState::Protected);
    let page = json(&metrics.page("host-a"));
    assert_eq!(page["events"][0]["text"], "syncing \u{2192} protected");
    assert_eq!(page["vms"][0]["failover"]["cause"], "silence");
    metrics.remove_vm("web-1");
    assert_eq!(json(&metrics.page("host-a"))["vms"], Value::Array(Vec::new()));
}

#[test]
fn what_does_not_change_is_no_event_and_events_are_bounded() {
    let metrics = Metrics::new();
    let vm = metrics.vm("web-1");
    for _ in 0..3 {
        vm.set_state(&ProtectionState::Protected);
        vm.set_generation(1);
        vm.set_role(Role::Primary);
    }
    assert_eq!(json(&metrics.page("host-a"))["events"].as_array().map(Vec::len), Some(3));
    (2..200).for_each(|generation| vm.set_generation(generation));
    let page = json(&metrics.page("host-a"));
    assert_eq!(page["events"].as_array().map(Vec::len), Some(EVENTS));
    assert_eq!(page["events"][0]["text"], "generation 199");
}

async fn ask(request: &str) -> String {
    let server = MetricsServer::bind("127.0.0.1:0".parse().unwrap(), full(), "host-a").await.unwrap();
    let address = server.address().unwrap();
    let serving = tokio::spawn(server.serve());
    let mut stream = tokio::net::TcpStream::connect(address).await.unwrap();
    stream.write_all(format!("{request} HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n").as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    serving.abort();
    answer
}

#[tokio::test]
async fn the_page_is_served_with_a_policy_and_can_only_be_read() {
    for (path, kind) in
        [("/", "text/html"), ("/page.css", "text/css"), ("/page.js", "text/javascript"), ("/icon.svg", "image/svg+xml")]
    {
        let answer = ask(&format!("GET {path}")).await.to_ascii_lowercase();
        assert!(answer.starts_with("http/1.1 200"), "{path}: {answer}");
        assert!(answer.contains(&format!("content-type: {kind}")), "{path}: {answer}");
        assert!(answer.contains("content-security-policy: default-src 'none'; script-src 'self'"), "{path}: {answer}");
        assert!(!answer.contains("unsafe-"), "{path}");
    }
    let answer = ask("GET /page.json").await;
    let body: Value = serde_json::from_str(answer.split_once("\r\n\r\n").unwrap().1).unwrap();
    assert_eq!(body["agent"], "host-a");
    for path in ["/", "/page.json", "/metrics"] {
        assert!(ask(&format!("POST {path}")).await.starts_with("HTTP/1.1 405"), "{path}");
    }
    assert!(ask("GET /v1/status").await.starts_with("HTTP/1.1 404"), "the control API is not here");
}

/// What would let a name become more than text, or the page ask anybody else.
#[test]
fn the_page_has_nothing_inline_and_makes_no_markup() {
    let (html, script, style) = (include_str!("index.html"), include_str!("page.js"), include_str!("page.css"));
    for sink in ["innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "Function(", "javascript:"]
    {
        assert!(!script.contains(sink) && !html.contains(sink), "{sink}");
    }
    for inline in ["<style", " style=", "<script>", " onload", " onclick", " onerror"] {
        assert!(!html.contains(inline), "{inline}");
    }
    for (name, text) in [("index.html", html), ("page.js", script), ("page.css", style)] {
        let others: Vec<&str> = text.match_indices("://").map(|(at, _)| &text[at.saturating_sub(5)..at + 20]).collect();
        let known = |found: &&str| !found.contains("://www.w3.org/2000");
        assert_eq!(others.into_iter().filter(known).collect::<Vec<_>>(), Vec::<&str>::new(), "{name}");
    }
}
