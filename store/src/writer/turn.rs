//! Who writes: the replica's thread, which drains the queue, or a caller who finds nobody there, has nothing to wait for
//! and takes the thread's turn, so that no two threads have to be woken for a small put. Commands keep their order.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::{mpsc, oneshot};
use vasto_client::env::Env;

use super::{Command, Writer};
use crate::replica::Progress;

/// Whose turn it is to write: the replica's thread's, or that of a caller who finds nobody there and has nothing to
/// wait for.
pub struct Turn {
    /// `None`: it has stopped.
    writer: Mutex<Option<Writer>>,
    /// How many commands are in the queue, or out of it and not done.
    before: Arc<AtomicUsize>,
    stalls: Arc<Stalls>,
    env: Env,
    progress: Arc<Progress>,
}

impl Turn {
    /// Nobody's yet.
    pub fn new(writer: Writer, stalls: Arc<Stalls>) -> Self {
        let (env, progress) = (writer.env.clone(), writer.progress.clone());
        Self { writer: Mutex::new(Some(writer)), before: Arc::default(), stalls, env, progress }
    }

    /// For a command that goes into the queue: nobody overtakes it.
    pub fn queued(&self, command: Command) -> Queued {
        self.before.fetch_add(1, Ordering::AcqRel);
        Queued { command, place: Place(self.before.clone()) }
    }

    /// Takes what comes by the queue until that closes or a `Stop`: the thread of a replica.
    pub fn run(&self, mut queue: mpsc::Receiver<Queued>) {
        let mut waiting = Vec::new();
        while let Some(first) = queue.blocking_recv() {
            if let Some(stopped) = self.take(first, &mut queue, &mut waiting) {
                return self.end(queue, Some(stopped));
            }
        }
        self.end(queue, None);
    }

    /// The same as a task, where there is but one thread.
    pub async fn run_inline(&self, mut queue: mpsc::Receiver<Queued>) {
        let mut waiting = Vec::new();
        while let Some(first) = queue.recv().await {
            self.env.pace().await;
            if let Some(stopped) = self.take(first, &mut queue, &mut waiting) {
                return self.end(queue, Some(stopped));
            }
        }
        self.end(queue, None);
    }

    fn take(
        &self,
        first: Queued,
        queue: &mut mpsc::Receiver<Queued>,
        waiting: &mut Vec<Command>,
    ) -> Option<oneshot::Sender<()>> {
        // Who panicked while it wrote has left it in no known state.
        let mut writer = self.writer.lock().unwrap_or_else(|poisoned| {
            self.progress.poison("its writer panicked".to_owned());
            PoisonError::into_inner(poisoned)
        });
        // Left only after the last of them is done.
        let _places = drain(first, queue, waiting);
        writer.as_mut()?.take(waiting)
    }

    fn end(&self, queue: mpsc::Receiver<Queued>, stopped: Option<oneshot::Sender<()>>) {
        let mut writer = self.writer.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(writer) = &mut writer {
            writer.stop();
        }
        drop(queue);
        // Closed before the answer: the folder may be opened again at once.
        drop(writer);
        if let Some(stopped) = stopped {
            let _ = stopped.send(());
        }
    }

    /// Takes a command here and now, where it is nobody's turn and none is before it. What has to go by the queue after
    /// that: the command, if it was not taken; word of a batch that is held back; nothing.
    pub fn try_take(&self, command: Command) -> Option<Command> {
        let begin = self.env.now_ms();
        if self.stalls.lately(begin) {
            return Some(command);
        }
        let done = match self.writer.try_lock().as_deref_mut() {
            Ok(Some(writer)) if writer.held.is_none() && self.before.load(Ordering::Acquire) == 0 => {
                writer.take_at_once(command)
            }
            _ => return Some(command),
        };
        self.stalls.wrote(begin, self.env.now_ms());
        (!done).then_some(Command::Held)
    }
}

/// Whether the disk has lately held up somebody who wrote on the thread that serves: then all leave it to the writers'
/// threads for a while. One for all replicas on a disk.
#[derive(Debug, Default)]
pub struct Stalls {
    /// In unix ms.
    until: AtomicU64,
}

impl Stalls {
    /// A write that takes so long, in ms, was held up.
    const LEAST: u64 = 5;
    /// The while is so many times what the write took, so that little of a thread's time is lost.
    const TIMES: u64 = 20;
    /// And no longer than this, in ms, also if the clock is set back meanwhile.
    const MOST: u64 = 10_000;

    fn lately(&self, now_ms: u64) -> bool {
        let left = self.until.load(Ordering::Relaxed).saturating_sub(now_ms);
        left > 0 && left <= Self::MOST
    }

    fn wrote(&self, begin_ms: u64, end_ms: u64) {
        let took = end_ms.saturating_sub(begin_ms);
        if took >= Self::LEAST {
            self.until.store(end_ms + (took * Self::TIMES).min(Self::MOST), Ordering::Relaxed);
        }
    }
}

/// A command in the queue.
pub struct Queued {
    /// What to do.
    pub command: Command,
    place: Place,
}

/// A command's place; free once this is dropped.
struct Place(Arc<AtomicUsize>);

impl Drop for Place {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}

/// `first`, and what else waits, up to 256 in all; with their places.
fn drain(first: Queued, queue: &mut mpsc::Receiver<Queued>, waiting: &mut Vec<Command>) -> Vec<Place> {
    let mut places = vec![first.place];
    waiting.push(first.command);
    while waiting.len() < 256 {
        let Ok(more) = queue.try_recv() else { break };
        places.push(more.place);
        waiting.push(more.command);
    }
    places
}
