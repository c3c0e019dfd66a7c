// Dropout of the CPU kernels: every entry that the rule of core/dropout.hpp drops, and no other.
#include "core/dropout.hpp"

#include <gtest/gtest.h>

#include "core/problem.hpp"
#include "cpu/against_oracle.hpp"
#include "cpu/driver.hpp"
#include "cpu/kernels_under_test.hpp"
#include "support/attention_case.hpp"
#include "support/compare.hpp"

namespace flash_attn::test {
namespace {

constexpr int32_t kRows = 45, kKeys = 700;  // more than a block of keys and than a group of rows; no whole vectors

/// Scores are all 0, and value j is the j-th unit vector: out (i, h, j) is 0 where (b, h, i, j) is dropped, nowhere
/// else. So is dv (j, h, i) with dout the unit vectors of queries, in a sequence of its own.
AttentionCase unit_vectors(DType dtype, const Dropout& dropout) {
  const Dims d{.batch = 2, .nheads = 3, .nheads_k = 3, .headdim = 4, .headdim_v = kKeys};
  AttentionCase c = AttentionCase::packed(dtype, {7, kRows}, {kKeys, kKeys - 3}, d);
  c.q = HostTensor::full(dtype, {7 + kRows, 3, 4}, 0.0);
  c.v = HostTensor::full(dtype, {2 * kKeys - 3, 3, kKeys}, 0.0);
  c.dout = HostTensor::full(dtype, {7 + kRows, 3, kKeys}, 0.0);
  for (int h = 0; h < 3; ++h) {
    for (int j = 0; j < kKeys; ++j) c.v.put(1.0, j, h, j);
    for (int j = 0; j < kKeys - 3; ++j) c.v.put(1.0, kKeys + j, h, j);
    for (int i = 0; i < 7; ++i) c.dout.put(1.0, i, h, i);
    for (int i = 0; i < kRows; ++i) c.dout.put(1.0, 7 + i, h, i);
  }
  c.dlse = HostTensor();
  c.dropout = dropout;
  return c;
}

TEST(CpuDropout, DropsWhatTheRuleDrops) {
  // Thresholds that hang on high and on low bits of the draws, and words of 32 bits that are not the lower ones.
  const Dropout rules[] = {{.p = 0.5, .seed = 1, .offset = 0},
                           {.p = 0.2871, .seed = 0x9e3779b97f4a7c15, .offset = 0xfedcba9876543210},
                           {.p = 1 - 3.0 / 65536, .seed = uint64_t{7} << 32, .offset = uint64_t{5} << 32}};
  for (const cpu::Kernels* kernels : kernels_under_test()) {
    for (const DType dtype : {DType::f32, DType::bf16, DType::f16}) {
      for (const Dropout& dropout : rules) {
        SCOPED_TRACE(std::string(kernels->name) + ", p " + std::to_string(dropout.p));
        const DropoutRule rule(dropout);
        AttentionCase c = unit_vectors(dtype, dropout);
        cpu::forward(make_problem(c.forward_call()), *kernels);
        cpu::backward(make_problem(c.backward_call()), *kernels);
        int64_t wrong = 0;
        for (int b = 0; b < 2; ++b)
          for (int h = 0; h < 3; ++h)
            for (int i = 0; i < (b ? kRows : 7); ++i)
              for (int j = 0; j < (b ? kKeys - 3 : kKeys); ++j) {
                const bool keep = rule.keep(b * 3 + h, i, j);
                wrong += (c.out.at(b * 7 + i, h, j) != 0) != keep;
                wrong += (c.dv.at(b * kKeys + j, h, i) != 0) != keep;
              }
        EXPECT_EQ(wrong, 0);
      }
    }
  }
}

TEST(CpuDropout, EverythingMayBeDropped) {
  for (const cpu::Kernels* kernels : kernels_under_test()) {
    for (const DType dtype : {DType::f32, DType::bf16, DType::f16}) {
      AttentionCase c = AttentionCase::fixed(dtype, {2, 20, 30, 2, 1, 16, 16});
      c.dlse = HostTensor();
      cpu::forward(make_problem(c.forward_call()), *kernels);
      const HostTensor lse = c.lse;
      c.dropout = {.p = 1 - 1e-9};
      cpu::forward(make_problem(c.forward_call()), *kernels);
      EXPECT_TRUE(close(c.lse, lse, 0.0));
      EXPECT_TRUE(all_equal(c.out, 0.0));
      cpu::backward(make_problem(c.backward_call()), *kernels);
      for (const HostTensor* x : {&c.dq, &c.dk, &c.dv}) EXPECT_TRUE(all_equal(*x, 0.0));
    }
  }
}

/// 0 times inf is NaN: an entry that is dropped is still one that the row sees, and one outside the mask is not.
TEST(CpuDropout, InfAndNanOfDroppedEntries) {
  for (const cpu::Kernels* kernels : kernels_under_test()) {
    for (const DType dtype : {DType::f32, DType::bf16, DType::f16}) {
      SCOPED_TRACE(kernels->name);
      AttentionCase got = AttentionCase::fixed(dtype, {1, 90, 90, 2, 2, 33, 33});
      got.scores.causal = true;
      got.dropout = {.p = 0.9, .seed = 3, .offset = 4};
      got.dlse = HostTensor();
      got.v.put(INFINITY, 0, 60, 1, 32);
      const double atol = dtype == DType::f32 ? 2e-5 : 5e-2;
      expect_as_oracle(got, by_oracle(got), *kernels, atol, 10 * atol);
    }
  }
}

}  // namespace
}  // namespace flash_attn::test
