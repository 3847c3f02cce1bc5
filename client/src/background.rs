//! Threads for what nobody waits for. The system runs them only where nothing else wants to (on Linux, in its idle class):
//! whoever wakes up to serve a client has the core at once there, while else it waits until another's slice is over,
//! however nice that one is. Where they get next to nothing, others do their work for a while, behind all else but with
//! a share that is sure: a thread that has no privileges can't leave the idle class itself.

use std::cell::Cell;
use std::io;
use std::sync::{Arc, mpsc};
use std::time::Duration;

use tokio::runtime::{Builder, Handle, Runtime};
use tokio::sync::watch;
use tokio::task::JoinError;
use tokio_util::sync::{CancellationToken, DropGuard};

use crate::threads::{BEHIND, step_back};

/// Threads of the idle class starve if they waited so many times longer for a core than they had one...
const TIMES: u32 = 9;
/// ... and so long in all: who has little to do may well wait longer than it works.
const WAITED: Duration = Duration::from_millis(20);
/// How often that is looked at.
const LOOK: Duration = Duration::from_millis(100);
/// Where they starve, one of them does nothing but sleep and wake up again, so many times for so long...
const NAPS: u32 = 50;
const NAP: Duration = Duration::from_millis(10);
/// ... until all that takes it no more than this longer, of which a busy core makes seconds.
const LATE: Duration = Duration::from_millis(50);

/// The threads; they end with the last clone of this.
#[derive(Clone)]
pub struct Background {
    tasks: Handle,
    sure: Handle,
    starving: Starving,
    _stop: Arc<DropGuard>,
}

impl Background {
    /// Starts them.
    pub fn start() -> io::Result<Self> {
        let (stop, starving) = (CancellationToken::new(), Starving::default());
        let tasks = Builder::new_current_thread().enable_all().on_thread_start(give_way).build()?;
        // A thread begins in the class of who starts it: these are started by each other.
        let sure = Builder::new_multi_thread().worker_threads(1).on_thread_start(|| step_back(BEHIND)).build()?;
        let background = Self {
            tasks: tasks.handle().clone(),
            sure: sure.handle().clone(),
            starving: starving.clone(),
            _stop: Arc::new(stop.clone().drop_guard()),
        };
        std::thread::Builder::new().name("behind".into()).spawn(move || {
            step_back(BEHIND);
            drive(&tasks, &starving, &stop);
            // Not by dropping them, which would wait for reads that wait for the disk.
            tasks.shutdown_background();
            sure.shutdown_background();
        })?;
        Ok(background)
    }

    /// Where tasks run.
    pub fn tasks(&self) -> &Handle {
        &self.tasks
    }

    /// Does work that blocks, however much it is, with a share of the cores that is sure.
    pub async fn blocking<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> Result<T, JoinError> {
        self.sure.spawn(async { tokio::task::block_in_place(work) }).await
    }

    /// Does work that blocks and takes a millisecond or two: where the cores are busy all else goes before it, until
    /// that is noticed.
    pub async fn piece<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> Result<T, JoinError> {
        if self.starving.is() {
            return self.blocking(work).await;
        }
        let starving = self.starving.clone();
        let judged = move || {
            starving.judge();
            let done = work();
            starving.judge();
            done
        };
        self.tasks.spawn_blocking(judged).await
    }
}

/// Runs a runtime's tasks on a thread of the idle class, and on this one for as long as that starves, until `stop`.
fn drive(runtime: &Runtime, starving: &Starving, stop: &CancellationToken) {
    std::thread::scope(|scope| {
        let (turn, turns) = mpsc::channel::<()>();
        let (done, turned) = mpsc::channel();
        let idle = move || {
            give_way();
            for () in turns {
                runtime.block_on(stop.run_until_cancelled(starving.begins()));
                let _ = done.send(());
                starving.try_until_it_ends(stop);
            }
        };
        if let Err(error) = std::thread::Builder::new().name("behind-idle".into()).spawn_scoped(scope, idle) {
            tracing::warn!(%error, "no thread of the idle class");
        }
        while !stop.is_cancelled() {
            let had_its_turn = turn.send(()).is_ok() && turned.recv().is_ok();
            if had_its_turn {
                runtime.block_on(stop.run_until_cancelled(starving.ends()));
            } else {
                runtime.block_on(stop.cancelled());
            }
        }
    });
}

/// Whether threads of the idle class starve; a clone tells of the same.
#[derive(Clone, Default)]
struct Starving(watch::Sender<bool>);

impl Starving {
    fn is(&self) -> bool {
        *self.0.borrow()
    }

    /// Judges by what this thread has had of a core since it was last judged.
    fn judge(&self) {
        if Share::since_last().is_some_and(Share::starves) {
            self.0.send_if_modified(|starving| !std::mem::replace(starving, true));
        }
    }

    /// Waits until they do, and sees to it that this thread is judged.
    async fn begins(&self) {
        let mut changes = self.0.subscribe();
        while !*changes.borrow_and_update() {
            let _ = tokio::time::timeout(LOOK, changes.changed()).await;
            self.judge();
        }
    }

    /// Tries on this thread, which holds up nobody, whether they still do, until they don't. Blocks.
    fn try_until_it_ends(&self, stop: &CancellationToken) {
        while self.is() && !stop.is_cancelled() {
            let _ = Share::since_last();
            for _ in 0..NAPS {
                std::thread::sleep(NAP);
            }
            if Share::since_last().is_none_or(|share| share.waited < LATE) {
                self.0.send_replace(false);
            }
        }
    }

    /// Waits until they no longer do.
    async fn ends(&self) {
        let _ = self.0.subscribe().wait_for(|starving| !starving).await;
    }
}

/// What a thread has had.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Share {
    /// Of a core.
    ran: Duration,
    /// In waiting for one.
    waited: Duration,
}

impl Share {
    /// This thread's since the last time; `None` where the system does not say.
    fn since_last() -> Option<Self> {
        thread_local!(static LAST: Cell<Share> = Cell::default());
        let now = Self::here()?;
        let last = LAST.replace(now);
        Some(Self { ran: now.ran.saturating_sub(last.ran), waited: now.waited.saturating_sub(last.waited) })
    }

    /// This thread's in all.
    fn here() -> Option<Self> {
        Self::parse(&std::fs::read_to_string("/proc/thread-self/schedstat").ok()?)
    }

    /// Nanoseconds of both, and how often it had one: never, says a system that does not count.
    fn parse(said: &str) -> Option<Self> {
        let mut numbers = said.split_ascii_whitespace().map(|number| number.parse().ok());
        let [ran, waited, times] = [(); 3].map(|()| numbers.next().flatten());
        (times? > 0).then_some(Self { ran: Duration::from_nanos(ran?), waited: Duration::from_nanos(waited?) })
    }

    fn starves(self) -> bool {
        self.waited >= WAITED && self.waited > self.ran * TIMES
    }
}

/// Lets this thread run only where no other wants to, where it can be told whether it starves; else, behind others.
fn give_way() {
    #[cfg(target_os = "linux")]
    if Share::here().is_some() {
        use thread_priority::{
            NormalThreadSchedulePolicy, ThreadPriority, ThreadSchedulePolicy, set_thread_priority_and_policy,
            thread_native_id,
        };
        let idle = ThreadSchedulePolicy::Normal(NormalThreadSchedulePolicy::Idle);
        // It may fail where it then sets how nice the thread is, which does not count there.
        let _ = set_thread_priority_and_policy(thread_native_id(), ThreadPriority::Min, idle);
    }
    step_back(BEHIND);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_waits_long_beside_a_little_work_starves() {
        let starves =
            |ran, waited| Share { ran: Duration::from_millis(ran), waited: Duration::from_millis(waited) }.starves();
        assert!(starves(2, 20));
        assert!(!starves(3, 20), "it has a tenth");
        assert!(!starves(1, 19), "it has little to do");
        assert!(!starves(0, 0));
    }

    #[test]
    fn a_share_is_known_where_the_system_counts() {
        let share = Share { ran: Duration::from_nanos(12), waited: Duration::from_nanos(345) };
        assert_eq!(Share::parse("12 345 6\n"), Some(share));
        for said in ["0 0 0\n", "", "12 345", "x y z"] {
            assert_eq!(Share::parse(said), None, "{said:?}");
        }
    }

    #[cfg(target_os = "linux")]
    mod on_linux {
        use super::*;
        use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};
        use thread_priority::{NormalThreadSchedulePolicy, ThreadSchedulePolicy, thread_schedule_policy};

        const DEADLINE: Duration = Duration::from_secs(60);

        fn is_idle() -> bool {
            thread_schedule_policy().unwrap() == ThreadSchedulePolicy::Normal(NormalThreadSchedulePolicy::Idle)
        }

        /// Lets this thread, and those that it starts, have no core but the first that it may have.
        fn keep_to_one_core() {
            let may = sched_getaffinity(None).unwrap();
            let mut one = CpuSet::new();
            one.set((0..CpuSet::MAX_CPU).find(|core| may.is_set(*core)).unwrap());
            sched_setaffinity(None, &one).unwrap();
        }

        #[test]
        fn a_thread_gives_way_where_it_can_be_told_how_it_fares() {
            let given = std::thread::spawn(|| {
                give_way();
                (is_idle(), rustix::process::getpriority_process(None).unwrap())
            });
            assert_eq!(given.join().unwrap(), (Share::here().is_some(), BEHIND));
        }

        #[tokio::test]
        async fn what_is_sure_is_never_of_the_idle_class_whoever_asks_for_it() {
            let background = Background::start().unwrap();
            let asking = background.clone();
            // More than its pool has at first.
            let many = async move {
                let work = || (is_idle(), rustix::process::getpriority_process(None).unwrap());
                futures::future::join_all((0..9).map(|_| asking.blocking(work))).await
            };
            for (idle, nice) in background.tasks().spawn(many).await.unwrap().into_iter().map(Result::unwrap) {
                assert_eq!((idle, nice), (false, BEHIND));
            }
        }

        #[test]
        fn it_goes_on_where_the_core_is_busy_and_gives_way_again_after_that() {
            let on_one_core = || {
                keep_to_one_core();
                let runtime = Builder::new_current_thread().enable_all().build().unwrap();
                runtime.block_on(async {
                    let background = Background::start().unwrap();
                    let mut starving = background.starving.0.subscribe();
                    let over = CancellationToken::new();
                    let busy = over.clone();
                    let busy = std::thread::spawn(move || while !busy.is_cancelled() {});
                    let work = || is_idle();
                    let mut until_relief = Vec::new();
                    while !*starving.borrow_and_update() {
                        until_relief.push(background.piece(work).await.unwrap());
                    }
                    assert!(until_relief[0], "it is of the idle class at first");
                    // Both what blocks and tasks.
                    while background.piece(work).await.unwrap()
                        || background.tasks().spawn(async { is_idle() }).await.unwrap()
                    {}
                    over.cancel();
                    busy.join().unwrap();
                    starving.wait_for(|starving| !starving).await.unwrap();
                    while !background.piece(work).await.unwrap()
                        || !background.tasks().spawn(async { is_idle() }).await.unwrap()
                    {}
                });
            };
            let (done, finished) = mpsc::channel();
            std::thread::spawn(move || {
                on_one_core();
                let _ = done.send(());
            });
            finished.recv_timeout(DEADLINE).expect("it went on, and gave way again, in time");
        }
    }
}
