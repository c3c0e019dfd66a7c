#include "cpu/threads.hpp"

#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <stdexcept>
#include <vector>

#include "flash_attn/flash_attn.hpp"

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
