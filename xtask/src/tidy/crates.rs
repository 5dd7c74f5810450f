//! Who may import whom, and what the pure cores may use.

use anyhow::{Context, Result};
use serde_json::Value;

use crate::shell;

/// Each crate of the house and which of our crates it may import. Leaves are imported by nobody.
const MAY_IMPORT: [(&str, &[&str]); 11] = [
    ("heartbeat-core", &[]),
    ("vmm-hooks", &[]),
    ("replicator-core", &["heartbeat-core"]),
    ("heartbeat", &["heartbeat-core"]),
    ("replicator", &["heartbeat-core", "vmm-hooks", "replicator-core", "heartbeat"]),
    ("chaos-tests", &["heartbeat-core", "vmm-hooks", "replicator-core", "heartbeat", "replicator"]),
    ("dashboards", &["vmm-hooks", "replicator"]),
    ("bench", &["heartbeat-core", "vmm-hooks", "replicator-core", "heartbeat", "replicator"]),
    ("chaos-fuzz", &["heartbeat", "vmm-hooks", "replicator"]),
    ("chaos-model", &["heartbeat-core", "replicator-core"]),
    ("xtask", &[]),
];

/// The pure cores, and what of others they may use outside of tests: `no_std` crates, without default features.
const PURE: [&str; 2] = ["heartbeat-core", "replicator-core"];
const PURE_MAY_USE: [&str; 2] = ["bincode", "thiserror"];

/// What cargo knows about the workspace's own packages.
///
/// # Errors
/// If cargo cannot be asked.
pub(super) fn metadata() -> Result<Value> {
    let text = shell::output(shell::cargo().args(["metadata", "--no-deps", "--offline", "--format-version", "1"]))?;
    serde_json::from_str(&text).context("cargo metadata printed no JSON")
}

/// Returns all breaches.
pub(super) fn check(metadata: &Value) -> Vec<String> {
    let mut breaches = Vec::new();
    let packages = metadata["packages"].as_array().map(Vec::as_slice).unwrap_or_default();
    for package in packages {
        let name = package["name"].as_str().unwrap_or_default();
        let Some((_, allowed)) = MAY_IMPORT.iter().find(|(known, _)| *known == name) else {
            breaches.push(format!(
                "{name}/Cargo.toml: a crate that the house rules do not know (xtask/src/tidy/crates.rs)"
            ));
            continue;
        };
        for dependency in package["dependencies"].as_array().map(Vec::as_slice).unwrap_or_default() {
            let used = dependency["name"].as_str().unwrap_or_default();
            let is_ours = MAY_IMPORT.iter().any(|(known, _)| *known == used);
            if is_ours && !allowed.contains(&used) {
                breaches.push(format!("{name}/Cargo.toml: {name} may not import {used}"));
            }
            let for_tests = dependency["kind"].as_str() == Some("dev");
            if PURE.contains(&name) && !is_ours && !for_tests {
                if !PURE_MAY_USE.contains(&used) {
                    breaches.push(format!("{name}/Cargo.toml: the pure core {name} may not use {used}"));
                } else if dependency["uses_default_features"].as_bool() != Some(false) {
                    breaches.push(format!("{name}/Cargo.toml: {used} must be used without default features (std)"));
                }
            }
        }
    }
    for (name, _) in MAY_IMPORT {
        if !packages.iter().any(|package| package["name"].as_str() == Some(name)) {
            breaches.push(format!("Cargo.toml: the crate {name} is not in the workspace"));
        }
    }
    breaches
}

#[cfg(test)]
mod tests {
    use super::{MAY_IMPORT, check};
    use serde_json::{Value, json};

    fn house(of: &str, dependency: Value) -> Value {
        let packages: Vec<Value> = MAY_IMPORT
            .iter()
            .map(|(name, _)| {
                let dependencies = if *name == of { vec![dependency.clone()] } else { vec![] };
                json!({ "name": name, "dependencies": dependencies })
            })
            .collect();
        json!({ "packages": packages })
    }

    #[test]
    fn finds_each_kind_of_breach_and_nothing_in_a_good_house() {
        let plain = |name: &str| json!({ "name": name, "kind": null, "uses_default_features": true });
        assert!(check(&house("replicator", plain("heartbeat"))).is_empty());
        assert!(check(&house("replicator", plain("tokio"))).is_empty());
        assert_eq!(check(&house("vmm-hooks", plain("heartbeat-core"))).len(), 1);
        assert_eq!(check(&house("replicator", plain("xtask"))).len(), 1);
        assert_eq!(check(&house("heartbeat-core", plain("tokio"))).len(), 1);
        assert_eq!(check(&house("heartbeat-core", plain("bincode"))).len(), 1);
        let lean = json!({ "name": "bincode", "kind": null, "uses_default_features": false });
        assert!(check(&house("heartbeat-core", lean)).is_empty());
        let test_only = json!({ "name": "proptest", "kind": "dev", "uses_default_features": true });
        assert!(check(&house("heartbeat-core", test_only)).is_empty());
    }
}
