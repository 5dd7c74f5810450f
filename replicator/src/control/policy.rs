//! Policies that an operator chooses, as written on the command line, in the configuration and in requests.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// The shortest fixed epoch.
pub const MIN_EPOCH: Duration = Duration::from_millis(1);
/// The longest fixed epoch.
pub const MAX_EPOCH: Duration = Duration::from_secs(10);

/// When an epoch ends. Written `auto` or a duration such as `25ms`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum EpochPolicy {
    /// As soon as output waits, within bounds on the pause share and on the length.
    #[default]
    Auto,
    /// After this long.
    Fixed(Duration),
}

/// How much memory the primary's copy of sent pages may take. Written `full`, `off` or a size such as `512MiB`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum ShadowPolicy {
    /// All of the guest's memory.
    #[default]
    Full,
    /// At most this many bytes.
    Size(u64),
    /// None: no deltas.
    Off,
}

/// When the standby acknowledges an epoch's disk writes. Written `disk` or `memory`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DurabilityPolicy {
    /// When they are on its stable storage: nothing acknowledged is lost if both hosts lose power.
    #[default]
    Disk,
    /// When they are in its memory: faster, and only one of the hosts may be lost.
    Memory,
}

/// What is done without a third host, be it a witness or etcd, when the host that keeps the record is gone. Written `stall` or `manual`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum WithoutWitness {
    /// Nothing: the VM stands until that host is back.
    #[default]
    Stall,
    /// An operator may force that host out, once it is confirmed to be dead.
    Manual,
}

/// A policy that cannot be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PolicyError {
    /// Not an epoch policy.
    #[error("`{given}` is no epoch policy: write `auto` or a duration such as `25ms`")]
    Epoch {
        /// What was written.
        given: String,
    },
    /// An epoch length out of bounds.
    #[error("an epoch of {given} is out of bounds: write 1ms to 10s, or `auto`")]
    EpochBounds {
        /// What was written.
        given: String,
    },
    /// Not a durability.
    #[error("`{given}` is no durability: write `disk` or `memory`")]
    Durability {
        /// What was written.
        given: String,
    },
    /// Not a shadow policy.
    #[error("`{given}` is no shadow size: write `full`, `off` or a size such as `512MiB`")]
    Shadow {
        /// What was written.
        given: String,
    },
}

impl FromStr for EpochPolicy {
    type Err = PolicyError;

    fn from_str(text: &str) -> Result<Self, PolicyError> {
        if text == "auto" {
            return Ok(Self::Auto);
        }
        let length = humantime::parse_duration(text).map_err(|_| PolicyError::Epoch { given: text.into() })?;
        if !(MIN_EPOCH..=MAX_EPOCH).contains(&length) {
            return Err(PolicyError::EpochBounds { given: text.into() });
        }
        Ok(Self::Fixed(length))
    }
}

impl fmt::Display for EpochPolicy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            // Without spaces, so that it is one word on a command line.
            Self::Fixed(length) => f.write_str(&humantime::format_duration(*length).to_string().replace(' ', "")),
        }
    }
}

impl FromStr for DurabilityPolicy {
    type Err = PolicyError;

    fn from_str(text: &str) -> Result<Self, PolicyError> {
        match text {
            "disk" => Ok(Self::Disk),
            "memory" => Ok(Self::Memory),
            _ => Err(PolicyError::Durability { given: text.into() }),
        }
    }
}

impl FromStr for ShadowPolicy {
    type Err = PolicyError;

    fn from_str(text: &str) -> Result<Self, PolicyError> {
        match text {
            "full" => Ok(Self::Full),
            "off" => Ok(Self::Off),
            _ => match bytesize::ByteSize::from_str(text) {
                Ok(size) if size.as_u64() > 0 => Ok(Self::Size(size.as_u64())),
                _ => Err(PolicyError::Shadow { given: text.into() }),
            },
        }
    }
}

impl fmt::Display for ShadowPolicy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Full => f.write_str("full"),
            Self::Off => f.write_str("off"),
            Self::Size(bytes) => write!(f, "{bytes}B"),
        }
    }
}

impl TryFrom<String> for EpochPolicy {
    type Error = PolicyError;

    fn try_from(text: String) -> Result<Self, PolicyError> {
        text.parse()
    }
}

impl From<EpochPolicy> for String {
    fn from(policy: EpochPolicy) -> Self {
        policy.to_string()
    }
}

impl TryFrom<String> for ShadowPolicy {
    type Error = PolicyError;

    fn try_from(text: String) -> Result<Self, PolicyError> {
        text.parse()
    }
}

impl From<ShadowPolicy> for String {
    fn from(policy: ShadowPolicy) -> Self {
        policy.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_epoch_policy_reads_back_as_written() {
        for text in ["auto", "25ms", "1ms", "10s", "1s500ms"] {
            let policy: EpochPolicy = text.parse().unwrap();
            assert_eq!(policy.to_string(), text);
            let json = serde_json::to_string(&policy).unwrap();
            assert_eq!(serde_json::from_str::<EpochPolicy>(&json).unwrap(), policy);
        }
    }

    #[test]
    fn an_epoch_out_of_bounds_is_refused_with_the_bounds() {
        for text in ["500us", "11s", "0s"] {
            let error = text.parse::<EpochPolicy>().unwrap_err();
            assert!(error.to_string().contains("1ms to 10s"), "{error}");
        }
        assert!(matches!("often".parse::<EpochPolicy>(), Err(PolicyError::Epoch { .. })));
    }

    #[test]
    fn a_shadow_policy_reads_back_as_written() {
        for policy in [ShadowPolicy::Full, ShadowPolicy::Off, ShadowPolicy::Size(512 << 20), ShadowPolicy::Size(1)] {
            assert_eq!(policy.to_string().parse::<ShadowPolicy>().unwrap(), policy);
        }
        assert_eq!("512MiB".parse::<ShadowPolicy>().unwrap(), ShadowPolicy::Size(512 << 20));
        for text in ["0", "none", "-1", ""] {
            assert!(matches!(text.parse::<ShadowPolicy>(), Err(PolicyError::Shadow { .. })), "{text}");
        }
    }
}
