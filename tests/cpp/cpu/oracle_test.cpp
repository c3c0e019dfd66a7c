// The CPU kernels of every instruction set that runs here, against the oracle, over random calls.
#include <gtest/gtest.h>

#include "core/problem.hpp"
#include "cpu/against_oracle.hpp"
#include "cpu/driver.hpp"
#include "cpu/kernels_under_test.hpp"
#include "cpu/plan.hpp"
#include "support/attention_case.hpp"
#include "support/compare.hpp"
#include "support/draw.hpp"

namespace flash_attn::test {
namespace {

/// Of the lengths that cumulated lengths are made of.
int64_t longest(const HostTensor& cu_seqlens) {
  double most = 0;
  for (int64_t b = 1; b < cu_seqlens.numel(); ++b) most = std::max(most, cu_seqlens.get(b) - cu_seqlens.get(b - 1));
  return static_cast<int64_t>(most);
}

AttentionCase random_case(uint64_t seed) {
  Draw draw(seed);
  Dims d;
  d.batch = draw.between(1, 3);
  d.nheads_k = draw.between(1, 3);
  d.nheads = d.nheads_k * draw.between(1, 3);
  d.headdim = draw.one_in(5) ? draw.between(129, draw.one_in(4) ? 600 : 256) : draw.between(1, 128);
  d.headdim_v = draw.one_in(4) ? draw.between(1, 150) : d.headdim;
  d.seqlen_q = draw.one_in(5) ? 1 : draw.between(0, draw.one_in(8) ? 300 : 70);
  d.seqlen_k = draw.between(0, draw.one_in(8) ? 700 : 200);
  const DType dtype = draw.of({DType::f32, DType::bf16, DType::f16});

  AttentionCase c;
  if (draw.one_in(2)) {
    std::vector<int32_t> q, k;
    for (int64_t b = 0; b < d.batch; ++b) {
      q.push_back(static_cast<int32_t>(draw.between(0, d.seqlen_q)));
      k.push_back(static_cast<int32_t>(draw.one_in(6) ? 0 : draw.between(0, d.seqlen_k)));
    }
    c = AttentionCase::packed(dtype, q, k, d, seed, draw.between(0, 2));
  } else {
    const Layout layout = draw.one_in(2) ? Layout{} : Layout{{0, 2, 1, 3}, draw.between(1, 2), draw.between(0, 3)};
    c = AttentionCase::fixed(dtype, d, seed, layout);
  }
  Scores& s = c.scores;
  s.causal = draw.one_in(3);
  if (draw.one_in(3)) s.window_left = draw.between(0, d.seqlen_k + 5);
  if (draw.one_in(3)) s.window_right = draw.between(0, d.seqlen_k + 5);
  if (draw.one_in(6)) s.attention_chunk = draw.between(1, d.seqlen_k + 1);
  if (draw.one_in(3)) s.softcap = draw.of({1.5, 30.0});
  if (draw.one_in(5)) s.softmax_scale = draw.of({-0.3, 1.5 / std::sqrt(static_cast<double>(d.headdim))});
  if (draw.one_in(3)) c.alibi = HostTensor::normal(DType::f32, {d.nheads}, seed + 7, 0.3);
  if (draw.one_in(4)) c.sink = HostTensor::normal(DType::f32, {d.nheads}, seed + 8);
  if (draw.one_in(2)) c.dlse = HostTensor();  // no gradient through lse
  c.run.positive_empty_lse = draw.one_in(2);
  if (draw.one_in(3)) {
    const Tensor q = c.q.tensor();
    const int64_t batch = c.cu_seqlens_q.present() ? c.cu_seqlens_q.size(0) - 1 : d.batch;
    const int64_t rows = c.cu_seqlens_q.present() ? longest(c.cu_seqlens_q) : q.shape[1];
    const int64_t keys = c.cu_seqlens_k.present() ? longest(c.cu_seqlens_k) : d.seqlen_k;
    const auto or_one = [&](int64_t n) { return draw.one_in(3) ? 1 : n; };
    const Shape shape{or_one(batch), or_one(d.nheads), or_one(rows), keys};
    const Layout layout = draw.one_in(3) ? Layout{{2, 1, 0, 3}, draw.between(1, 2), draw.between(0, 3)} : Layout{};
    c.bias = HostTensor::normal(draw.of({DType::f32, DType::bf16, DType::f16, DType::f64}), shape, seed + 9, 1, layout);
    for (int64_t n = 0; draw.one_in(2) && n < c.bias.numel(); n += draw.between(1, 9)) c.bias.set(n, -INFINITY);
  }
  if (draw.one_in(3)) c.dropout = {.p = draw.of({0.02, 0.2, 0.5}), .seed = seed * 0x123456789abcdef, .offset = seed};
  return c;
}

/// A few units in the last place of the results' dtype, at the results' scale (about 1; gradients up to about 30).
double tolerance(DType dtype) { return dtype == DType::f32 ? 2e-5 : dtype == DType::bf16 ? 8e-3 : 1e-3; }

class AgainstOracle : public ::testing::TestWithParam<uint64_t> {};

TEST_P(AgainstOracle, ForwardAndBackward) {
  const AttentionCase want = by_oracle(random_case(GetParam()));
  for (const cpu::Kernels* kernels : kernels_under_test()) {
    SCOPED_TRACE(kernels->name);
    AttentionCase got = random_case(GetParam());
    const double atol = tolerance(got.q.dtype());
    cpu::forward(make_problem(got.forward_call()), *kernels);
    EXPECT_TRUE(close(got.out, want.out, atol, atol));
    EXPECT_TRUE(close(got.lse, want.lse, 1e-5, 1e-6));
    EXPECT_TRUE(got.out.gaps_untouched());

    got.out = want.out, got.lse = want.lse;
    cpu::backward(make_problem(got.backward_call()), *kernels);
    // delta = dout . out is taken from the rounded out, as everywhere: its error grows with the root of headdim_v, and
    // as out does with what dropout keeps.
    const double through_delta =
        4 * atol * std::max(1.0, std::sqrt(static_cast<double>(got.v.size(got.v.tensor().ndim - 1)) / 128)) /
        (1 - got.dropout.p);
    EXPECT_TRUE(close(got.dq, want.dq, through_delta, atol));
    EXPECT_TRUE(close(got.dk, want.dk, through_delta, atol));
    EXPECT_TRUE(close(got.dv, want.dv, 4 * atol, atol));
    if (got.sink.present()) {
      EXPECT_TRUE(close(got.dsink, want.dsink, 40 * atol, atol));
    }
    if (got.bias.present()) {
      EXPECT_TRUE(close(got.dbias, want.dbias, 40 * atol, atol));
      EXPECT_TRUE(got.dbias.gaps_untouched());
    }
    EXPECT_TRUE(got.dq.gaps_untouched() && got.dk.gaps_untouched() && got.dv.gaps_untouched());
  }
}

INSTANTIATE_TEST_SUITE_P(Random, AgainstOracle, ::testing::Range(uint64_t{1}, uint64_t{161}));

/// A NaN reaches the rows that see it and no other, through tiles that mix both: keys from the last sequence positions,
/// rows of a causal triangle. 16-bit numbers may be split into parts, which an inf or a NaN cannot be.
TEST(Cpu, NanReachesExactlyWhatDependsOnIt) {
  for (const cpu::Kernels* kernels : kernels_under_test()) {
    for (const DType dtype : {DType::f32, DType::bf16, DType::f16}) {
      SCOPED_TRACE(std::string(kernels->name) + (dtype == DType::f32    ? " fp32"
                                                 : dtype == DType::bf16 ? " bf16"
                                                                        : " fp16"));
      const double atol = dtype == DType::f32 ? 1e-5 : tolerance(dtype);
      for (int64_t poisoned : {0, 63, 64, 100, 149}) {
        const Dims d{1, 150, 150, 2, 1, 40, 40};
        AttentionCase got = AttentionCase::fixed(dtype, d);
        got.scores.causal = true;
        got.dlse = HostTensor();
        got.k.put(NAN, 0, poisoned, 0, 5);
        got.v.put(INFINITY, 0, poisoned, 0, 6);
        expect_as_oracle(got, by_oracle(got), *kernels, atol, 10 * atol);
      }
    }
  }
}

/// An inf or a NaN in one operand at a time. Row 210 alone holds it (q, dout), or the rows that see key 210 (k, v). The
/// backward meets row 210 when it has sums of the rows before.
TEST(Cpu, InfAndNanInEachOperand) {
  for (const DType dtype : {DType::f32, DType::bf16, DType::f16}) {
    for (const double value :
         {static_cast<double>(NAN), static_cast<double>(INFINITY), -static_cast<double>(INFINITY)}) {
      for (int operand = 0; operand < 4; ++operand) {
        if (operand == 3 && std::isinf(value)) continue;  // delta is a sum of infs: NaN or inf by its order
        AttentionCase call = AttentionCase::fixed(dtype, {1, 230, 230, 2, 2, 33, 33});
        call.scores.window_left = 20, call.scores.window_right = 3;
        call.dlse = HostTensor();
        HostTensor* const operands[] = {&call.q, &call.k, &call.v, &call.dout};
        operands[operand]->put(value, 0, 210, 1, 32);
        const AttentionCase want = by_oracle(call);
        for (const cpu::Kernels* kernels : kernels_under_test()) {
          SCOPED_TRACE(std::string(kernels->name) + ", operand " + std::to_string(operand) + ", " +
                       std::to_string(value));
          AttentionCase got = call;
          expect_as_oracle(got, want, *kernels, tolerance(dtype), 4 * tolerance(dtype));
        }
      }
    }
  }
}

TEST(Cpu, NanSinkReachesItsHead) {
  AttentionCase got = AttentionCase::fixed(DType::f32, {1, 5, 7, 2, 1, 3, 3});
  got.sink = HostTensor::full(DType::f32, {2}, 0.5);
  got.sink.put(NAN, 1);
  const AttentionCase want = by_oracle(got);
  for (const cpu::Kernels* kernels : kernels_under_test()) {
    SCOPED_TRACE(kernels->name);
    cpu::forward(make_problem(got.forward_call()), *kernels);
    EXPECT_TRUE(close(got.out, want.out, 1e-6));
    EXPECT_TRUE(close(got.lse, want.lse, 1e-5));
    EXPECT_TRUE(std::isnan(got.out.at(0, 0, 1, 0)) && !std::isnan(got.out.at(0, 0, 0, 0)));
  }
}

/// The only score of a row is its maximum, and by the rounding of scale * score often just below it: p is 1, not the
/// largest error of 2^t below 1, and lse the score to the last digit.
TEST(Cpu, OneKeyHasAllTheWeight) {
  AttentionCase got = AttentionCase::fixed(DType::f32, {2, 300, 1, 2, 1, 1, 3});
  for (const cpu::Kernels* kernels : kernels_under_test()) {
    SCOPED_TRACE(kernels->name);
    cpu::forward(make_problem(got.forward_call()), *kernels);
    for (int64_t b = 0; b < 2; ++b)
      for (int64_t i = 0; i < 300; ++i)
        for (int64_t h = 0; h < 2; ++h) {
          const double score = got.q.at(b, i, h, 0) * got.k.at(b, 0, 0, 0);
          EXPECT_NEAR(got.lse.at(b, h, i), score, 0x1p-24 * (1 + 2 * std::abs(score)));
          for (int64_t c = 0; c < 3; ++c)
            EXPECT_NEAR(got.out.at(b, i, h, c), got.v.at(b, 0, 0, c), 0x1p-23 * std::abs(got.v.at(b, 0, 0, c)));
        }
  }
}

/// Scores so large that rounding one is more than 2^t bears: the largest of a row has all the weight, in both passes.
TEST(Cpu, HugeScoresPickTheLargest) {
  for (const DType dtype : {DType::f32, DType::bf16, DType::f16})
    for (const int64_t seqlen_q : {3, 70})
      for (const double scale : {-1e8, 1e9, 1e12, 1e30}) {
        AttentionCase got = AttentionCase::fixed(dtype, {1, seqlen_q, 700, 2, 1, 64, 64});
        got.scores.softmax_scale = scale;
        const AttentionCase want = by_oracle(got);
        const double eps = dtype == DType::f32 ? 0x1p-22 : dtype == DType::bf16 ? 0x1p-8 : 0x1p-11;
        for (const cpu::Kernels* kernels : kernels_under_test()) {
          SCOPED_TRACE(testing::Message() << kernels->name << " " << name_of(dtype) << " scale " << scale);
          cpu::forward(make_problem(got.forward_call()), *kernels);
          EXPECT_TRUE(close(got.out, want.out, eps, eps));
          EXPECT_TRUE(close(got.lse, want.lse, 0.0, 1e-6));
          cpu::backward(make_problem(got.backward_call()), *kernels);
          EXPECT_TRUE(close(got.dv, want.dv, 4 * eps, eps));
        }
      }
}

/// Few queries, many keys: the keys are split among tasks and packed in chunks, and sums over splits are merged. With
/// splits that some or all rows do not see, sequences shorter than a split, and inf and NaN in a split.
TEST(Cpu, FewQueriesOfManyKeys) {
  for (uint64_t seed = 1; seed <= 24; ++seed) {
    Draw draw(seed);
    Dims d;
    d.batch = draw.between(1, 2);
    d.nheads_k = draw.between(1, 2), d.nheads = d.nheads_k * draw.of<int64_t>({1, 4});
    d.headdim = draw.between(1, 70), d.headdim_v = draw.one_in(3) ? draw.between(1, 70) : d.headdim;
    d.seqlen_q = draw.between(1, 20), d.seqlen_k = draw.between(4096, 6000);
    const DType dtype = draw.of({DType::f32, DType::bf16, DType::f16});
    const std::vector<int32_t> lengths_q(static_cast<std::size_t>(d.batch), static_cast<int32_t>(d.seqlen_q));
    std::vector<int32_t> lengths_k(lengths_q.size(), static_cast<int32_t>(d.seqlen_k));
    if (d.batch > 1 && draw.one_in(2)) lengths_k[0] = static_cast<int32_t>(draw.between(0, 600));
    AttentionCase got = AttentionCase::packed(dtype, lengths_q, lengths_k, d, seed);
    got.scores.causal = draw.one_in(3);
    if (draw.one_in(3)) got.scores.window_left = draw.between(0, 2000);
    if (draw.one_in(4)) got.scores.softcap = 20.0;
    if (draw.one_in(3)) got.alibi = HostTensor::normal(DType::f32, {d.nheads}, seed + 7, 0.01);
    if (draw.one_in(3)) got.sink = HostTensor::normal(DType::f32, {d.nheads}, seed + 8);
    if (draw.one_in(3)) got.bias = HostTensor::normal(dtype, {1, d.nheads, d.seqlen_q, d.seqlen_k}, seed + 9);
    if (draw.one_in(3)) got.dropout = {.p = 0.3, .seed = seed, .offset = 5};
    if (draw.one_in(4)) got.v.put(draw.of({INFINITY, NAN}), d.seqlen_k / 2, 0, 0);
    if (draw.one_in(6)) got.q.put(NAN, 0, 0, 0);
    AttentionCase want = got;
    want.run.backend = "reference";
    forward(want.forward_call());
    for (const cpu::Kernels* kernels : kernels_under_test()) {
      SCOPED_TRACE(std::string(kernels->name) + ", seed " + std::to_string(seed));
      const Problem p = make_problem(got.forward_call());
      const cpu::Plan plan = cpu::make_plan(p, cpu::attend_kernel(*kernels, p), kernels->width, 1);
      ASSERT_TRUE(plan.own_keys && plan.splits > 1);
      cpu::forward(p, *kernels);
      EXPECT_TRUE(close(got.out, want.out, tolerance(dtype), tolerance(dtype)));
      EXPECT_TRUE(close(got.lse, want.lse, 1e-5, 1e-6));
    }
  }
}

TEST(Cpu, PagesChunksAndPaddingAreJustOtherSequences) {
  // Three pages of 16 keys, in a shuffled order, of which the first 5 keys are padding and the last 3 unused.
  const Dims d{1, 9, 48, 2, 1, 24, 24};
  AttentionCase got = AttentionCase::fixed(DType::bf16, d);
  got.k = HostTensor::normal(DType::bf16, {7, 16, 1, 24}, 3),
  got.v = HostTensor::normal(DType::bf16, {7, 16, 1, 24}, 4);
  got.block_table = HostTensor::ints({6, 0, 3}, {1, 3});
  got.leftpad_k = HostTensor::ints({5});
  got.seqused_k = HostTensor::ints({45});
  got.scores.causal = true;
  AttentionCase want = got;
  want.run.backend = "reference", got.run.backend = "cpu";
  forward(want.forward_call());
  forward(got.forward_call());
  EXPECT_TRUE(close(got.out, want.out, 8e-3, 8e-3));
  EXPECT_TRUE(close(got.lse, want.lse, 1e-5));
}

}  // namespace
}  // namespace flash_attn::test
