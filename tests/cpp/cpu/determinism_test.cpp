// Bitwise the same results for any number of threads, and for a host's own threads.
#include <gtest/gtest.h>

#include <thread>

#include "support/attention_case.hpp"
#include "support/compare.hpp"

namespace flash_attn::test {
namespace {

struct Results {
  HostTensor out, lse, dq, dk, dv, dbias;
};

enum class Bias { of_every_row, of_all_rows };  // the gradient of the latter is a sum over tasks

Results run_all(DType dtype, const Dims& d, Bias bias = Bias::of_all_rows) {
  AttentionCase c = AttentionCase::fixed(dtype, d);
  c.scores.causal = true;
  c.bias = HostTensor::normal(dtype, {1, d.nheads, bias == Bias::of_all_rows ? 1 : d.seqlen_q, d.seqlen_k}, 2);
  c.dropout = {.p = 0.1, .seed = 3, .offset = 4};
  c.run.backend = "cpu";
  forward(c.forward_call());
  backward(c.backward_call());
  return {c.out, c.lse, c.dq, c.dk, c.dv, c.dbias};
}

void expect_same(const Results& a, const Results& b) {
  EXPECT_TRUE(close(a.out, b.out, 0.0));
  EXPECT_TRUE(close(a.lse, b.lse, 0.0));
  EXPECT_TRUE(close(a.dq, b.dq, 0.0));
  EXPECT_TRUE(close(a.dk, b.dk, 0.0));
  EXPECT_TRUE(close(a.dv, b.dv, 0.0));
  EXPECT_TRUE(close(a.dbias, b.dbias, 0.0));
}

class Determinism : public ::testing::Test {
 protected:
  void TearDown() override {
    set_parallel_for({});
    set_num_threads(0);
  }
  // Few heads and long keys: the backward splits keys, and how many splits a task takes is up to the workers. With few
  // queries the forward splits too.
  const Dims long_keys_{1, 200, 1100, 2, 1, 40, 40};
  const Dims few_queries_{1, 3, 5000, 2, 1, 40, 40};
  const Dims many_heads_{3, 130, 70, 12, 4, 64, 64};
  const Dims long_queries_{1, 1500, 90, 2, 1, 40, 40};  // how many rows a task takes is up to the workers
  const Dims in_place_{2, 2, 700, 12, 3, 64, 64};       // several heads a task, keys split and read where they lie
};

TEST_F(Determinism, ThreadsDoNotMatter) {
  for (const Bias bias : {Bias::of_every_row, Bias::of_all_rows})
    for (const Dims& d : {long_keys_, few_queries_, many_heads_, long_queries_, in_place_}) {
      set_num_threads(1);
      const Results one = run_all(DType::bf16, d, bias);
      for (int n : {2, 3, 7}) {
        set_num_threads(n);
        ASSERT_EQ(num_threads(), n);
        for (int repeat = 0; repeat < 3; ++repeat) expect_same(run_all(DType::bf16, d, bias), one);
      }
    }
}

TEST_F(Determinism, HostThreadsDoNotMatter) {
  set_num_threads(1);
  const Results one = run_all(DType::f32, long_keys_);
  set_num_threads(4);
  int64_t asked = 0;
  set_parallel_for([&](int64_t n, const std::function<void(int64_t)>& task) {
    asked += n;
    std::vector<std::thread> threads;
    for (int64_t i = 0; i < n; ++i) threads.emplace_back([&task, i] { task(i); });
    for (auto& t : threads) t.join();
  });
  expect_same(run_all(DType::f32, long_keys_), one);
  EXPECT_GT(asked, 0);
}

TEST_F(Determinism, CallersOnSeveralThreadsDoNotMatter) {
  set_num_threads(3);
  const Results one = run_all(DType::f32, many_heads_);
  std::vector<Results> results(4);
  std::vector<std::thread> callers;
  for (Results& r : results) callers.emplace_back([&] { r = run_all(DType::f32, many_heads_); });
  for (auto& t : callers) t.join();
  for (const Results& r : results) expect_same(r, one);
}

}  // namespace
}  // namespace flash_attn::test
