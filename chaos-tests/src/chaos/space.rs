//! Threads in a network namespace: what they open belongs to it.

use std::fs::File;
use std::os::fd::AsFd as _;
use std::path::Path;
use std::thread::JoinHandle;

use anyhow::{Context as _, Result};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

/// Starts a thread whose sockets and interfaces are those of namespace `space`; `begin` opens them, `go` uses them.
///
/// # Errors
/// If the namespace cannot be entered, or `begin` fails.
pub fn spawn<T: 'static, R: Send + 'static>(
    space: &str,
    begin: impl FnOnce() -> Result<T> + Send + 'static,
    go: impl FnOnce(T) -> R + Send + 'static,
) -> Result<JoinHandle<R>> {
    let path = Path::new("/run/netns").join(space);
    let file = File::open(&path).with_context(|| format!("cannot open {}", path.display()))?;
    let (tell, told) = std::sync::mpsc::sync_channel(1);
    let thread = std::thread::Builder::new().name(format!("in {space}")).spawn(move || {
        let entered = move_into_link_name_space(file.as_fd(), Some(LinkNameSpaceType::Network));
        let begun = entered.context("cannot enter the namespace").and_then(|()| begin());
        match begun {
            Ok(begun) => {
                let _ = tell.send(Ok(()));
                Some(go(begun))
            }
            Err(error) => {
                let _ = tell.send(Err(error));
                None
            }
        }
    })?;
    told.recv().context("the thread ended before it began")??;
    // From here on it has gone, or will go, through `go`.
    Ok(std::thread::spawn(move || thread.join().ok().flatten().expect("it began")))
}
