#include "cpu/threads.hpp"

#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <filesystem>
#include <fstream>
#include <map>
#include <optional>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "cpu/limits.hpp"
#include "flash_attn/flash_attn.h"
#include "flash_attn/flash_attn.hpp"
#include "support/attention_case.hpp"

namespace flash_attn::test {
namespace {

TEST(Threads, EveryTaskRunsOnceAndWorkersStayInRange) {
  for (int workers : {1, 2, 5}) {
    set_num_threads(workers);
    for (int64_t n : {0, 1, 2, 1000}) {
      std::vector<std::atomic<int>> runs(static_cast<std::size_t>(n));
      std::atomic<bool> in_range{true};
      cpu::parallel_for(n, workers, [&](int64_t i, int worker) {
        runs[static_cast<std::size_t>(i)]++;
        if (worker < 0 || worker >= workers) in_range = false;
      });
      for (const auto& r : runs) EXPECT_EQ(r.load(), 1);
      EXPECT_TRUE(in_range);
    }
  }
  set_num_threads(0);
}

TEST(Threads, TheFirstExceptionArrivesAndThePoolGoesOn) {
  set_num_threads(3);
  EXPECT_THROW(cpu::parallel_for(100, 3,
                                 [](int64_t i, int) {
                                   if (i == 17) throw std::runtime_error("17");
                                 }),
               std::runtime_error);
  std::atomic<int> count{0};
  cpu::parallel_for(100, 3, [&](int64_t, int) { count++; });
  EXPECT_EQ(count, 100);
  set_num_threads(0);
}

TEST(Threads, AHostThatRunsNothingIsAnError) {
  set_num_threads(3);
  set_parallel_for([](int64_t, const std::function<void(int64_t)>&) {});
  EXPECT_THROW(cpu::parallel_for(50, 3, [](int64_t, int) {}), Error);
  set_parallel_for({});
  set_num_threads(0);
}

/// Every worker begins with its own run of neighbours: with two workers that wait for each other, the first tasks are 0
/// and n / 2.
TEST(Threads, ByPlaceEveryWorkerBeginsWithNeighbours) {
  set_num_threads(2);
  std::atomic<int> started{0};
  std::atomic<int64_t> first[2] = {-1, -1};
  std::vector<std::atomic<int>> runs(101);
  cpu::parallel_for(
      101, 2,
      [&](int64_t i, int worker) {
        runs[static_cast<std::size_t>(i)]++;
        if (first[worker] >= 0) return;
        first[worker] = i;
        for (started++; started < 2;) std::this_thread::yield();
      },
      cpu::Order::by_place);
  EXPECT_EQ(first[0], 0);
  EXPECT_EQ(first[1], 50);
  for (const auto& r : runs) EXPECT_EQ(r.load(), 1);
  set_num_threads(0);
}

TEST(Threads, ByPlaceEveryTaskRunsOnce) {
  set_num_threads(3);
  for (int workers : {1, 2, 3, 100})
    for (int64_t n : {0, 1, 2, 7, 1000}) {
      std::vector<std::atomic<int>> runs(static_cast<std::size_t>(n));
      cpu::parallel_for(
          n, workers, [&](int64_t i, int) { runs[static_cast<std::size_t>(i)]++; }, cpu::Order::by_place);
      for (const auto& r : runs) EXPECT_EQ(r.load(), 1);
    }
  set_num_threads(0);
}

#ifdef __linux__  // tells it
/// How often each other thread of this process has gone to sleep.
std::map<std::string, int64_t> sleeps() {
  std::map<std::string, int64_t> counts;
  for (const auto& entry : std::filesystem::directory_iterator("/proc/self/task")) {
    if (entry.path().filename() == std::to_string(getpid())) continue;
    std::ifstream in(entry.path() / "status");
    for (std::string word; in >> word;)
      if (word == "voluntary_ctxt_switches:") in >> counts[entry.path().filename()];
  }
  return counts;
}

TEST(Threads, AJobWakesNoMoreWorkersThanItHasTasks) {
  set_num_threads(6);
  cpu::parallel_for(600, 6, [](int64_t, int) {});  // the pool is there
  const auto rest = [] { std::this_thread::sleep_for(std::chrono::milliseconds(20)); };
  rest();
  const auto before = sleeps();
  ASSERT_GE(before.size(), 5u);
  for (int job = 0; job < 5; ++job) {
    cpu::parallel_for(3, 6, [](int64_t, int worker) { EXPECT_LT(worker, 3); });
    rest();
  }
  int woken = 0;
  for (const auto& [thread, count] : sleeps()) woken += before.contains(thread) && count != before.at(thread);
  EXPECT_LE(woken, 2);  // and the caller
  EXPECT_GE(woken, 1);
  set_num_threads(0);
}
#endif

/// The most workers that a call asks a host for.
int64_t asked_for(const std::function<void()>& call) {
  int64_t most = 0;
  set_parallel_for([&](int64_t n, const std::function<void(int64_t)>& task) {
    most = std::max(most, n);
    for (int64_t i = 0; i < n; ++i) task(i);
  });
  call();
  set_parallel_for({});
  return most;
}

TEST(Threads, ACallOfFewTasksAsksForFewWorkers) {
  set_num_threads(16);
  struct Case {
    int64_t batch, nheads, seqlen, most_forward, most_backward;
  };
  for (const Case& x : {Case{1, 2, 36, 2, 2}, Case{3, 1, 36, 3, 3}, Case{1, 5, 36, 5, 5}, Case{8, 8, 36, 16, 16}}) {
    AttentionCase c = AttentionCase::fixed(DType::f32, {.batch = x.batch,
                                                        .seqlen_q = x.seqlen,
                                                        .seqlen_k = x.seqlen,
                                                        .nheads = x.nheads,
                                                        .nheads_k = x.nheads,
                                                        .headdim = 64,
                                                        .headdim_v = 64});
    c.run.backend = "cpu";
    EXPECT_EQ(asked_for([&] { forward(c.forward_call()); }), x.most_forward);
    EXPECT_EQ(asked_for([&] { backward(c.backward_call()); }), x.most_backward);
  }
  // 40 new keys are two blocks of rows to append; one query then attends to them on the caller's thread.
  AttentionCase c = AttentionCase::fixed(
      DType::f32,
      {.batch = 1, .seqlen_q = 1, .seqlen_k = 64, .nheads = 8, .nheads_k = 8, .headdim = 128, .headdim_v = 128});
  c.run.backend = "cpu";
  c.seqused_k = HostTensor::ints({0});
  const HostTensor more = HostTensor::normal(DType::f32, {1, 40, 8, 128}, 9);
  Forward call = c.forward_call();
  call.new_keys = {.k = more.tensor(), .v = more.tensor()};
  EXPECT_EQ(asked_for([&] { forward(call); }), 2);
  set_num_threads(0);
}

/// A variable of the environment for as long as it lives.
class Variable {
 public:
  Variable(const char* name, const char* value) : name_(name) {
    if (const char* old = std::getenv(name)) old_ = old;
    setenv(name, value, 1);
  }
  ~Variable() { old_ ? setenv(name_, old_->c_str(), 1) : unsetenv(name_); }

 private:
  const char* name_;
  std::optional<std::string> old_;
};

/// By every door that needs threads, at its first use.
TEST(Threads, AMalformedNumberIsRefusedInWords) {
  AttentionCase c = AttentionCase::fixed(DType::f32, {});
  c.run.backend = "cpu";
  const std::function<void()> doors[] = {[&] { forward(c.forward_call()); }, [&] { backward(c.backward_call()); },
                                         [&] { explain(c.forward_call()); }, [] { num_threads(); }};
  for (const char* value : {"x", "-3", "1e3", "0", " 4", "4 ", "4,2", "+4", "0x4", "30000", "99999999999", "-"}) {
    SCOPED_TRACE(value);
    const Variable set("FLASH_ATTENTION_NUM_THREADS", value);
    set_num_threads(0);  // the default is read again when it is needed
    const auto expect_words = [&](const std::string& words) {
      EXPECT_NE(words.find("FLASH_ATTENTION_NUM_THREADS"), std::string::npos) << words;
      EXPECT_NE(words.find("\"" + std::string(value) + "\""), std::string::npos) << words;
    };
    for (const auto& use : doors) {
      try {
        use();
        ADD_FAILURE() << "expected an error";
      } catch (const Error& e) {
        EXPECT_EQ(e.code(), ErrorCode::invalid_argument);
        expect_words(e.what());
      }
    }
    EXPECT_EQ(flash_attn_num_threads(), 0);
    expect_words(flash_attn_last_error());
    set_num_threads(2);  // what is said in the program counts more
    EXPECT_EQ(num_threads(), 2);
  }
  for (const auto& [value, threads] : {std::pair{"1", 1}, {"7", 7}, {"1024", 1024}}) {
    const Variable set("FLASH_ATTENTION_NUM_THREADS", value);
    set_num_threads(0);
    EXPECT_EQ(num_threads(), threads);
  }
  {
    const Variable empty("FLASH_ATTENTION_NUM_THREADS", "");
    set_num_threads(0);
    EXPECT_GE(num_threads(), 1);
  }
  EXPECT_THROW(set_num_threads(cpu::most_threads() + 1), Error);
  EXPECT_EQ(flash_attn_set_num_threads(30000), FLASH_ATTN_INVALID_ARGUMENT);
  set_num_threads(0);
}

TEST(Threads, OpenMPsVariableIsNotOursToRefuse) {
  const Variable unset("FLASH_ATTENTION_NUM_THREADS", "");
  for (const auto& [value, threads] : {std::pair{"x", 0}, {"-3", 0}, {"1e3", 0}, {"3,2", 3}, {"3", 3}, {"", 0}}) {
    const Variable set("OMP_NUM_THREADS", value);
    EXPECT_EQ(cpu::thread_limits().omp, threads) << value;
  }
}

#if !defined(__SANITIZE_THREAD__)
TEST(Threads, AForkedChildHasThreadsOfItsOwn) {
  set_num_threads(3);
  std::atomic<int> count{0};
  cpu::parallel_for(50, 3, [&](int64_t, int) { count++; });
  const pid_t child = fork();
  ASSERT_GE(child, 0);
  if (child == 0) {
    std::atomic<int> in_child{0};
    cpu::parallel_for(50, 3, [&](int64_t, int) { in_child++; });
    _exit(in_child == 50 && num_threads() == 3 ? 0 : 1);
  }
  int status = -1;
  waitpid(child, &status, 0);
  EXPECT_TRUE(WIFEXITED(status));
  EXPECT_EQ(WEXITSTATUS(status), 0);
  set_num_threads(0);
}
#endif

}  // namespace
}  // namespace flash_attn::test
