// Few rows, whose keys are read where they lie: every way to say where that is, against the oracle.
#include <gtest/gtest.h>

#include <algorithm>
#include <numeric>

#include "core/problem.hpp"
#include "cpu/driver.hpp"
#include "cpu/kernels_under_test.hpp"
#include "support/attention_case.hpp"
#include "support/compare.hpp"
#include "support/draw.hpp"

namespace flash_attn::test {
namespace {

double tolerance(DType t) { return t == DType::f32 ? 2e-5 : t == DType::bf16 ? 8e-3 : 1e-3; }

/// (batch, seqlen_k, nheads_k, d) memory becomes pages in a drawn order; the page after the last one is never named.
void cut_into_pages(AttentionCase& c, const Dims& d, int64_t page_size, DType dtype, Draw& draw, uint64_t seed) {
  const int64_t each = (d.seqlen_k + page_size - 1) / page_size, pages = d.batch * each;
  std::vector<int32_t> order(static_cast<std::size_t>(pages));
  std::iota(order.begin(), order.end(), 0);
  for (std::size_t i = order.size(); i > 1; --i)
    std::swap(order[i - 1], order[static_cast<std::size_t>(draw.between(0, static_cast<int64_t>(i) - 1))]);
  c.k = HostTensor::normal(dtype, {pages + 1, page_size, d.nheads_k, d.headdim}, seed + 11);
  c.v = HostTensor::normal(dtype, {pages + 1, page_size, d.nheads_k, d.headdim_v}, seed + 12);
  c.block_table = HostTensor::ints(order, {d.batch, each});
}

AttentionCase decode_case(uint64_t seed) {
  Draw draw(seed);
  Dims d;
  d.batch = draw.between(1, 3);
  d.nheads_k = draw.between(1, 9);
  d.seqlen_q = draw.one_in(2) ? 1 : draw.between(1, 5);
  d.nheads = d.nheads_k * draw.between(1, cpu::kInPlaceRows / d.seqlen_q);
  d.headdim = 32 * draw.between(1, 5), d.headdim_v = draw.one_in(3) ? 32 * draw.between(1, 4) : d.headdim;
  d.seqlen_k = draw.one_in(4) ? draw.between(64, 90) : draw.between(91, 1500);
  const DType dtype = draw.of({DType::f32, DType::bf16, DType::f16});
  const Layout layout = draw.one_in(3) ? Layout{{0, 2, 1, 3}, 1, draw.between(0, 3)} : Layout{};
  AttentionCase c = AttentionCase::fixed(dtype, d, seed, layout);
  if (draw.one_in(3)) cut_into_pages(c, d, draw.of<int64_t>({1, 3, 16, 64}), dtype, draw, seed);

  const auto lengths = [&](int64_t least) {
    std::vector<int32_t> n;
    for (int64_t b = 0; b < d.batch; ++b) n.push_back(static_cast<int32_t>(draw.between(least, d.seqlen_k)));
    return n;
  };
  if (draw.one_in(2)) {
    const std::vector<int32_t> used = lengths(0);
    c.seqused_k = HostTensor::ints(used);
    if (draw.one_in(2)) {
      std::vector<int32_t> pad;
      for (const int32_t n : used) pad.push_back(static_cast<int32_t>(draw.between(0, n)));
      c.leftpad_k = HostTensor::ints(pad);
    }
  }
  c.scores.causal = draw.one_in(2);
  if (draw.one_in(4)) c.scores.window_left = draw.between(0, 300);
  if (draw.one_in(6)) c.scores.window_right = draw.between(0, 3);
  if (draw.one_in(4)) c.scores.softcap = 20.0;
  if (draw.one_in(4)) c.alibi = HostTensor::normal(DType::f32, {d.nheads}, seed + 7, 0.01);
  if (draw.one_in(4)) c.sink = HostTensor::normal(DType::f32, {d.nheads}, seed + 8);
  if (draw.one_in(4) && !c.block_table.present())
    c.bias = HostTensor::normal(dtype, {1, d.nheads, d.seqlen_q, d.seqlen_k}, seed + 9);
  if (draw.one_in(5)) c.dropout = {.p = 0.3, .seed = seed, .offset = 5};
  if (draw.one_in(5)) c.q.put(draw.of({INFINITY, NAN}), 0, 0, 0, 1);
  if (draw.one_in(3)) {  // where some rows see it and, under a mask, some do not
    HostTensor& x = draw.one_in(2) ? c.k : c.v;
    x.put(draw.of({INFINITY, -INFINITY, NAN}), 0, x.size(1) - 1, 0, 3);
  }
  return c;
}

TEST(CpuInPlace, AgreesWithTheOracle) {
  int in_place = 0;
  for (uint64_t seed = 1; seed <= 80; ++seed) {
    AttentionCase got = decode_case(seed), want = got;
    want.run.backend = "reference";
    forward(want.forward_call());
    for (const cpu::Kernels* kernels : kernels_under_test()) {
      SCOPED_TRACE(std::string(kernels->name) + ", seed " + std::to_string(seed));
      const Problem p = make_problem(got.forward_call());
      in_place += &cpu::attend_kernel(*kernels, p) == kernels->attend_in_place;
      cpu::forward(p, *kernels);
      EXPECT_TRUE(close(got.out, want.out, tolerance(p.dtype), tolerance(p.dtype)));
      EXPECT_TRUE(close(got.lse, want.lse, 1e-5, 1e-6));
    }
  }
  EXPECT_GE(in_place, 50 * static_cast<int>(kernels_under_test().size()));
}

/// Columns that do not lie next to each other, odd headdims, more rows and fewer keys have their keys packed.
TEST(CpuInPlace, ServesWhatItCan) {
  for (const cpu::Kernels* kernels : kernels_under_test()) {
    const auto in_place = [&](const Dims& d, const Layout& layout) {
      const AttentionCase c = AttentionCase::fixed(DType::bf16, d, 1, layout);
      return &cpu::attend_kernel(*kernels, make_problem(c.forward_call())) == kernels->attend_in_place;
    };
    EXPECT_TRUE(in_place({2, 1, 100, 8, 2, 64, 64}, {}));
    EXPECT_TRUE(in_place({2, 4, 100, 8, 2, 64, 32}, {}));
    EXPECT_FALSE(in_place({2, 5, 100, 8, 2, 64, 64}, {}));
    EXPECT_FALSE(in_place({2, 1, 63, 8, 2, 64, 64}, {}));
    EXPECT_FALSE(in_place({2, 1, 100, 8, 2, 33, 64}, {}));
    EXPECT_FALSE(in_place({2, 1, 100, 8, 2, 64, 31}, {}));
    EXPECT_FALSE(in_place({2, 1, 100, 8, 2, 64, 64}, {{0, 1, 2, 3}, 2, 0}));
  }
}

}  // namespace
}  // namespace flash_attn::test
