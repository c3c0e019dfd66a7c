// What must hold of the oracle whatever the numbers: views of the same keys agree, empty things are defined, and NaN
// reaches exactly what depends on it.
#include <gtest/gtest.h>

#include "core/backend.hpp"
#include "reference/cases.hpp"
#include "support/compare.hpp"

namespace flash_attn::test {
namespace {

void forward(AttentionCase& c) { make_reference_backend()->forward(make_problem(c.forward_call())); }
void backward(AttentionCase& c) { make_reference_backend()->backward(make_problem(c.backward_call())); }

/// Rows [first, first + rows) of dimension 1, in a tensor of their own.
HostTensor slice_rows(const HostTensor& x, int64_t first, int64_t rows) {
  HostTensor part(x.dtype(), {x.size(0), rows, x.size(2), x.size(3)});
  for (int64_t n = 0; n < part.numel(); ++n) {
    const Shape at = part.index(n);
    part.set(n, x.at(at[0], at[1] + first, at[2], at[3]));
  }
  return part;
}

TEST(ReferenceProperties, PagedEqualsStrided) {
  AttentionCase strided = AttentionCase::fixed(DType::f32, {.seqlen_k = 8});
  strided.scores = {.causal = true, .window_left = 4};
  AttentionCase paged = strided;
  paged.block_table = HostTensor::ints({6, 0, 3, 5, 2, 7, 1, 4}, {2, 4});
  for (HostTensor AttentionCase::*x : {&AttentionCase::k, &AttentionCase::v}) {
    paged.*x = HostTensor(DType::f32, {8, 2, 2, 3});
    for (int64_t n = 0; n < (strided.*x).numel(); ++n) {
      const Shape at = (strided.*x).index(n);
      (paged.*x).put((strided.*x).get(n), paged.block_table.at(at[0], at[1] / 2), at[1] % 2, at[2], at[3]);
    }
  }
  forward(strided), forward(paged);
  EXPECT_TRUE(close(paged.out, strided.out, 0.0));
  EXPECT_TRUE(close(paged.lse, strided.lse, 0.0));
}

TEST(ReferenceProperties, LeftpadEqualsSliced) {
  AttentionCase padded = AttentionCase::fixed(DType::f32, {});
  padded.scores = {.causal = true, .window_left = 2};
  padded.leftpad_k = HostTensor::ints({3, 3});
  AttentionCase sliced = padded;
  sliced.leftpad_k = {};
  sliced.k = slice_rows(padded.k, 3, 4), sliced.v = slice_rows(padded.v, 3, 4);
  sliced.dk = sliced.k.like(), sliced.dv = sliced.v.like();
  forward(padded), forward(sliced);
  EXPECT_TRUE(close(padded.out, sliced.out, 0.0));
  EXPECT_TRUE(close(padded.lse, sliced.lse, 0.0));
  backward(padded), backward(sliced);
  EXPECT_TRUE(close(padded.dq, sliced.dq, 0.0));
  EXPECT_TRUE(close(slice_rows(padded.dk, 3, 4), sliced.dk, 0.0));
  EXPECT_TRUE(close(slice_rows(padded.dv, 3, 4), sliced.dv, 0.0));
  EXPECT_TRUE(all_equal(slice_rows(padded.dk, 0, 3), 0.0));
}

TEST(ReferenceProperties, RowsThatSeeNothingAreZero) {
  for (const bool positive : {false, true}) {
    AttentionCase c = AttentionCase::fixed(DType::f32, {.seqlen_q = 6, .seqlen_k = 4});
    c.scores.causal = true;  // rows 0 and 1 stand before the first key
    c.run.positive_empty_lse = positive;
    c.dlse = HostTensor::full(DType::f32, {2, 4, 6}, NAN);
    forward(c), backward(c);
    EXPECT_TRUE(all_equal(slice_rows(c.out, 0, 2), 0.0));
    EXPECT_TRUE(all_equal(slice_rows(c.dq, 0, 2), 0.0));
    for (int i = 0; i < 6; ++i) {
      const double lse = c.lse.at(1, 3, i);
      EXPECT_TRUE(i < 2 ? lse == (positive ? INFINITY : -INFINITY) : std::isfinite(lse)) << lse;
    }
  }
}

/// A bias of -inf over a whole row is a row that sees nothing, whatever gradient comes for its lse.
TEST(ReferenceProperties, ARowHiddenByItsBiasIsZero) {
  AttentionCase c = AttentionCase::fixed(DType::f32, {.batch = 1});
  c.bias = HostTensor::full(DType::f32, {1, 1, 5, 7}, 0.0);
  for (int j = 0; j < 7; ++j) c.bias.put(-INFINITY, 0, 0, 2, j);
  for (int h = 0; h < 4; ++h) c.dlse.put(NAN, 0, h, 2);
  forward(c), backward(c);
  EXPECT_TRUE(all_equal(slice_rows(c.out, 2, 1), 0.0));
  EXPECT_TRUE(all_equal(slice_rows(c.dq, 2, 1), 0.0));
  for (int h = 0; h < 4; ++h) EXPECT_EQ(c.lse.at(0, h, 2), -INFINITY);
  for (const HostTensor* x : {&c.dq, &c.dk, &c.dv, &c.dbias}) {
    for (int64_t n = 0; n < x->numel(); ++n) EXPECT_TRUE(std::isfinite(x->get(n)));
  }
}

TEST(ReferenceProperties, ARowThatSeesOnlyNaNIsNaNNotEmpty) {
  AttentionCase c = AttentionCase::fixed(DType::f32, {.batch = 1, .seqlen_q = 7, .nheads = 1, .nheads_k = 1});
  c.scores = {.causal = true, .window_left = 0};  // every row sees its own key
  c.k.put(NAN, 0, 3, 0, 0);
  forward(c), backward(c);
  EXPECT_TRUE(all_equal(slice_rows(c.out, 3, 1), NAN));
  EXPECT_TRUE(std::isnan(c.lse.at(0, 0, 3)));
  EXPECT_TRUE(all_equal(slice_rows(c.dq, 3, 1), NAN));
}

TEST(ReferenceProperties, NoKeysAtAll) {
  AttentionCase c = AttentionCase::fixed(DType::f32, {.seqlen_k = 0});
  forward(c), backward(c);
  EXPECT_TRUE(all_equal(c.out, 0.0));
  EXPECT_TRUE(all_equal(c.lse, -INFINITY));
  EXPECT_TRUE(all_equal(c.dq, 0.0));
}

TEST(ReferenceProperties, ASinkAloneTakesAllTheWeight) {
  AttentionCase c = AttentionCase::fixed(DType::f32, {.batch = 1, .seqlen_k = 0});
  c.sink = HostTensor::normal(DType::f32, {4}, 3);
  forward(c), backward(c);
  EXPECT_TRUE(all_equal(c.out, 0.0));
  EXPECT_TRUE(all_equal(c.dq, 0.0));
  for (int h = 0; h < 4; ++h) {
    double sum = 0.0;
    for (int i = 0; i < 5; ++i) {
      EXPECT_EQ(c.lse.at(0, h, i), c.sink.at(h));
      sum += c.dlse.at(0, h, i);
    }
    EXPECT_NEAR(c.dsink.at(h), sum, 1e-6);  // lse is the sink: its gradient passes through
  }
}

TEST(ReferenceProperties, NoQueriesLeaveZeroGradients) {
  AttentionCase c = AttentionCase::fixed(DType::f32, {.seqlen_q = 0});
  c.bias = HostTensor::normal(DType::f32, {1, 1, 1, 7}, 1), c.sink = HostTensor::normal(DType::f32, {4}, 3);
  forward(c), backward(c);
  for (const HostTensor* x : {&c.dk, &c.dv, &c.dbias, &c.dsink}) EXPECT_TRUE(all_equal(*x, 0.0));
}

TEST(ReferenceProperties, BatchZero) {
  AttentionCase c = AttentionCase::fixed(DType::f32, {.batch = 0});
  c.sink = HostTensor::normal(DType::f32, {4}, 3);
  forward(c), backward(c);
  EXPECT_TRUE(all_equal(c.dsink, 0.0));
}

TEST(ReferenceProperties, RowsOfNoSequenceAreWritten) {
  AttentionCase c = AttentionCase::packed(DType::f32, {2, 3}, {4, 1}, {}, 1, 2);  // rows 5 and 6 are spare
  c.seqused_q = HostTensor::ints({1, 3});                                         // and so is row 1
  c.sink = HostTensor::normal(DType::f32, {4}, 3);
  forward(c), backward(c);
  for (const int row : {1, 5, 6}) {
    EXPECT_EQ(c.out.at(row, 0, 0), 0.0);
    EXPECT_EQ(c.dq.at(row, 0, 0), 0.0);
    EXPECT_EQ(c.lse.at(0, row), -INFINITY);
  }
  for (const int row : {5, 6}) {
    EXPECT_EQ(c.dk.at(row, 0, 0), 0.0);
    EXPECT_EQ(c.dv.at(row, 0, 0), 0.0);
  }
}

TEST(ReferenceProperties, HugeLogitsPickTheLargest) {
  AttentionCase c = AttentionCase::fixed(DType::f32, {.batch = 1, .nheads = 1, .nheads_k = 1});
  c.scores.softmax_scale = 1e30;
  forward(c), backward(c);
  for (int i = 0; i < 5; ++i) {
    int best = 0;
    double largest = -INFINITY;
    for (int j = 0; j < 7; ++j) {
      double s = 0.0;
      for (int col = 0; col < 3; ++col) s += c.q.at(0, i, 0, col) * c.k.at(0, j, 0, col);
      if (s > largest) largest = s, best = j;
    }
    EXPECT_NEAR(c.lse.at(0, 0, i) / (largest * 1e30), 1.0, 1e-7);
    for (int col = 0; col < 3; ++col) EXPECT_EQ(c.out.at(0, i, 0, col), c.v.at(0, best, 0, col));
  }
  for (int64_t n = 0; n < c.dv.numel(); ++n) EXPECT_TRUE(std::isfinite(c.dv.get(n)));
}

/// A NaN key reaches the rows that see it and no others; a NaN value, one column of them.
TEST(ReferenceProperties, NaNReachesExactlyWhatDependsOnIt) {
  constexpr int kKey = 4;
  AttentionCase clean = AttentionCase::fixed(DType::f32, {.seqlen_q = 7});
  clean.scores = {.causal = true, .window_left = 1};  // key 4 is seen by rows 4 and 5
  AttentionCase bad_key = clean, bad_value = clean;
  bad_key.k.put(NAN, 0, kKey, 1, 0);
  bad_value.v.put(NAN, 0, kKey, 1, 2);
  for (AttentionCase* c : {&clean, &bad_key, &bad_value}) forward(*c), backward(*c);

  for (int64_t n = 0; n < clean.out.numel(); ++n) {
    const Shape at = clean.out.index(n);
    const bool sees = at[0] == 0 && at[2] / 2 == 1 && (at[1] == kKey || at[1] == kKey + 1);
    const auto expect = [&](const HostTensor& got, const HostTensor& was, bool nan) {
      EXPECT_TRUE(nan ? std::isnan(got.get(n)) : got.get(n) == was.get(n)) << n << ": " << got.get(n);
    };
    expect(bad_key.out, clean.out, sees);
    expect(bad_key.dq, clean.dq, sees);
    expect(bad_value.out, clean.out, sees && at[3] == 2);
    expect(bad_value.dq, clean.dq, sees);
    EXPECT_EQ(std::isnan(bad_key.lse.at(at[0], at[2], at[1])), sees);
    EXPECT_EQ(bad_value.lse.at(at[0], at[2], at[1]), clean.lse.at(at[0], at[2], at[1]));
  }
  for (int64_t n = 0; n < clean.dk.numel(); ++n) {
    const Shape at = clean.dk.index(n);
    const bool shares_a_row = at[0] == 0 && at[2] == 1 && at[1] >= kKey - 1 && at[1] <= kKey + 1;
    EXPECT_EQ(std::isnan(bad_key.dk.get(n)), shares_a_row) << n;
    EXPECT_EQ(std::isnan(bad_key.dv.get(n)), shares_a_row) << n;
    EXPECT_EQ(std::isnan(bad_value.dv.get(n)), false) << n;
  }
}

TEST(ReferenceProperties, OnlyWhenAskedForByName) {
  const auto backend = make_reference_backend();
  AttentionCase c = AttentionCase::fixed(DType::f32, {});
  Problem problem = make_problem(c.forward_call());
  EXPECT_EQ(backend->name(), "reference");
  EXPECT_FALSE(backend->automatic());
  EXPECT_EQ(answer(*backend, problem, true), "");
  problem.device = {2, 0};
  EXPECT_NE(answer(*backend, problem, true), "");
}

}  // namespace
}  // namespace flash_attn::test
