//! The keys and values, and the answers to requests about them.

use alloc::collections::BTreeMap;
use alloc::format;
use alloc::vec::Vec;

use crate::disk::Log;
use crate::machine::clock;

/// All keys and values.
#[derive(Default)]
pub struct Store(BTreeMap<Vec<u8>, Vec<u8>>);

impl Store {
    /// Carries out a request and writes its answer to `into`. What it changes is appended to `log` first.
    pub fn answer(&mut self, words: &[&[u8]], log: Option<&mut Log>, into: &mut Vec<u8>) {
        let Some((name, rest)) = words.split_first() else { return };
        match (name.to_ascii_uppercase().as_slice(), rest) {
            (b"PING", []) => into.extend_from_slice(b"+PONG\r\n"),
            (b"SET", [key, value]) => {
                if self.put(key, value, log) {
                    into.extend_from_slice(b"+OK\r\n")
                } else {
                    full(into)
                }
            }
            (b"GET", [key]) => bulk(self.0.get(*key).map(Vec::as_slice), into),
            (b"MGET", keys @ [_, ..]) => {
                into.extend_from_slice(format!("*{}\r\n", keys.len()).as_bytes());
                keys.iter().for_each(|&key| bulk(self.0.get(key).map(Vec::as_slice), into));
            }
            (b"TIME", []) => {
                let microseconds = clock() / 1000;
                into.extend_from_slice(b"*2\r\n");
                for part in [microseconds / 1_000_000, microseconds % 1_000_000] {
                    bulk(Some(format!("{part}").as_bytes()), into);
                }
            }
            (b"INCR", [key]) => {
                let old = self.0.get(*key).map_or(Some(0), |value| core::str::from_utf8(value).ok()?.parse().ok());
                match old.and_then(|old: i64| old.checked_add(1)) {
                    Some(new) if self.put(key, format!("{new}").as_bytes(), log) => {
                        into.extend_from_slice(format!(":{new}\r\n").as_bytes());
                    }
                    Some(_) => full(into),
                    None => into.extend_from_slice(b"-ERR value is not an integer or out of range\r\n"),
                }
            }
            (b"DBSIZE", []) => into.extend_from_slice(format!(":{}\r\n", self.0.len()).as_bytes()),
            _ => into.extend_from_slice(b"-ERR unknown command or wrong number of arguments\r\n"),
        }
    }

    fn put(&mut self, key: &[u8], value: &[u8], log: Option<&mut Log>) -> bool {
        if let Some(log) = log {
            let mut text = Vec::with_capacity(key.len() + value.len() + 1);
            text.extend_from_slice(key);
            text.push(b'=');
            text.extend_from_slice(value);
            if !log.append(&text) {
                return false;
            }
        }
        match self.0.get_mut(key) {
            Some(old) => {
                old.clear();
                old.extend_from_slice(value);
            }
            None => drop(self.0.insert(key.to_vec(), value.to_vec())),
        }
        true
    }
}

/// A bulk string, or that there is none.
fn bulk(value: Option<&[u8]>, into: &mut Vec<u8>) {
    let Some(value) = value else { return into.extend_from_slice(b"$-1\r\n") };
    into.extend_from_slice(format!("${}\r\n", value.len()).as_bytes());
    into.extend_from_slice(value);
    into.extend_from_slice(b"\r\n");
}

fn full(into: &mut Vec<u8>) {
    into.extend_from_slice(b"-ERR the log's disk is full\r\n");
}
