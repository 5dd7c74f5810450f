//! What may wait for a disk, or for a process, in the middle of a task.
//!
//! Promise: while it waits, the agent's other tasks go on, however few threads it has. The task itself waits, as it is meant to: nothing of its VM is done
//! before what it writes is there.

use tokio::runtime::{Handle, RuntimeFlavor};

/// Does `work` on this thread, and has another one do what else this one would.
pub(super) fn aside<T>(work: impl FnOnce() -> T) -> T {
    match Handle::try_current().map(|handle| handle.runtime_flavor()) {
        Ok(RuntimeFlavor::MultiThread) => tokio::task::block_in_place(work),
        // A test's own thread, or one that may wait.
        _ => work(),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;

    use super::*;

    #[test]
    fn other_tasks_go_on_with_one_thread() {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).build().expect("threads");
        let (tell, told) = channel();
        let waits = runtime.spawn(async move {
            // In vain, if the one thread waits here.
            tokio::spawn(async move { tell.send(7).expect("somebody waits") });
            aside(|| told.recv_timeout(std::time::Duration::from_secs(60)))
        });
        assert_eq!(runtime.block_on(waits).expect("it does not panic"), Ok(7));
        assert_eq!(aside(|| 8), 8, "outside of any");
        let own = tokio::runtime::Builder::new_current_thread().build().expect("one");
        assert_eq!(own.block_on(async { aside(|| 9) }), 9);
    }
}
