// The pool: num_threads() - 1 workers that sleep, each on a condition variable of its own, after a short spin for the
// next job. A job of n tasks wakes n - 1 of them at most. Whoever is free takes the next task, so uneven ones balance.
// One job at a time: a second caller (another Python thread, say) runs its tasks itself, inline, rather than wait.
// After fork() the child has no workers; they are made anew at its first job.
#include "cpu/threads.hpp"

#include <pthread.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <exception>
#include <list>
#include <memory>
#include <mutex>
#include <string>
#include <system_error>
#include <thread>

#include "cpu/limits.hpp"
#include "flash_attn/error.hpp"
#include "flash_attn/flash_attn.hpp"

namespace flash_attn {
namespace cpu {
namespace {

constexpr int kSpins = 2000;  // some ten microseconds: a wait is usually shorter, a wake-up longer

/// Tasks under way. Each run of tasks has a ticket counter: whoever is free takes the next ticket, so uneven tasks
/// balance. Order::rising has one run. Order::by_place has one for each worker, who begins with its own and then helps
/// with the others'.
struct Job {
  static constexpr int kMostRuns = 64;  // workers beyond share a run
  struct alignas(128) Ticket {
    std::atomic<int64_t> next{0};
  };

  const std::function<void(int64_t, int)>* task = nullptr;
  int64_t n = 0;
  int runs = 1;
  Ticket tickets[kMostRuns];
  alignas(128) std::atomic<bool> failed{false};
  std::exception_ptr error;

  int64_t begin_of(int run) const { return n * run / runs; }  // n below 2^57

  void work(int worker) {
    for (int i = 0; i < runs; ++i) work_on((worker + i) % runs, worker);
  }
  void work_on(int run, int worker) {
    const int64_t begin = begin_of(run), end = begin_of(run + 1);
    for (int64_t i; !failed.load(std::memory_order_relaxed) &&
                    (i = begin + tickets[run].next.fetch_add(1, std::memory_order_relaxed)) < end;) {
      try {
        (*task)(i, worker);
      } catch (...) {
        if (!failed.exchange(true)) error = std::current_exception();
      }
    }
  }
  /// Whether every task has been taken.
  bool taken() const {
    for (int run = 0; run < runs; ++run)
      if (begin_of(run) + tickets[run].next.load() < begin_of(run + 1)) return false;
    return true;
  }
};

class Pool {
 public:
  /// With fewer workers, if the system gives no more: jobs are done all the same.
  explicit Pool(int threads) : pid_(getpid()), threads_(threads) {
    try {
      for (int w = 1; w < threads; ++w) {
        workers_.emplace_back();
        Worker& worker = workers_.back();
        worker.thread = std::thread([this, w, &worker] { live(w, worker); });
      }
    } catch (const std::system_error&) {
      workers_.pop_back();  // the one that has no thread
    }
  }
  ~Pool() {
    if (getpid() != pid_) {  // a child has no workers to join
      for (auto& w : workers_) w.thread.detach();
      return;
    }
    {
      std::lock_guard lock(mutex_);
      stop_ = true;
      for (auto& w : workers_) w.generation.fetch_add(1);
    }
    for (auto& w : workers_) w.wake.notify_one();
    for (auto& w : workers_) w.thread.join();
  }
  int threads() const { return threads_; }

  /// On the caller and as many workers as make `threads`; the others are not woken.
  void run(Job& job, int threads) {
    const std::size_t helpers = std::min(static_cast<std::size_t>(threads - 1), workers_.size());
    const auto for_helpers = [&](const auto& body) {
      auto worker = workers_.begin();
      for (std::size_t i = 0; i < helpers; ++i, ++worker) body(*worker);
    };
    {
      std::lock_guard lock(mutex_);
      for_helpers([&](Worker& w) { w.job = &job, w.generation.fetch_add(1); });
    }
    for_helpers([](Worker& w) { w.wake.notify_one(); });
    job.work(0);
    {
      std::lock_guard lock(mutex_);
      for_helpers([](Worker& w) { w.job = nullptr; });  // whoever wakes from here on is too late, and is not waited for
    }
    for (int spin = 0; busy_.load(std::memory_order_acquire) != 0; ++spin)
      if (spin < kSpins)
        pause();
      else
        std::this_thread::yield();  // a worker has lost its core: it needs ours
  }

 private:
  /// Each sleeps on a condition of its own, so that a job wakes those it needs and no others.
  struct alignas(128) Worker {
    std::atomic<uint64_t> generation{0};  // raised for every job that wants the worker
    Job* job = nullptr;
    std::condition_variable wake;
    std::thread thread;
  };

  static void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#else
    std::this_thread::yield();
#endif
  }

  void live(int index, Worker& me) {
    uint64_t seen = 0;
    for (;;) {
      for (int spin = 0; spin < kSpins && me.generation.load(std::memory_order_acquire) == seen; ++spin) pause();
      Job* job;
      {
        std::unique_lock lock(mutex_);
        me.wake.wait(lock, [&] { return me.generation.load() != seen; });
        seen = me.generation.load();
        if (stop_) return;
        job = me.job;
        if (!job) continue;
        busy_.fetch_add(1, std::memory_order_relaxed);
      }
      job->work(index);
      busy_.fetch_sub(1, std::memory_order_release);
    }
  }

  const pid_t pid_;
  const int threads_;          // asked for, the caller among them
  std::list<Worker> workers_;  // a list: they stay where they are
  std::mutex mutex_;
  bool stop_ = false;
  std::atomic<int> busy_{0};
};

struct State {
  std::mutex mutex;  // held by the one caller whose job runs
  std::unique_ptr<Pool> pool;
  std::atomic<int> threads{0};  // 0: the default, which is read when it is needed
  std::shared_ptr<const ParallelFor> host;
};

/// Never destroyed: workers may outlive static destructors. A forked child starts with a fresh one.
std::atomic<State*> g_state{nullptr};

State& state() {
  State* s = g_state.load(std::memory_order_acquire);
  if (s) return *s;
  auto* fresh = new State;
  if (!g_state.compare_exchange_strong(s, fresh)) {
    delete fresh;
    return *s;
  }
  pthread_atfork(nullptr, nullptr, [] {
    State* parent = g_state.load();
    auto* child = new State;  // the parent's mutex may be held by a thread that does not exist here: left behind
    child->threads.store(parent->threads.load());
    child->host = std::atomic_load(&parent->host);
    g_state.store(child);
  });
  return *fresh;
}

}  // namespace

int max_workers() {
  State& s = state();
  int n = s.threads.load();
  if (n == 0) {
    s.threads.compare_exchange_strong(n, default_threads(thread_limits()));
    n = s.threads.load();
  }
  return n;
}

void parallel_for(int64_t n, int most, const std::function<void(int64_t, int)>& task, Order order) {
  State& s = state();
  const int threads = static_cast<int>(std::clamp<int64_t>(most, 1, std::max<int64_t>(n, 1)));
  std::unique_lock lock(s.mutex, std::defer_lock);
  if (threads == 1 || !lock.try_lock()) {
    for (int64_t i = 0; i < n; ++i) task(i, 0);
    return;
  }
  Job job;
  job.task = &task;
  job.n = n;
  if (order == Order::by_place) job.runs = std::min(threads, Job::kMostRuns);
  if (const auto host = std::atomic_load(&s.host)) {
    (*host)(threads, [&](int64_t worker) { job.work(static_cast<int>(worker)); });
    if (!job.taken() && !job.failed.load())
      throw Error(ErrorCode::internal, "set_parallel_for: the host's function returned before all tasks had run");
  } else {
    const int wanted = std::max(max_workers(), threads);
    if (!s.pool || s.pool->threads() != wanted) s.pool.reset(), s.pool = std::make_unique<Pool>(wanted);
    s.pool->run(job, threads);
  }
  if (job.error) std::rethrow_exception(job.error);
}

}  // namespace cpu

int num_threads() { return cpu::max_workers(); }

void set_num_threads(int n) {
  if (n > cpu::most_threads())
    throw Error(ErrorCode::invalid_argument,
                "num_threads: expected at most " + std::to_string(cpu::most_threads()) + ", got " + std::to_string(n));
  cpu::state().threads.store(std::max(n, 0));
}

void set_parallel_for(ParallelFor host) {
  std::atomic_store(&cpu::state().host,
                    host ? std::make_shared<const ParallelFor>(std::move(host)) : std::shared_ptr<const ParallelFor>());
}

}  // namespace flash_attn
