// A chat loop in C++: several conversations over one pool of pages, on the host's own threads. A turn's prompt is
// attended to at once, then the answer token by token; conversations join and leave between steps, and their pages are
// handed on. What an inference engine owns: threads, pages, tables, lengths. Checked against a causal call per
// conversation.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <condition_variable>
#include <cstdio>
#include <flash_attn/flash_attn.hpp>
#include <functional>
#include <mutex>
#include <random>
#include <thread>
#include <vector>

namespace {

using flash_attn::view;

constexpr int64_t kHeads = 8, kHeadsK = 2, kDim = 64, kPage = 16, kPoolPages = 24, kMaxPages = 16;

/// The host's threads, as any engine has them: the library gets them lent, and starts none of its own.
class Pool {
 public:
  explicit Pool(int threads) {
    for (int i = 1; i < threads; ++i) workers_.emplace_back([this] { work(); });
  }
  ~Pool() {
    {
      const std::lock_guard lock(mutex_);
      stop_ = true;
    }
    wake_.notify_all();
    for (std::thread& t : workers_) t.join();
  }
  /// Runs task(0) to task(n - 1), with the caller's help, and returns after the last.
  void run(int64_t n, const std::function<void(int64_t)>& task) {
    {
      const std::lock_guard lock(mutex_);
      task_ = &task, tasks_ = n, next_ = 0, busy_ = static_cast<int>(workers_.size()), ++round_;
    }
    wake_.notify_all();
    take();
    std::unique_lock lock(mutex_);
    done_.wait(lock, [this] { return busy_ == 0; });
    ran += n;
  }
  int64_t ran = 0;

 private:
  void take() {
    for (int64_t i; (i = next_++) < tasks_;) (*task_)(i);
  }
  void work() {
    for (int64_t seen = 0;;) {
      {
        std::unique_lock lock(mutex_);
        wake_.wait(lock, [&] { return stop_ || round_ != seen; });
        if (stop_) return;
        seen = round_;
      }
      take();
      const std::lock_guard lock(mutex_);
      if (--busy_ == 0) done_.notify_one();
    }
  }
  std::vector<std::thread> workers_;
  std::mutex mutex_;
  std::condition_variable wake_, done_;
  const std::function<void(int64_t)>* task_ = nullptr;
  std::atomic<int64_t> next_{0};
  int64_t tasks_ = 0, round_ = 0;
  int busy_ = 0;
  bool stop_ = false;
};

/// q, k, v of the tokens of a conversation, as a model would compute them one after the other, and what came of them.
struct Conversation {
  std::vector<float> q, k, v, out;
  std::vector<int32_t> pages;
  int64_t length = 0;  // tokens in the cache

  void say(int64_t tokens, std::mt19937& random) {
    std::normal_distribution<float> normal;
    const auto grow = [&](std::vector<float>& x, int64_t n) {
      for (int64_t i = 0; i < n; ++i) x.push_back(normal(random));
    };
    grow(q, tokens * kHeads * kDim), grow(k, tokens * kHeadsK * kDim), grow(v, tokens * kHeadsK * kDim);
    out.resize(q.size());
  }
};

class Engine {
 public:
  Engine() : k_(kPoolPages * kPage * kHeadsK * kDim), v_(k_.size()) {
    for (int32_t i = 0; i < kPoolPages; ++i) free_.push_back(i);
  }

  /// The next `tokens` of each conversation, in one call: ragged prompts and single tokens alike.
  void step(const std::vector<Conversation*>& batch, const std::vector<int64_t>& tokens) {
    const auto n = static_cast<int64_t>(batch.size());
    std::vector<int32_t> cu(1, 0), lengths, table(static_cast<std::size_t>(n * kMaxPages), 0);
    std::vector<float> q, k, v;
    for (int64_t b = 0; b < n; ++b) {
      Conversation& c = *batch[b];
      while (static_cast<int64_t>(c.pages.size()) * kPage < c.length + tokens[b]) {
        c.pages.push_back(free_.back());
        free_.pop_back();
      }
      std::copy(c.pages.begin(), c.pages.end(), table.begin() + b * kMaxPages);
      lengths.push_back(static_cast<int32_t>(c.length));
      cu.push_back(cu.back() + static_cast<int32_t>(tokens[b]));
      append(q, c.q, c.length, tokens[b], kHeads), append(k, c.k, c.length, tokens[b], kHeadsK);
      append(v, c.v, c.length, tokens[b], kHeadsK);
    }
    std::vector<float> out(q.size());
    flash_attn::forward({
        .q = view(q.data(), {cu.back(), kHeads, kDim}),
        .k = view(k_.data(), {kPoolPages, kPage, kHeadsK, kDim}),
        .v = view(v_.data(), {kPoolPages, kPage, kHeadsK, kDim}),
        .out = view(out.data(), {cu.back(), kHeads, kDim}),
        .sequences = {.cu_seqlens_q = view(cu.data(), {n + 1}),
                      .seqused_k = view(lengths.data(), {n}),
                      .block_table = view(table.data(), {n, kMaxPages})},
        .scores = {.causal = true},
        .new_keys = {.k = view(k.data(), {cu.back(), kHeadsK, kDim}),
                     .v = view(v.data(), {cu.back(), kHeadsK, kDim}),
                     .cu_seqlens = view(cu.data(), {n + 1})},
    });
    for (int64_t b = 0; b < n; ++b) {
      Conversation& c = *batch[b];
      std::copy(out.begin() + cu[b] * kHeads * kDim, out.begin() + cu[b + 1] * kHeads * kDim,
                c.out.begin() + c.length * kHeads * kDim);
      c.length += tokens[b];
    }
  }
  void leave(Conversation& c) {
    free_.insert(free_.end(), c.pages.begin(), c.pages.end());
    c.pages.clear();
  }
  std::size_t free_pages() const { return free_.size(); }

 private:
  static void append(std::vector<float>& to, const std::vector<float>& from, int64_t first, int64_t n, int64_t heads) {
    to.insert(to.end(), from.begin() + first * heads * kDim, from.begin() + (first + n) * heads * kDim);
  }
  std::vector<float> k_, v_;
  std::vector<int32_t> free_;
};

double difference_from_one_call(const Conversation& c) {
  std::vector<float> want(c.out.size());
  const auto shaped = [&](const std::vector<float>& x, int64_t heads) {
    return view(x.data(), {1, c.length, heads, kDim});
  };
  flash_attn::forward({.q = shaped(c.q, kHeads),
                       .k = shaped(c.k, kHeadsK),
                       .v = shaped(c.v, kHeadsK),
                       .out = shaped(want, kHeads),
                       .scores = {.causal = true}});
  double worst = 0.0;
  for (std::size_t i = 0; i < want.size(); ++i) {
    const double error = std::abs(double{want[i]} - c.out[i]);
    if (!(error <= worst)) worst = error;  // NaN counts as the worst
  }
  return worst;
}

}  // namespace

int main() {
  Pool pool(2);
  flash_attn::set_num_threads(2);
  flash_attn::set_parallel_for([&](int64_t n, const std::function<void(int64_t)>& task) { pool.run(n, task); });
  int status = 0;
  try {
    std::mt19937 random(1);
    Engine engine;
    std::vector<Conversation> all(4);
    std::vector<Conversation*> talking;
    for (int turn = 0; turn < 6; ++turn) {
      if (turn < 4) talking.push_back(&all[turn]);                                    // somebody joins
      if (turn >= 3) engine.leave(*talking.front()), talking.erase(talking.begin());  // and somebody leaves
      if (talking.empty()) break;
      std::vector<int64_t> prompts;
      for (std::size_t b = 0; b < talking.size(); ++b) prompts.push_back(5 + 11 * static_cast<int64_t>((turn + b) % 3));
      for (std::size_t b = 0; b < talking.size(); ++b) talking[b]->say(prompts[b], random);
      engine.step(talking, prompts);
      for (int token = 0; token < 20; ++token) {  // the answers
        for (Conversation* c : talking) c->say(1, random);
        engine.step(talking, std::vector<int64_t>(talking.size(), 1));
      }
    }
    for (Conversation* c : talking) engine.leave(*c);
    double worst = 0.0;
    int64_t tokens = 0;
    for (const Conversation& c : all) worst = std::max(worst, difference_from_one_call(c)), tokens += c.length;
    std::printf("%zu conversations, %lld tokens, %lld tasks on the host's threads: largest difference %.1e\n",
                all.size(), static_cast<long long>(tokens), static_cast<long long>(pool.ran), worst);
    if (!(worst <= 1e-5) || engine.free_pages() != kPoolPages || pool.ran == 0) status = 1;
  } catch (const flash_attn::Error& e) {
    std::fprintf(stderr, "flash_attn: %s\n", e.what());
    status = 1;
  }
  flash_attn::set_parallel_for({});  // the pool ends before the library does
  return status;
}
