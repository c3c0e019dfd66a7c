// Memory running out: a call that throws out_of_memory has written nothing, the cache included.
#include <gtest/gtest.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <fstream>
#include <new>
#include <vector>

#include "core/append.hpp"
#include "cpu/arena.hpp"
#include "cpu/driver.hpp"
#include "cpu/kernels_under_test.hpp"
#include "support/attention_case.hpp"
#include "support/compare.hpp"

namespace flash_attn::test {
namespace {

TEST(Memory, AnArenaThatCountsSaysWhatIsTaken) {
  const auto take = [](cpu::Arena& arena) {
    arena.take<float>(3);
    arena.take<char>(0);
    arena.take<double>(17);
  };
  EXPECT_EQ(cpu::bytes_taken(take), 128 + 0 + 256);
  cpu::Arena arena(cpu::bytes_taken(take));
  take(arena);
  EXPECT_EQ(arena.taken(), 384);
  arena.rewind();
  EXPECT_EQ(arena.taken(), 0);
}

// Linux bounds the address space, and tells how much of it is taken.
#if defined(__linux__) && !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
int64_t address_space() {
  int64_t pages = 0;
  std::ifstream("/proc/self/statm") >> pages;
  return pages * sysconf(_SC_PAGESIZE);
}

/// A cache that 5 new keys of each of two sequences join; the workspace takes some MiB.
struct Joining {
  AttentionCase c = AttentionCase::fixed(
      DType::f32,
      {.batch = 2, .seqlen_q = 300, .seqlen_k = 600, .nheads = 2, .nheads_k = 2, .headdim = 64, .headdim_v = 64});
  HostTensor more = HostTensor::normal(DType::f32, {2, 5, 2, 64}, 9);
  Forward call() {
    c.seqused_k = HostTensor::ints({590, 400});
    c.run.backend = "cpu";
    Forward forward = c.forward_call();
    forward.new_keys = {.k = more.tensor(), .v = more.tensor()};
    return forward;
  }
};

/// As the backend does it: reserve, append, attend.
void reserve_append_attend(const Forward& call) {
  const Problem p = make_problem(call);
  cpu::ForwardRun run(p, *kernels_under_test().front());
  for (int64_t i = 0; i < append_blocks(p); ++i) append_block(p, p.q, i, move_row);
  run.attend();
}

/// Bounds the address space, in bytes.
void bound_address_space(rlim_t bytes) {
  rlimit limit{};
  getrlimit(RLIMIT_AS, &limit);
  limit.rlim_cur = std::min(bytes, limit.rlim_max);
  if (setrlimit(RLIMIT_AS, &limit) != 0) _exit(10);
}

/// The child's part: 0: the call was done; 1: it threw out_of_memory and the cache is as it was; else what is wrong.
int outcome_in_child(int64_t bytes) {
  set_num_threads(1);
  Joining joining;
  const HostTensor k = joining.c.k, v = joining.c.v;
  const Forward call = joining.call();
  new cpu::Arena(1);  // takes, for good, the block that is kept between calls, if there is one
  const int64_t now = address_space();
  bound_address_space(static_cast<rlim_t>(now));
  while (void* volatile taken = std::malloc(1 << 12)) static_cast<void>(taken);  // and what else is free
  bound_address_space(static_cast<rlim_t>(now + bytes));
  int outcome = 0;
  try {
    reserve_append_attend(call);
  } catch (const Error& e) {
    outcome = e.code() == ErrorCode::out_of_memory ? 1 : 12;
  } catch (const std::bad_alloc&) {
    outcome = 1;
  }
  bound_address_space(RLIM_INFINITY);
  const bool unwritten = close(joining.c.k, k, 0.0) && close(joining.c.v, v, 0.0);
  return outcome > 1 || unwritten == (outcome == 1) ? outcome : 14;
}

/// In a child whose address space may grow by `bytes`.
int outcome_with(int64_t bytes) {
  const pid_t child = fork();
  if (child == 0) {
    int outcome = 13;
    try {
      outcome = outcome_in_child(bytes);
    } catch (...) {  // the child must not go on with the tests
    }
    _exit(outcome);
  }
  int status = -1;
  waitpid(child, &status, 0);
  return WIFEXITED(status) ? WEXITSTATUS(status) : 20;
}

TEST(Memory, NothingIsAppendedWhenItRunsOut) {
  int refused = 0, done = 0;
  for (int64_t bytes = 0; bytes <= int64_t{16} << 20; bytes = bytes == 0 ? 1 << 17 : 2 * bytes) {
    const int outcome = outcome_with(bytes);
    EXPECT_TRUE(outcome == 0 || outcome == 1) << outcome << " with " << bytes << " bytes";
    refused += outcome == 1, done += outcome == 0;
  }
  EXPECT_GE(refused, 3);
  EXPECT_GE(done, 1);
}
#endif

}  // namespace
}  // namespace flash_attn::test
