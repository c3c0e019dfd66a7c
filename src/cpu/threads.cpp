// The pool: num_threads() - 1 workers that sleep on a condition variable, after a short spin for the next job. A job is
// a ticket counter; whoever is free takes the next ticket, so uneven tasks balance. One job at a time: a second caller
// (another Python thread, say) runs its tasks itself, inline, rather than wait. After fork() the child has no workers;
// they are made anew at its first job.
#include "cpu/threads.hpp"

#include <pthread.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <exception>
#include <memory>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

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
    workers_.reserve(static_cast<std::size_t>(threads));
    try {
      for (int w = 1; w < threads; ++w) workers_.emplace_back([this, w] { live(w); });
    } catch (const std::system_error&) {
    }
  }
  ~Pool() {
    if (getpid() != pid_) {  // a child has no workers to join
      for (auto& t : workers_) t.detach();
      return;
    }
    {
      std::lock_guard lock(mutex_);
      stop_ = true;
      generation_.fetch_add(1);
    }
    wake_.notify_all();
    for (auto& t : workers_) t.join();
  }
  int threads() const { return threads_; }
  bool of_this_process() const { return getpid() == pid_; }

  void run(Job& job) {
    {
      std::lock_guard lock(mutex_);
      job_ = &job;
      generation_.fetch_add(1);
    }
    wake_.notify_all();
    job.work(0);
    {
      std::lock_guard lock(mutex_);
      job_ = nullptr;  // whoever wakes from here on is too late, and is not waited for
    }
    for (int spin = 0; busy_.load(std::memory_order_acquire) != 0; ++spin)
      if (spin < kSpins)
        pause();
      else
        std::this_thread::yield();  // a worker has lost its core: it needs ours
  }

 private:
  static void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#else
    std::this_thread::yield();
#endif
  }

  void live(int worker) {
    uint64_t seen = 0;
    for (;;) {
      for (int spin = 0; spin < kSpins && generation_.load(std::memory_order_acquire) == seen; ++spin) pause();
      Job* job;
      {
        std::unique_lock lock(mutex_);
        wake_.wait(lock, [&] { return generation_.load() != seen; });
        seen = generation_.load();
        if (stop_) return;
        job = job_;
        if (!job) continue;
        busy_.fetch_add(1, std::memory_order_relaxed);
      }
      job->work(worker);
      busy_.fetch_sub(1, std::memory_order_release);
    }
  }

  const pid_t pid_;
  const int threads_;  // asked for, the caller among them
  std::vector<std::thread> workers_;
  std::mutex mutex_;
  std::condition_variable wake_;
  Job* job_ = nullptr;
  bool stop_ = false;
  std::atomic<uint64_t> generation_{0};
  std::atomic<int> busy_{0};
};

struct State {
  std::mutex mutex;  // held by the one caller whose job runs
  std::unique_ptr<Pool> pool;
  std::atomic<int> threads{0};  // 0: not decided yet
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

void parallel_for(int64_t n, int threads, const std::function<void(int64_t, int)>& task, Order order) {
  State& s = state();
  std::unique_lock lock(s.mutex, std::defer_lock);
  if (n <= 1 || threads == 1 || !lock.try_lock()) {
    for (int64_t i = 0; i < n; ++i) task(i, 0);
    return;
  }
  Job job;
  job.task = &task;
  job.n = n;
  if (order == Order::by_place) job.runs = static_cast<int>(std::min<int64_t>({n, threads, Job::kMostRuns}));
  if (const auto host = std::atomic_load(&s.host)) {
    (*host)(std::min<int64_t>(n, threads), [&](int64_t worker) { job.work(static_cast<int>(worker)); });
    if (!job.taken() && !job.failed.load())
      throw Error(ErrorCode::internal, "set_parallel_for: the host's function returned before all tasks had run");
  } else {
    if (!s.pool || s.pool->threads() != threads) s.pool.reset(), s.pool = std::make_unique<Pool>(threads);
    s.pool->run(job);
  }
  if (job.error) std::rethrow_exception(job.error);
}

}  // namespace cpu

int num_threads() { return cpu::max_workers(); }

void set_num_threads(int n) { cpu::state().threads.store(n > 0 ? n : cpu::default_threads(cpu::thread_limits())); }

void set_parallel_for(ParallelFor host) {
  std::atomic_store(&cpu::state().host,
                    host ? std::make_shared<const ParallelFor>(std::move(host)) : std::shared_ptr<const ParallelFor>());
}

}  // namespace flash_attn
