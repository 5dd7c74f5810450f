//! The part of etcd's JSON gateway that is used: one kind of transaction, and a user's token.
//!
//! As gRPC's JSON mapping has it: 64-bit numbers are strings, bytes are base64, and what is zero or empty is left out.

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

fn number<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u64, D::Error> {
    let text = String::deserialize(deserializer)?;
    text.parse().map_err(|_| serde::de::Error::custom("a number is expected in a string"))
}

fn bytes<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<u8>, D::Error> {
    let text = String::deserialize(deserializer)?;
    BASE64_STANDARD.decode(text).map_err(|_| serde::de::Error::custom("base64 is expected"))
}

fn as_text<S: Serializer>(number: &u64, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(number)
}

/// A transaction: if nothing of `compare` changed, what is done; else what is shown.
#[derive(Debug, Default, Serialize)]
pub(super) struct Transaction {
    pub(super) compare: Vec<Compare>,
    pub(super) success: Vec<Operation>,
    pub(super) failure: Vec<Operation>,
}

/// That a key was last changed at this revision.
#[derive(Debug, Serialize)]
pub(super) struct Compare {
    key: String,
    target: &'static str,
    result: &'static str,
    #[serde(rename = "modRevision", serialize_with = "as_text")]
    mod_revision: u64,
}

impl Compare {
    /// `mod_revision` 0: that it is absent.
    pub(super) fn unchanged(key: &str, mod_revision: u64) -> Self {
        Self { key: BASE64_STANDARD.encode(key), target: "MOD", result: "EQUAL", mod_revision }
    }
}

#[derive(Debug, Serialize)]
pub(super) enum Operation {
    #[serde(rename = "requestRange")]
    Range { key: String },
    #[serde(rename = "requestPut")]
    Put { key: String, value: String },
}

impl Operation {
    /// Show this key. Linearizable, since nothing says otherwise.
    pub(super) fn range(key: &str) -> Self {
        Self::Range { key: BASE64_STANDARD.encode(key) }
    }

    pub(super) fn put(key: &str, value: &[u8]) -> Self {
        Self::Put { key: BASE64_STANDARD.encode(key), value: BASE64_STANDARD.encode(value) }
    }
}

/// What a transaction brought.
#[derive(Debug, Deserialize)]
pub(super) struct TransactionResult {
    pub(super) header: Header,
    #[serde(default)]
    pub(super) succeeded: bool,
    #[serde(default)]
    responses: Vec<OperationResult>,
}

impl TransactionResult {
    /// What each range showed, in order.
    pub(super) fn ranges(&self) -> Vec<Option<&KeyValue>> {
        let range = |response: &OperationResult| matches!(response, OperationResult { range: Some(_) });
        self.responses
            .iter()
            .filter(|response| range(response))
            .map(|response| response.range.as_ref().and_then(|range| range.kvs.first()))
            .collect()
    }
}

#[derive(Debug, Deserialize)]
pub(super) struct Header {
    #[serde(deserialize_with = "number")]
    pub(super) cluster_id: u64,
    #[serde(deserialize_with = "number")]
    pub(super) revision: u64,
}

#[derive(Debug, Deserialize)]
struct OperationResult {
    #[serde(rename = "response_range")]
    range: Option<RangeResult>,
}

#[derive(Debug, Deserialize)]
struct RangeResult {
    #[serde(default)]
    kvs: Vec<KeyValue>,
}

/// A key that is there.
#[derive(Debug, Deserialize)]
pub(super) struct KeyValue {
    #[serde(deserialize_with = "number")]
    pub(super) mod_revision: u64,
    #[serde(default, deserialize_with = "bytes")]
    pub(super) value: Vec<u8>,
}

/// A user's token.
#[derive(Debug, Deserialize)]
pub(super) struct Authenticated {
    pub(super) token: String,
}

/// What a member says when it does not do what it is asked.
#[derive(Debug, Deserialize)]
pub(super) struct Failure {
    #[serde(default)]
    pub(super) message: String,
    #[serde(default)]
    pub(super) code: i64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_transaction_is_written_as_etcd_documents_it() {
        let transaction = Transaction {
            compare: vec![Compare::unchanged("foo", 2)],
            success: vec![Operation::put("foo", b"bar")],
            failure: vec![Operation::range("foo")],
        };
        let text = serde_json::to_string(&transaction).expect("JSON");
        assert_eq!(
            text,
            r#"{"compare":[{"key":"Zm9v","target":"MOD","result":"EQUAL","modRevision":"2"}],"success":[{"requestPut":{"key":"Zm9v","value":"YmFy"}}],"failure":[{"requestRange":{"key":"Zm9v"}}]}"#
        );
    }

    #[test]
    fn results_are_read_also_where_zeroes_are_left_out() {
        let text = r#"{"header":{"cluster_id":"14841639068965178418","member_id":"10276657743932975437","revision":"3","raft_term":"2"},
            "responses":[{"response_range":{"header":{"revision":"3"},"kvs":[{"key":"Zm9v","create_revision":"2","mod_revision":"3",
            "version":"2","value":"YmFy"}],"count":"1"}},{"response_range":{"header":{"revision":"3"}}}]}"#;
        let result: TransactionResult = serde_json::from_str(text).expect("understood");
        assert!(!result.succeeded && result.header.revision == 3);
        let [Some(foo), None] = result.ranges()[..] else { panic!("{result:?}") };
        assert_eq!((foo.mod_revision, &foo.value[..]), (3, &b"bar"[..]));
        let text = r#"{"header":{"cluster_id":"1","revision":"4"},"succeeded":true,"responses":[{"response_put":{"header":{"revision":"4"}}}]}"#;
        let result: TransactionResult = serde_json::from_str(text).expect("understood");
        assert!(result.succeeded && result.ranges().is_empty());
        assert!(serde_json::from_str::<TransactionResult>(r#"{"header":{"cluster_id":"x","revision":"4"}}"#).is_err());
    }
}
