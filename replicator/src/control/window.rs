//! The pairing window of a daemon: at most one is open, and a new one closes the one before.
//!
//! Promise: the answer names an address that listens and a code that is good until the time it says.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use heartbeat::trust::{self, PairError, WindowLimits};
use tokio::sync::Mutex;
use tokio::task::JoinHandle;

use super::api::{ErrorBody, ErrorKind, PairOpenRequest, PairWindow};
use crate::cli::MAX_PAIRING;

/// How often a window's address is tried, and the time between: the window before may just be letting go of it.
const BIND_TRIES: u32 = 20;
const BIND_AGAIN: Duration = Duration::from_millis(25);

/// The place of the one open window.
#[derive(Debug, Default)]
pub(crate) struct PairingWindow {
    open: Mutex<Option<JoinHandle<()>>>,
}

impl PairingWindow {
    /// Opens the window of the daemon called `name`. `open` binds its address.
    ///
    /// # Errors
    /// If the time asked for is out of bounds, or the address cannot be had.
    pub(crate) async fn open(
        &self,
        request: &PairOpenRequest,
        name: &str,
        open: impl Fn(WindowLimits) -> Result<trust::PairWindow, PairError> + Send,
    ) -> Result<PairWindow, ErrorBody> {
        let open_for = Duration::from_secs(request.ttl_s);
        if open_for.is_zero() || open_for > MAX_PAIRING {
            return Err(ErrorBody::new(ErrorKind::Invalid, "a pairing window is open for 1 second to 1 hour"));
        }
        let failed =
            |error: PairError| ErrorBody::new(ErrorKind::Failed, "the pairing window cannot be opened").because(&error);
        let mut place = self.open.lock().await;
        if let Some(old) = place.take() {
            old.abort();
        }
        let limits = WindowLimits { open_for, ..WindowLimits::default() };
        let mut tries = 1;
        let window = loop {
            match open(limits) {
                Err(PairError::Bind { .. }) if tries < BIND_TRIES => tokio::time::sleep(BIND_AGAIN).await,
                other => break other.map_err(failed)?,
            }
            tries += 1;
        };
        let answer = PairWindow {
            name: name.to_owned(),
            code: window.code().to_string(),
            address: window.local_addr().map_err(failed)?.to_string(),
            expires_unix_ms: unix_ms(SystemTime::now() + open_for),
        };
        *place = Some(tokio::spawn(async move {
            if let Err(error) = window.wait().await {
                tracing::warn!(%error, "the pairing window closed without a peer");
            }
        }));
        Ok(answer)
    }
}

fn unix_ms(at: SystemTime) -> u64 {
    let since = at.duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}
