// The normal form of well-formed calls.
#include "core/problem.hpp"

#include <gtest/gtest.h>

#include "core/calls.hpp"
#include "support/attention_case.hpp"

namespace flash_attn::test {
namespace {

void expect_sequence(const Sequence& s, std::initializer_list<int64_t> expected) {
  const std::vector<int64_t> got{s.q_batch, s.q_row, s.seqlen_q, s.k_batch, s.k_row, s.seqlen_k};
  EXPECT_EQ(got, std::vector<int64_t>(expected));
}

TEST(Problem, FixedLength) {
  Store store;
  Forward call = fixed_call(store);
  const Problem p = make_problem(call);
  EXPECT_EQ(p.pass, Pass::forward);
  EXPECT_EQ(p.batch, 2);
  EXPECT_EQ(p.nheads, 4);
  EXPECT_EQ(p.nheads_k, 2);
  EXPECT_EQ(p.group(), 2);
  EXPECT_EQ(p.headdim, 8);
  EXPECT_EQ(p.headdim_v, 6);
  EXPECT_EQ(p.max_seqlen_q, 5);
  EXPECT_EQ(p.max_seqlen_k, 7);
  EXPECT_DOUBLE_EQ(p.scores.scale, 1.0 / std::sqrt(8.0));
  EXPECT_TRUE(p.scores.mask.trivial());
  EXPECT_FALSE(p.sequences.packed_q());
  expect_sequence(p.sequences.at(1), {1, 0, 5, 1, 0, 7});
  EXPECT_EQ(p.q.at(1, 2, 3), static_cast<char*>(call.q.data) + ((1 * 5 + 2) * 4 + 3) * 8 * 4);
  EXPECT_EQ(p.lse.at(1, 2, 3), static_cast<char*>(call.lse.data) + ((1 * 4 + 3) * 5 + 2) * 4);
  EXPECT_EQ(describe(p), "forward float32 batch 2, 4 heads (2 of keys), headdim 8 (6 of values), seqlen 5 x 7");
}

TEST(Problem, Packed) {
  Store store;
  const Problem p = make_problem(packed_call(store));
  EXPECT_EQ(p.batch, 2);
  EXPECT_EQ(p.batch_q, 1);
  EXPECT_EQ(p.rows_q, 6);
  EXPECT_EQ(p.max_seqlen_q, 3);
  EXPECT_EQ(p.max_seqlen_k, 4);
  expect_sequence(p.sequences.at(0), {0, 0, 3, 0, 0, 4});
  expect_sequence(p.sequences.at(1), {0, 3, 2, 0, 4, 3});
}

TEST(Problem, PackedQueriesOnFixedKeys) {
  Store store;
  Forward call = packed_call(store);
  call.sequences.cu_seqlens_k = {};
  call.k = store.floats({2, 9, 2, 8});
  call.v = store.floats({2, 9, 2, 6});
  const Problem p = make_problem(call);
  expect_sequence(p.sequences.at(1), {0, 3, 2, 1, 0, 9});
}

TEST(Problem, Pages) {
  Store store;
  const Forward call = paged_call(store);
  const Problem p = make_problem(call);
  EXPECT_EQ(p.sequences.seqlen_k, 8) << "capacity";
  EXPECT_EQ(p.max_seqlen_k, 6);
  EXPECT_EQ(p.batch_k, 5);
  EXPECT_EQ(p.rows_k, 4);
  const Sequence s = p.sequences.at(1);
  EXPECT_EQ(s.seqlen_k, 3);
  EXPECT_EQ(s.pages, static_cast<const int32_t*>(call.sequences.block_table.data) + 2);
}

TEST(Problem, PagesBeyondTheUsedOnesAreNotRead) {
  Store store;
  Forward call = paged_call(store);
  set(call.sequences.block_table, 3, -1);  // sequence 1 has 3 keys, all in its first page
  EXPECT_NO_THROW(make_problem(call));
}

TEST(Problem, CacheWithLeftPadding) {
  Store store;
  const Problem p = make_problem(cached_call(store));
  expect_sequence(p.sequences.at(0), {0, 0, 5, 2, 1, 6});
  expect_sequence(p.sequences.at(1), {1, 0, 5, 0, 4, 0});
  EXPECT_TRUE(p.sequences.at(1).empty());
  EXPECT_EQ(p.max_seqlen_k, 6);
}

TEST(Problem, CausalDiscardsTheRightWindowAndWindowsAreClamped) {
  Store store;
  Forward call = fixed_call(store);
  call.scores = {.causal = true, .window_left = std::numeric_limits<int64_t>::max(), .window_right = 3};
  const Problem p = make_problem(call);
  EXPECT_EQ(p.scores.mask.window_right, 0);
  EXPECT_EQ(p.scores.mask.window_left, int64_t{1} << 40);
}

TEST(Problem, BroadcastBiasHasNoStride) {
  Store store;
  Forward call = fixed_call(store);
  call.scores.bias = store.floats({1, 4, 1, 7}, DType::bf16);
  const Problem p = make_problem(call);
  EXPECT_EQ(p.scores.bias.stride_batch, 0);
  EXPECT_EQ(p.scores.bias.stride_head, 7);
  EXPECT_EQ(p.scores.bias.stride_row, 0);
  EXPECT_EQ(p.scores.bias_shape[1], 4);
}

TEST(Problem, BiasOfPackedSequencesSpansMaxSeqlen) {
  Store store;
  Forward call = packed_call(store);
  call.sequences.max_seqlen_q = 10;
  call.sequences.max_seqlen_k = 12;
  call.scores.bias = store.floats({2, 4, 10, 12});
  const Problem p = make_problem(call);
  EXPECT_EQ(p.max_seqlen_q, 3) << "exact, whatever bound was given";
  EXPECT_EQ(p.scores.bias_shape[2], 10);
}

TEST(Problem, NothingToDoIsLegal) {
  Store store;
  Forward none = fixed_call(store);
  for (Tensor* t : {&none.q, &none.k, &none.v, &none.out, &none.lse}) t->shape[0] = 0, t->data = nullptr;
  EXPECT_EQ(make_problem(none).batch, 0);

  Forward no_keys = fixed_call(store);
  no_keys.k.shape[1] = no_keys.v.shape[1] = 0;
  EXPECT_TRUE(make_problem(no_keys).sequences.at(0).empty());

  Forward no_sequences = packed_call(store);
  no_sequences.sequences.cu_seqlens_q = store.ints({0});
  no_sequences.sequences.cu_seqlens_k = store.ints({0});
  EXPECT_EQ(make_problem(no_sequences).batch, 0);
}

TEST(Problem, GradientsMayInterleaveInOneTensor) {
  Store store;
  const Tensor qkv = store.floats({2, 5, 3, 4, 8}), dqkv = store.floats({2, 5, 3, 4, 8});
  const auto slice = [](const Tensor& t, int i) {
    Tensor s = t;
    s.ndim = 4;
    s.data = static_cast<float*>(t.data) + i * t.stride[2];
    s.shape[2] = t.shape[3], s.shape[3] = t.shape[4];
    s.stride[2] = t.stride[3], s.stride[3] = t.stride[4];
    return s;
  };
  Backward call{.dout = store.floats({2, 5, 4, 8}),
                .q = slice(qkv, 0),
                .k = slice(qkv, 1),
                .v = slice(qkv, 2),
                .out = store.floats({2, 5, 4, 8}),
                .lse = store.floats({2, 4, 5}),
                .dq = slice(dqkv, 0),
                .dk = slice(dqkv, 1),
                .dv = slice(dqkv, 2)};
  EXPECT_EQ(make_problem(call).pass, Pass::backward);
  call.dv = slice(dqkv, 1);
  EXPECT_THROW(make_problem(call), Error);
}

TEST(Problem, LengthsOnADeviceAreNotReadButBounded) {
  Store store;
  Forward call = packed_call(store);
  Sequences& s = call.sequences;
  s.max_seqlen_q = 4, s.max_seqlen_k = 6;
  for (Tensor* t : {&call.q, &call.k, &call.v, &call.out, &call.lse, &s.cu_seqlens_q, &s.cu_seqlens_k}) {
    t->device = {2, 0};
    t->data =
        reinterpret_cast<void*>(reinterpret_cast<uintptr_t>(t->data) | uintptr_t{1} << 60);  // reading would crash
  }
  const Problem p = make_problem(call);
  EXPECT_EQ(p.max_seqlen_q, 4);
  EXPECT_EQ(p.max_seqlen_k, 6);
  s.max_seqlen_q = -1;
  EXPECT_THROW(make_problem(call), Error);
}

TEST(Problem, ABatchWithoutRowsMayBeOfAnySize) {
  for (const char* backend : {"cpu", "reference"}) {
    AttentionCase c = AttentionCase::fixed(DType::f32, {int64_t{1} << 50, 0, 0, 2, 1, 8, 8});
    c.run.backend = backend;
    forward(c.forward_call());  // a loop over the batch would not end
    backward(c.backward_call());
  }
}

}  // namespace
}  // namespace flash_attn::test
