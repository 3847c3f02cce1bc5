//! Threads that serve connections, each with a runtime of its own: all that belongs to one connection is done on one
//! thread, so that its steps follow each other there. On a runtime that threads share, each step may wake another
//! core first, which costs more than a small message does.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use tokio::runtime::{Builder, Handle};
use tokio_util::sync::{CancellationToken, DropGuard};

/// How nice a thread is behind others: where all are busy, it gets a tenth of what another does.
pub(crate) const BEHIND: i32 = 10;
/// The same, a third.
const A_LITTLE_BEHIND: i32 = 5;

/// So many threads; they end with the last clone of this.
#[derive(Clone)]
pub struct Threads(Arc<Inner>);

struct Inner {
    handles: Vec<Handle>,
    turn: AtomicUsize,
    _stop: DropGuard,
}

impl Threads {
    /// Starts them; at least one.
    pub fn start(count: usize) -> io::Result<Self> {
        let stop = CancellationToken::new();
        let mut handles = Vec::new();
        for number in 0..count.max(1) {
            let runtime = Builder::new_current_thread().enable_all().build()?;
            handles.push(runtime.handle().clone());
            let stop = stop.clone();
            std::thread::Builder::new().name(format!("serve-{number}")).spawn(move || {
                runtime.block_on(stop.cancelled());
                // Not by dropping it, which would wait for reads that wait for the disk.
                runtime.shutdown_background();
            })?;
        }
        Ok(Self(Arc::new(Inner { handles, turn: AtomicUsize::new(0), _stop: stop.drop_guard() })))
    }

    /// All of them.
    pub fn all(&self) -> &[Handle] {
        &self.0.handles
    }

    /// The place among all of the one whose turn it is, whoever asks: several servers share them.
    pub fn turn(&self) -> usize {
        self.0.turn.fetch_add(1, Ordering::Relaxed) % self.0.handles.len()
    }

    /// The one whose turn it is.
    pub fn next(&self) -> &Handle {
        &self.0.handles[self.turn()]
    }
}

/// Does this on a thread of its own, so that the threads which it starts, such as those that a library keeps, go a little
/// behind others: each begins as nice as who started it.
pub fn a_little_behind(work: impl FnOnce() + Send) {
    std::thread::scope(|scope| {
        scope.spawn(|| {
            step_back(A_LITTLE_BEHIND);
            work();
        });
    });
}

/// Lets other threads go before this one. A thread may never step forward again, so only its own may step back.
#[cfg_attr(not(target_os = "linux"), allow(unused_variables))]
pub(crate) fn step_back(nice: i32) {
    // Elsewhere it would be the whole process that steps back.
    #[cfg(target_os = "linux")]
    let _ = rustix::process::setpriority_process(None, nice);
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[tokio::test]
    async fn each_gets_its_turn_and_they_end_with_the_last_handle() {
        let threads = Threads::start(3).unwrap();
        let mut seen = HashSet::new();
        for _ in 0..3 {
            let name = threads.next().spawn(async { std::thread::current().name().map(str::to_owned) });
            seen.insert(name.await.unwrap().unwrap());
        }
        assert_eq!(seen, ["serve-0", "serve-1", "serve-2"].map(String::from).into());
        let endless = threads.next().spawn(std::future::pending::<()>());
        drop(threads);
        assert!(endless.await.unwrap_err().is_cancelled());
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn threads_that_are_started_a_little_behind_are_so() {
        let nice = || rustix::process::getpriority_process(None).unwrap();
        let here = nice();
        let mut kept = None;
        a_little_behind(|| kept = std::thread::spawn(nice).join().ok());
        assert_eq!((kept, nice()), (Some(A_LITTLE_BEHIND), here));
    }
}
