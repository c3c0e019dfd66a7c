// The oracle's forward against the definition written another way: the full matrix of scores in long double, a mask
// that is asked key by key, and exponentials without a subtracted maximum.
#include <gtest/gtest.h>

#include "core/backend.hpp"
#include "core/dropout.hpp"
#include "reference/cases.hpp"
#include "support/compare.hpp"

namespace flash_attn::test {
namespace {

using Real = long double;

/// Reads a case as the API's documentation describes its arguments, one element at a time.
struct Reader {
  const AttentionCase& c;

  static int64_t entry(const HostTensor& t, int64_t n, int64_t otherwise) {
    return t.present() ? static_cast<int64_t>(t.at(n)) : otherwise;
  }
  bool packed() const { return c.cu_seqlens_q.present(); }
  int64_t batch() const { return packed() ? c.cu_seqlens_q.numel() - 1 : c.q.size(0); }
  int64_t start(const HostTensor& cu, int64_t b) const { return static_cast<int64_t>(cu.at(b)); }
  int64_t leftpad(int64_t b) const { return entry(c.leftpad_k, b, 0); }
  int64_t seqlen_q(int64_t b) const {
    return entry(c.seqused_q, b, packed() ? start(c.cu_seqlens_q, b + 1) - start(c.cu_seqlens_q, b) : c.q.size(1));
  }
  int64_t seqlen_k(int64_t b) const {
    const int64_t all = packed()                  ? start(c.cu_seqlens_k, b + 1) - start(c.cu_seqlens_k, b)
                        : c.block_table.present() ? c.block_table.size(1) * c.k.size(1)
                                                  : c.k.size(1);
    return entry(c.seqused_k, b, all) - leftpad(b);
  }
  Real query(int64_t b, int64_t i, int64_t h, int64_t col) const {
    return packed() ? c.q.at(start(c.cu_seqlens_q, b) + i, h, col) : c.q.at(b, i, h, col);
  }
  Real key(const HostTensor& x, int64_t b, int64_t j, int64_t h, int64_t col) const {
    j += leftpad(b);
    if (packed()) return x.at(start(c.cu_seqlens_k, b) + j, h, col);
    if (c.block_table.present()) return x.at(c.block_table.at(b, j / x.size(1)), j % x.size(1), h, col);
    return x.at(entry(c.cache_batch_idx, b, b), j, h, col);
  }
  Real bias(int64_t b, int64_t h, int64_t i, int64_t j) const {
    const HostTensor& x = c.bias;
    return x.present() ? x.at(x.size(0) > 1 ? b : 0, x.size(1) > 1 ? h : 0, x.size(2) > 1 ? i : 0, j) : 0.0;
  }
  Real slope(int64_t b, int64_t h) const {
    return !c.alibi.present() ? 0.0 : c.alibi.tensor().ndim == 1 ? c.alibi.at(h) : c.alibi.at(b, h);
  }
  bool sees(int64_t p, int64_t j) const {
    const Scores& s = c.scores;
    if (s.causal && j > p) return false;
    if (s.window_left >= 0 && j < p - s.window_left) return false;
    if (!s.causal && s.window_right >= 0 && j > p + s.window_right) return false;
    const auto chunk_of = [&](int64_t at) { return std::floor(static_cast<double>(at) / s.attention_chunk); };
    return s.attention_chunk == 0 || chunk_of(j) == chunk_of(p);
  }
};

struct Result {
  HostTensor out, lse;
};

Result by_definition(const AttentionCase& c) {
  const Reader read{c};
  const bool packed = read.packed();
  const Tensor like_out = c.out.tensor(), like_lse = c.lse.tensor();
  const int64_t nheads = c.q.size(packed ? 1 : 2), group = nheads / c.k.size(packed ? 1 : 2);
  const int64_t headdim = c.q.size(packed ? 2 : 3), headdim_v = c.v.size(packed ? 2 : 3);
  Result result{HostTensor::full(DType::f64, Shape(like_out.shape, like_out.shape + like_out.ndim), 0.0),
                HostTensor::full(DType::f64, Shape(like_lse.shape, like_lse.shape + like_lse.ndim), -INFINITY)};
  const DropoutRule dropout(c.dropout);

  for (int64_t b = 0; b < read.batch(); ++b) {
    const int64_t seqlen_q = read.seqlen_q(b), seqlen_k = read.seqlen_k(b);
    for (int64_t h = 0; h < nheads; ++h) {
      std::vector<std::vector<Real>> weight(seqlen_q, std::vector<Real>(seqlen_k, 0.0L));  // exp(s), 0 where masked
      for (int64_t i = 0; i < seqlen_q; ++i) {
        for (int64_t j = 0; j < seqlen_k; ++j) {
          const int64_t p = i + seqlen_k - seqlen_q;
          if (!read.sees(p, j)) continue;
          Real s = 0.0L;
          for (int64_t col = 0; col < headdim; ++col) {
            s += read.query(b, i, h, col) * read.key(c.k, b, j, h / group, col);
          }
          s *= c.scores.softmax_scale ? Real(*c.scores.softmax_scale) : 1.0L / std::sqrt(Real(headdim));
          if (c.scores.softcap > 0) s = c.scores.softcap * std::tanh(s / Real(c.scores.softcap));
          s += -read.slope(b, h) * Real(p > j ? p - j : j - p) + read.bias(b, h, i, j);
          weight[i][j] = std::exp(s);
        }
      }
      for (int64_t i = 0; i < seqlen_q; ++i) {
        Real sum = c.sink.present() ? std::exp(Real(c.sink.at(h))) : 0.0L;
        for (const Real w : weight[i]) sum += w;
        if (sum == 0.0L) continue;
        const int64_t row = packed ? read.start(c.cu_seqlens_q, b) + i : i;
        const auto lse = static_cast<double>(std::log(sum));
        packed ? result.lse.put(lse, h, row) : result.lse.put(lse, b, h, row);
        for (int64_t col = 0; col < headdim_v; ++col) {
          Real out = 0.0L;
          for (int64_t j = 0; j < seqlen_k; ++j) {
            const bool kept = !dropout.active() || dropout.keep(b * nheads + h, i, j);
            if (!kept || weight[i][j] == 0) continue;
            out += weight[i][j] / sum * dropout.scale * read.key(c.v, b, j, h / group, col);
          }
          packed ? result.out.put(static_cast<double>(out), row, h, col)
                 : result.out.put(static_cast<double>(out), b, row, h, col);
        }
      }
    }
  }
  return result;
}

class ReferenceForward : public ::testing::TestWithParam<NamedCase> {};

TEST_P(ReferenceForward, EqualsTheDefinition) {
  AttentionCase c = GetParam().make();
  make_reference_backend()->forward(make_problem(c.forward_call()));
  const Result want = by_definition(c);
  EXPECT_TRUE(close(c.out, want.out, 1e-14, 1e-13));
  EXPECT_TRUE(close(c.lse, want.lse, 1e-30, 6e-8));  // one rounding to float32
  EXPECT_TRUE(c.out.gaps_untouched());
}

/// One rounding to the dtype of out is all that separates a 16-bit result from the float64 one.
TEST_P(ReferenceForward, RoundsOnceInEveryDtype) {
  for (const auto& [dtype, half_ulp] : {std::pair{DType::f16, 0x1p-11}, {DType::bf16, 0x1p-8}, {DType::f32, 0x1p-24}}) {
    AttentionCase narrow = GetParam().make(), wide = GetParam().make();
    for (HostTensor AttentionCase::*x : {&AttentionCase::q, &AttentionCase::k, &AttentionCase::v}) {
      narrow.*x = (narrow.*x).like(dtype);
      for (int64_t n = 0; n < (wide.*x).numel(); ++n) {
        (narrow.*x).set(n, (wide.*x).get(n));
        (wide.*x).set(n, (narrow.*x).get(n));
      }
    }
    narrow.out = narrow.out.like(dtype);
    make_reference_backend()->forward(make_problem(narrow.forward_call()));
    make_reference_backend()->forward(make_problem(wide.forward_call()));
    const double subnormal = dtype == DType::f16 ? 0x1p-25 : 0.0;
    EXPECT_TRUE(close(narrow.out, wide.out, subnormal, half_ulp * (1 + 1e-9))) << name_of(dtype);
    EXPECT_TRUE(close(narrow.lse, wide.lse, 0.0)) << name_of(dtype);
  }
}

std::string name_of_case(const ::testing::TestParamInfo<NamedCase>& info) { return info.param.name; }
INSTANTIATE_TEST_SUITE_P(Features, ReferenceForward, ::testing::ValuesIn(differentiable_cases()), name_of_case);
INSTANTIATE_TEST_SUITE_P(Caches, ReferenceForward, ::testing::ValuesIn(cache_cases()), name_of_case);

}  // namespace
}  // namespace flash_attn::test
