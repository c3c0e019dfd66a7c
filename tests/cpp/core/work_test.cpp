// Work is counted pair by pair; here it is counted again by formulas of the shapes.
#include "core/work.hpp"

#include <gtest/gtest.h>

#include "core/calls.hpp"

namespace flash_attn::test {
namespace {

struct Shape {
  int64_t batch = 2, seqlen_q = 100, seqlen_k = 100, nheads = 4, nheads_k = 2, d = 16, dv = 16;
};

Forward call_of(Store& store, const Shape& s) {
  return {.q = store.floats({s.batch, s.seqlen_q, s.nheads, s.d}),
          .k = store.floats({s.batch, s.seqlen_k, s.nheads_k, s.d}),
          .v = store.floats({s.batch, s.seqlen_k, s.nheads_k, s.dv}),
          .out = store.floats({s.batch, s.seqlen_q, s.nheads, s.dv})};
}

TEST(Work, ofFixedLengths) {
  Store store;
  const Shape s{.seqlen_q = 30, .seqlen_k = 50, .d = 16, .dv = 8};
  const Work work = count_work(make_problem(call_of(store, s)));
  EXPECT_EQ(work.flops, 2.0 * 2 * 4 * 30 * 50 * (16 + 8));
  EXPECT_EQ(work.bytes, 4.0 * 2 * (30 * 4 + 50 * 2) * (16 + 8));
  EXPECT_FALSE(work.bound);
}

TEST(Work, ofMasks) {
  Store store;
  Forward call = call_of(store, {});
  call.scores.window_right = 0;
  EXPECT_EQ(count_work(make_problem(call)).flops, 2.0 * 2 * 4 * (100 * 101 / 2) * 32);
  call.scores.window_left = 9;  // ten keys, but for the first rows
  EXPECT_EQ(count_work(make_problem(call)).flops, 2.0 * 2 * 4 * (100 * 10 - 45) * 32);
  const Shape long_keys{.seqlen_q = 1, .seqlen_k = 1000};
  Forward step = call_of(store, long_keys);
  step.scores.window_right = 0, step.scores.window_left = 99;
  const Work work = count_work(make_problem(step));  // reads the hundred keys that are seen
  EXPECT_EQ(work.bytes, 4.0 * 2 * (1 * 4 + 100 * 2) * 32);
}

TEST(Work, ofPackedSequences) {
  Store store;
  const Tensor cu_q = store.ints({0, 3, 3, 10}), cu_k = store.ints({0, 5, 9, 10});
  Forward call{.q = store.floats({10, 2, 8}),
               .k = store.floats({10, 2, 8}),
               .v = store.floats({10, 2, 8}),
               .out = store.floats({10, 2, 8})};
  call.sequences.cu_seqlens_q = cu_q, call.sequences.cu_seqlens_k = cu_k;
  const Work work = count_work(make_problem(call));
  EXPECT_EQ(work.flops, 2.0 * 2 * (3 * 5 + 7 * 1) * 16);
  EXPECT_EQ(work.bytes, 4.0 * 2 * (10 + 5 + 1) * 16);  // nobody sees the keys of the second
}

TEST(Work, ofVeryManyRowsIsSampled) {
  Problem p;
  p.batch = 1, p.nheads = p.nheads_k = 1, p.headdim = p.headdim_v = 1;
  p.max_seqlen_q = p.max_seqlen_k = int64_t{1} << 40;
  p.scores.mask.window_right = 0;
  const double n = static_cast<double>(p.max_seqlen_q);
  EXPECT_NEAR(count_work(p).flops / (4 * n * n / 2), 1.0, 1e-4);
}

TEST(Work, inWords) {
  EXPECT_EQ(describe(Work{.flops = 2.147e9, .bytes = 8388608}), "2.15 GFLOP, 8.39 MB: 256 FLOP a byte");
  EXPECT_EQ(describe(Work{.flops = 12, .bytes = 0, .bound = true}), "at most 12 FLOP, 0 B");
}

}  // namespace
}  // namespace flash_attn::test
