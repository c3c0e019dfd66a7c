// Overlap against the set of bytes that each tensor touches.
#include "core/overlap.hpp"

#include <gtest/gtest.h>

#include <random>
#include <set>

namespace flash_attn {
namespace {

Tensor strided(uintptr_t address, DType dtype, std::vector<int64_t> shape, std::vector<int64_t> stride) {
  Tensor t;
  t.data = reinterpret_cast<void*>(address);  // never dereferenced
  t.dtype = dtype;
  t.ndim = static_cast<int32_t>(shape.size());
  std::copy(shape.begin(), shape.end(), t.shape);
  std::copy(stride.begin(), stride.end(), t.stride);
  return t;
}

/// All bytes of `t`; `twice` tells whether one came up more than once.
std::set<uintptr_t> bytes_of(const Tensor& t, bool* twice = nullptr) {
  std::set<uintptr_t> bytes;
  if (twice) *twice = false;
  for (int64_t n = 0; n < t.numel(); ++n) {
    int64_t rest = n, offset = 0;
    for (int d = t.ndim - 1; d >= 0; --d) offset += rest % t.shape[d] * t.stride[d], rest /= t.shape[d];
    for (std::size_t b = 0; b < size_of(t.dtype); ++b)
      if (!bytes.insert(reinterpret_cast<uintptr_t>(t.data) + offset * size_of(t.dtype) + b).second && twice)
        *twice = true;
  }
  return bytes;
}

bool overlap(const Tensor& a, const Tensor& b) {
  const auto extent = [](const Tensor& t) {
    const auto bytes = bytes_of(t);
    return bytes.empty() ? Extent{} : Extent{*bytes.begin(), *bytes.rbegin() + 1};
  };
  return may_overlap(a, extent(a), b, extent(b));
}

bool really_overlap(const Tensor& a, const Tensor& b) {
  const auto bytes = bytes_of(a);
  for (uintptr_t byte : bytes_of(b))
    if (bytes.count(byte)) return true;
  return false;
}

TEST(Overlap, RandomSlicesOfOneTensorAreDecidedExactly) {
  std::mt19937 random(7);
  const auto draw = [&](int64_t lo, int64_t hi) { return std::uniform_int_distribution<int64_t>(lo, hi)(random); };
  int apart = 0, together = 0;
  for (int round = 0; round < 4000; ++round) {
    // Two boxes in one contiguous (n0, n1, n2, n3) tensor, with steps.
    const int64_t n[4] = {draw(1, 3), draw(1, 4), draw(1, 4), draw(1, 5)};
    const int64_t whole[4] = {n[1] * n[2] * n[3], n[2] * n[3], n[3], 1};
    const auto box = [&] {
      std::vector<int64_t> shape, stride;
      int64_t offset = 0;
      for (int d = 0; d < 4; ++d) {
        const int64_t from = draw(0, n[d] - 1), step = draw(1, 2);
        shape.push_back(draw(1, (n[d] - 1 - from) / step + 1));
        stride.push_back(whole[d] * step);
        offset += from * whole[d];
      }
      if (draw(0, 3) == 0) {  // one dimension backwards
        const int d = static_cast<int>(draw(0, 3));
        offset += (shape[d] - 1) * stride[d];
        stride[d] = -stride[d];
      }
      return strided(4096 + offset * 4, DType::f32, shape, stride);
    };
    const Tensor a = box(), b = box();
    const bool real = really_overlap(a, b);
    (real ? together : apart)++;
    ASSERT_EQ(overlap(a, b), real) << "round " << round;
    ASSERT_EQ(overlap(b, a), real) << "round " << round;
  }
  EXPECT_GT(apart, 400);
  EXPECT_GT(together, 400);
}

TEST(Overlap, DifferentDtypesAndAnyStridesAreNeverMissed) {
  std::mt19937 random(11);
  const auto draw = [&](int64_t lo, int64_t hi) { return std::uniform_int_distribution<int64_t>(lo, hi)(random); };
  for (int round = 0; round < 4000; ++round) {
    const auto any = [&] {
      const DType dtype = draw(0, 1) ? DType::bf16 : DType::f64;
      return strided(4096 + draw(0, 20) * 8, dtype, {draw(1, 3), draw(1, 3), draw(1, 4)},
                     {draw(-9, 9), draw(-5, 5), draw(-3, 3)});
    };
    const Tensor a = any(), b = any();
    ASSERT_TRUE(overlap(a, b) || !really_overlap(a, b)) << "round " << round;
    bool twice = false;
    bytes_of(a, &twice);
    ASSERT_TRUE(may_overlap_itself(a) || !twice) << "round " << round;
  }
}

TEST(Overlap, SlicesOfPackedQkv) {
  // dqkv (2, 100, 3, 4, 8): large enough that the answer has to come from the strides.
  const std::vector<int64_t> shape{2, 100, 4, 8}, stride{100 * 96, 96, 8, 1};
  const Tensor dq = strided(4096, DType::f32, shape, stride), dk = strided(4096 + 32 * 4, DType::f32, shape, stride),
               dv = strided(4096 + 64 * 4, DType::f32, shape, stride);
  EXPECT_FALSE(overlap(dq, dk));
  EXPECT_FALSE(overlap(dq, dv));
  EXPECT_FALSE(overlap(dk, dv));
  EXPECT_TRUE(overlap(dq, strided(4096 + 31 * 4, DType::f32, shape, stride)));
  EXPECT_TRUE(overlap(dq, strided(4096 + 96 * 4, DType::f32, shape, stride)));
  // Fewer key heads: qkv (2, 100, 4 + 2 + 2, 8).
  const Tensor gq = strided(4096, DType::bf16, {2, 100, 4, 8}, {6400, 64, 8, 1});
  const Tensor gk = strided(4096 + 32 * 2, DType::bf16, {2, 100, 2, 8}, {6400, 64, 8, 1});
  EXPECT_FALSE(overlap(gq, gk));
}

TEST(Overlap, Itself) {
  EXPECT_FALSE(may_overlap_itself(strided(4096, DType::f32, {2, 3, 4}, {12, 4, 1})));
  EXPECT_FALSE(may_overlap_itself(strided(4096, DType::f32, {3, 2, 4}, {4, 12, 1}))) << "transposed";
  EXPECT_FALSE(may_overlap_itself(strided(4096, DType::f32, {1, 4}, {0, 1}))) << "one element may have any stride";
  EXPECT_FALSE(may_overlap_itself(strided(4096, DType::f32, {4, 0}, {0, 0}))) << "empty";
  EXPECT_FALSE(may_overlap_itself(strided(4096, DType::f32, {3, 4}, {-4, 1}))) << "backwards";
  EXPECT_TRUE(may_overlap_itself(strided(4096, DType::f32, {3, 4}, {0, 1}))) << "expanded";
  EXPECT_TRUE(may_overlap_itself(strided(4096, DType::f32, {3, 4}, {3, 1}))) << "rows too close";
}

}  // namespace
}  // namespace flash_attn
