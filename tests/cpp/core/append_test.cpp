// New keys join a cache before attention, and are rotated: against the same written out by hand.
#include <gtest/gtest.h>

#include <cmath>
#include <ostream>

#include "support/attention_case.hpp"
#include "support/compare.hpp"
#include "support/draw.hpp"

namespace flash_attn::test {
namespace {

struct AppendCase {
  AttentionCase attention;
  HostTensor k, v, cu_seqlens, cos, sin, positions;  // as in NewKeys and Rotary
  bool interleaved = false;

  Forward call() const {
    Forward f = attention.forward_call();
    f.new_keys = {.k = k.tensor(), .v = v.tensor(), .cu_seqlens = cu_seqlens.tensor()};
    f.rotary = {.cos = cos.tensor(), .sin = sin.tensor(), .interleaved = interleaved, .positions = positions.tensor()};
    return f;
  }
  int64_t new_keys(int64_t b) const {
    return static_cast<int64_t>(cu_seqlens.present() ? cu_seqlens.get(b + 1) - cu_seqlens.get(b)
                                                     : static_cast<double>(k.size(1)));
  }
  int64_t used(int64_t b) const { return static_cast<int64_t>(attention.seqused_k.get(b)); }
  int64_t position(int64_t b) const { return positions.present() ? static_cast<int64_t>(positions.get(b)) : used(b); }
};

/// Element (sequence b, its row, head, col) of new keys, and of a cache.
double new_element(const AppendCase& c, const HostTensor& x, int64_t b, int64_t row, int64_t h, int64_t col) {
  if (!c.cu_seqlens.present()) return x.at(b, row, h, col);
  return x.at(static_cast<int64_t>(c.cu_seqlens.get(b)) + row, h, col);
}
Shape place(const AppendCase& c, int64_t b, int64_t row) {
  const AttentionCase& a = c.attention;
  if (a.block_table.present()) {
    const int64_t page_size = a.k.size(1);
    return {static_cast<int64_t>(a.block_table.at(b, row / page_size)), row % page_size};
  }
  return {a.cache_batch_idx.present() ? static_cast<int64_t>(a.cache_batch_idx.get(b)) : b, row};
}

/// What column `col` of a row becomes at `position`; `element(col)` is the row.
template <class Element>
double rotated(const AppendCase& c, int64_t position, int64_t col, const Element& element) {
  if (!c.cos.present()) return element(col);
  const int64_t pairs = c.cos.size(1);
  if (col >= 2 * pairs) return element(col);
  const int64_t pair = c.interleaved ? col / 2 : col % pairs;
  const bool second = c.interleaved ? col % 2 == 1 : col >= pairs;
  const int64_t other = c.interleaved ? col ^ 1 : (second ? col - pairs : col + pairs);
  const double cos = c.cos.at(position, pair), sin = c.sin.at(position, pair);
  return second ? element(col) * cos + element(other) * sin : element(col) * cos - element(other) * sin;
}

/// The attention over the cache that the call should leave, as a call without new keys.
AttentionCase by_hand(const AppendCase& c, int64_t batch) {
  AttentionCase want = c.attention;
  std::vector<int32_t> used;
  for (int64_t b = 0; b < batch; ++b) {
    for (int64_t t = 0; t < c.new_keys(b); ++t) {
      const Shape at = place(c, b, c.used(b) + t);
      for (int64_t h = 0; h < want.k.size(2); ++h) {
        for (int64_t col = 0; col < want.k.size(3); ++col)
          want.k.put(rotated(c, c.position(b) + t, col, [&](int64_t i) { return new_element(c, c.k, b, t, h, i); }),
                     at[0], at[1], h, col);
        for (int64_t col = 0; col < want.v.size(3); ++col)
          want.v.put(new_element(c, c.v, b, t, h, col), at[0], at[1], h, col);
      }
    }
    used.push_back(static_cast<int32_t>(c.used(b) + c.new_keys(b)));
  }
  want.seqused_k = HostTensor::ints(used);
  const Scores& s = want.scores;
  const bool advance = s.causal || s.window_left >= 0 || s.window_right >= 0 || s.attention_chunk > 0;
  const bool packed = want.cu_seqlens_q.present();
  for (int64_t b = 0; b < batch; ++b) {
    const auto first = static_cast<int64_t>(packed ? want.cu_seqlens_q.get(b) : 0);
    const auto end = static_cast<int64_t>(packed ? want.cu_seqlens_q.get(b + 1) : want.q.size(1));
    for (int64_t i = 0; i < end - first; ++i)
      for (int64_t h = 0; h < want.q.size(packed ? 1 : 2); ++h)
        for (int64_t col = 0; col < want.q.size(packed ? 2 : 3); ++col) {
          const auto element = [&](int64_t x) {
            return packed ? c.attention.q.at(first + i, h, x) : c.attention.q.at(b, i, h, x);
          };
          const double x = rotated(c, c.position(b) + (advance ? i : 0), col, element);
          packed ? want.q.put(x, first + i, h, col) : want.q.put(x, b, i, h, col);
        }
  }
  return want;
}

struct Drawn {
  AppendCase c;
  int64_t batch;
};

Drawn draw_case(uint64_t seed) {
  Draw draw(seed);
  Dims d;
  d.batch = draw.between(1, 3);
  d.nheads_k = draw.between(1, 3), d.nheads = d.nheads_k * draw.between(1, 3);
  d.headdim = draw.between(2, 40), d.headdim_v = draw.one_in(2) ? d.headdim : draw.between(1, 24);
  d.seqlen_q = draw.of<int64_t>({1, 1, 3, 40});
  d.seqlen_k = draw.between(50, 150);
  const int64_t seqlen_new = draw.of<int64_t>({1, 1, 2, 45});
  const DType dtype = draw.of({DType::f32, DType::bf16, DType::f16});
  AppendCase c;
  AttentionCase& a = c.attention;
  a = AttentionCase::fixed(dtype, d, seed, draw.one_in(3) ? Layout{{0, 2, 1, 3}, 2, 1} : Layout{});
  std::vector<int32_t> used, lengths(1, 0), pad;
  for (int64_t b = 0; b < d.batch; ++b) {
    used.push_back(static_cast<int32_t>(draw.between(0, d.seqlen_k - seqlen_new)));
    lengths.push_back(lengths.back() + static_cast<int32_t>(draw.between(0, seqlen_new)));
    pad.push_back(static_cast<int32_t>(draw.between(0, used.back())));
  }
  a.seqused_k = HostTensor::ints(used);
  if (draw.one_in(3)) a.leftpad_k = HostTensor::ints(pad);
  const bool packed = draw.one_in(3);
  const auto shape = [&](int64_t cols) {
    return packed ? Shape{lengths.back() + 1, d.nheads_k, cols} : Shape{d.batch, seqlen_new, d.nheads_k, cols};
  };
  if (packed) c.cu_seqlens = HostTensor::ints(lengths);
  c.k = HostTensor::normal(dtype, shape(d.headdim), seed + 21),
  c.v = HostTensor::normal(dtype, shape(d.headdim_v), seed + 22);
  if (draw.one_in(3)) {  // pages in falling order, one of them nobody's
    const int64_t page_size = draw.of<int64_t>({1, 7, 16}), each = (d.seqlen_k + page_size - 1) / page_size;
    std::vector<int32_t> table;
    for (int64_t i = d.batch * each; i > 0; --i) table.push_back(static_cast<int32_t>(i));
    a.block_table = HostTensor::ints(table, {d.batch, each});
    a.k = HostTensor::normal(dtype, {d.batch * each + 1, page_size, d.nheads_k, d.headdim}, seed + 23);
    a.v = HostTensor::normal(dtype, {d.batch * each + 1, page_size, d.nheads_k, d.headdim_v}, seed + 24);
  } else if (draw.one_in(2)) {
    std::vector<int32_t> entries;
    for (int64_t b = d.batch; b > 0; --b) entries.push_back(static_cast<int32_t>(b));
    a.cache_batch_idx = HostTensor::ints(entries);
    a.k = HostTensor::normal(dtype, {d.batch + 1, d.seqlen_k, d.nheads_k, d.headdim}, seed + 25);
    a.v = HostTensor::normal(dtype, {d.batch + 1, d.seqlen_k, d.nheads_k, d.headdim_v}, seed + 26);
  }
  a.scores.causal = draw.one_in(2);
  if (draw.one_in(4)) a.scores.window_left = draw.between(0, 30);
  if (draw.one_in(2)) {
    const int64_t pairs = draw.between(1, d.headdim / 2);
    const DType table = draw.one_in(2) ? DType::f32 : dtype;
    c.cos = HostTensor::normal(table, {d.seqlen_k + 40, pairs}, seed + 27);  // no need to be of an angle
    c.sin = HostTensor::normal(table, {d.seqlen_k + 40, pairs}, seed + 28);
    c.interleaved = draw.one_in(2);
    if (draw.one_in(3)) c.positions = HostTensor::ints(std::vector<int32_t>(static_cast<std::size_t>(d.batch), 3));
  }
  return {c, d.batch};
}

void expect_same(const HostTensor& got, const HostTensor& want) {
  for (int64_t n = 0; n < want.numel(); ++n)
    ASSERT_TRUE(got.get(n) == want.get(n) || (std::isnan(got.get(n)) && std::isnan(want.get(n)))) << "element " << n;
}

class AppendOn : public testing::TestWithParam<const char*> {};

TEST_P(AppendOn, IsAttentionOverTheCacheWrittenByHand) {
  for (uint64_t seed = 1; seed <= 60; ++seed) {
    SCOPED_TRACE("seed " + std::to_string(seed));
    auto [got, batch] = draw_case(seed);
    got.attention.run.backend = GetParam();
    AttentionCase want = by_hand(got, batch);
    const HostTensor q = got.attention.q;
    forward(got.call());
    expect_same(got.attention.q, q);
    expect_same(got.attention.v, want.v);
    EXPECT_TRUE(got.attention.k.gaps_untouched() && got.attention.v.gaps_untouched());
    const double eps = q.dtype() == DType::f32 ? 1e-6 : q.dtype() == DType::bf16 ? 8e-3 : 1e-3;
    if (got.cos.present())
      EXPECT_TRUE(close(got.attention.k, want.k, eps, eps));
    else
      expect_same(got.attention.k, want.k);
    want.k = got.attention.k;
    forward(want.forward_call());
    if (got.cos.present()) {
      EXPECT_TRUE(close(got.attention.out, want.out, 20 * eps, 20 * eps));
      continue;
    }
    expect_same(got.attention.out, want.out);
    expect_same(got.attention.lse, want.lse);
  }
}
INSTANTIATE_TEST_SUITE_P(Backends, AppendOn, testing::Values("cpu", "reference"));

TEST(Append, StepByStepIsCausalAttention) {
  const Dims d{.batch = 2, .seqlen_q = 70, .seqlen_k = 70, .nheads = 4, .nheads_k = 2, .headdim = 32, .headdim_v = 32};
  AttentionCase whole = AttentionCase::fixed(DType::f32, d);
  whole.scores.causal = true;
  forward(whole.forward_call());
  HostTensor cache_k = whole.k.like(), cache_v = whole.v.like(), used = HostTensor::ints({0, 0});
  for (int64_t step = 0, at = 0; at < d.seqlen_q; ++step) {
    const int64_t n = step == 0 ? 40 : 1;  // a prompt, then token by token
    const auto rows = [&](const HostTensor& x) {
      Tensor t = x.tensor();
      t.data = static_cast<float*>(t.data) + at * t.stride[1];
      t.shape[1] = n;
      return t;
    };
    HostTensor out(DType::f32, {2, n, 4, 32});
    forward({.q = rows(whole.q),
             .k = cache_k.tensor(),
             .v = cache_v.tensor(),
             .out = out.tensor(),
             .sequences = {.seqused_k = used.tensor()},
             .scores = {.causal = true},
             .new_keys = {.k = rows(whole.k), .v = rows(whole.v)}});
    at += n;
    used = HostTensor::ints({static_cast<int32_t>(at), static_cast<int32_t>(at)});
    for (int64_t b = 0; b < 2; ++b)
      for (int64_t i = 0; i < n; ++i)
        for (int64_t h = 0; h < 4; ++h)
          for (int64_t c = 0; c < 32; ++c)
            ASSERT_NEAR(out.at(b, i, h, c), whole.out.at(b, at - n + i, h, c), 2e-6) << "row " << at - n + i;
  }
}

/// Keys join though nobody asks; positions may lie far beyond the cache.
TEST(Append, WithoutQueries) {
  const Dims d{.batch = 1, .seqlen_q = 0, .seqlen_k = 4, .nheads = 1, .nheads_k = 1, .headdim = 2, .headdim_v = 2};
  AppendCase c;
  c.attention = AttentionCase::fixed(DType::f32, d);
  c.attention.seqused_k = HostTensor::ints({1});
  c.k = HostTensor::normal(DType::f32, {1, 2, 1, 2}, 7), c.v = HostTensor::normal(DType::f32, {1, 2, 1, 2}, 8);
  c.cos = HostTensor::full(DType::f32, {1002, 1}, 0.0), c.sin = HostTensor::full(DType::f32, {1002, 1}, 1.0);
  c.positions = HostTensor::ints({1000});
  const AttentionCase before = c.attention;
  forward(c.call());
  for (int64_t t = 0; t < 2; ++t) {
    EXPECT_EQ(c.attention.k.at(0, 1 + t, 0, 0), -c.k.at(0, t, 0, 1));  // a quarter turn
    EXPECT_EQ(c.attention.k.at(0, 1 + t, 0, 1), c.k.at(0, t, 0, 0));
    EXPECT_EQ(c.attention.v.at(0, 1 + t, 0, 1), c.v.at(0, t, 0, 1));
  }
  for (const int64_t row : {0, 3}) EXPECT_EQ(c.attention.k.at(0, row, 0, 0), before.k.at(0, row, 0, 0));
}

TEST(Append, IsExplained) {
  AppendCase c = draw_case(1).c;
  c.cos = HostTensor::full(DType::f32, {200, 1}, 1.0), c.sin = c.cos, c.interleaved = true;
  c.positions = {};
  const std::string problem = explain(c.call()).problem;
  EXPECT_NE(problem.find("new keys"), std::string::npos) << problem;
  EXPECT_NE(problem.find("rotary 2 interleaved"), std::string::npos) << problem;
}

}  // namespace
}  // namespace flash_attn::test
