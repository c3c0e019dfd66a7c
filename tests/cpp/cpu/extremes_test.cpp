// Parameters at the ends of fp32, on every kernel: right wherever fp32 can hold the scores.
#include <gtest/gtest.h>

#include <cmath>
#include <ostream>
#include <vector>

#include "cpu/against_oracle.hpp"
#include "cpu/kernels_under_test.hpp"

namespace flash_attn::test {
namespace {

struct Extreme {
  const char* what;
  double scale, softcap;
  double size;   // of the elements of q and k, which are normal
  double slope;  // of ALiBi; 0: none
  bool only_q;   // k is of size 1
};
std::ostream& operator<<(std::ostream& out, const Extreme& x) { return out << x.what; }

constexpr double kMost = 3.4e38;

// Scores of d = 32 terms: scale * size^2 * 6, or scale * size * 6 with only_q.
const Extreme kExtremes[] = {
    {"scale just below what base 2 holds", 2.3e38, 0, 1e-19, 0, false},
    {"scale just above what base 2 holds", 2.4e38, 0, 1e-19, 0, false},
    {"scale 3e38", 3e38, 0, 1e-19, 0, false},
    {"scale -3e38", -3e38, 0, 1e-19, 0, false},
    {"scale 3e38, one operand", 3e38, 0, 1e-38, 0, true},
    {"scale 3e38, queries of 0", 3e38, 0, 0, 0, false},
    {"scale 3e38 under a cap", 3e38, 5, 1e-19, 0, false},
    {"scale 3e38 under a cap of 3e38", 3e38, 3e38, 1e-19, 0, false},
    {"scale 3e38, queries of 0, under a cap", 3e38, 1, 0, 0, false},
    {"scale 1e-38", 1e-38, 0, 1, 0, false},
    {"scale 1e-38, large operands", 1e-38, 0, 1e18, 0, false},
    {"scale 1e-42", 1e-42, 0, 1, 0, false},
    {"scale 1e-60", 1e-60, 0, 1, 0, false},
    {"scale 0 under a cap", 0, 30, 1, 0, false},
    {"cap 1e5", 0.2, 1e5, 1, 0, false},
    {"cap 1e30", 0.2, 1e30, 1, 0, false},
    {"cap 2e38", 0.2, 2e38, 1, 0, false},
    {"cap 2.4e38", 0.2, 2.4e38, 1, 0, false},
    {"cap 3.4e38", 0.2, kMost, 1, 0, false},
    {"cap 2e38 and tiny scores", 0.2, 2e38, 1e-10, 0, false},
    {"cap 1e-3", 0.2, 1e-3, 1, 0, false},
    {"cap 1e-30", 0.2, 1e-30, 1, 0, false},
    {"cap 1.2e-38", 0.2, 1.2e-38, 1, 0, false},
    {"cap 1e-44", 0.2, 1e-44, 1, 0, false},
    {"cap 1e-320", 0.2, 1e-320, 1, 0, false},
    {"scores of 1e7 that a cap of 20 meets", 1e6, 20, 1, 0, false},
    {"slope 3.4e38", 0.2, 0, 1, kMost, false},
    {"slope 3.4e38 under a cap", 0.2, 30, 1, kMost, false},
};

class Extremes : public ::testing::TestWithParam<std::tuple<const cpu::Kernels*, Extreme>> {};

/// The largest magnitude.
double largest(const HostTensor& x) {
  double most = 0;
  for (int64_t n = 0; n < x.numel(); ++n) most = std::max(most, std::abs(x.get(n)));
  return most;
}

TEST_P(Extremes, AsTheOracle) {
  const auto& [kernels, extreme] = GetParam();
  for (const DType dtype : {DType::f32, DType::bf16, DType::f16}) {
    if (dtype == DType::f16 && extreme.size != 0 && (extreme.size < 0.1 || extreme.size > 10)) continue;  // its range
    // 80 keys are packed; so are 20. One query against 80 keys is served in place.
    for (const auto& [seqlen_q, seqlen_k] : {std::pair<int64_t, int64_t>{20, 80}, {20, 20}, {1, 80}}) {
      SCOPED_TRACE(testing::Message() << "dtype " << static_cast<int>(dtype) << ", " << seqlen_q << " x " << seqlen_k);
      const Dims d{.batch = 1,
                   .seqlen_q = seqlen_q,
                   .seqlen_k = seqlen_k,
                   .nheads = 2,
                   .nheads_k = 2,
                   .headdim = 32,
                   .headdim_v = 32};
      AttentionCase c = AttentionCase::fixed(dtype, d, 3);
      const Shape q_shape = {1, seqlen_q, 2, 32}, k_shape = {1, seqlen_k, 2, 32};
      c.q = HostTensor::normal(dtype, q_shape, 5, extreme.size);
      const double k_size = extreme.only_q ? 1.0 : extreme.size;
      c.k = HostTensor::normal(dtype, k_shape, 6, k_size);
      if (extreme.slope != 0) c.alibi = HostTensor::full(DType::f32, {2}, extreme.slope);
      c.dlse = HostTensor();
      c.scores.softmax_scale = extreme.scale, c.scores.softcap = extreme.softcap;
      const AttentionCase want = by_oracle(c);
      ASSERT_TRUE(std::isfinite(largest(want.out)));

      // Roundings of the scores, at 1e-6 of the largest, move probabilities by as much as the scores' size.
      const double unit = dtype == DType::f32 ? 0.0 : dtype == DType::bf16 ? 0x1p-8 : 0x1p-11;
      const double rough = 2e-5 + 2 * unit;
      cpu::forward(make_problem(c.forward_call()), *kernels);
      EXPECT_TRUE(close(c.out, want.out, rough, rough));
      EXPECT_TRUE(close(c.lse, want.lse, 2e-5, 2e-6));
      c.out = want.out, c.lse = want.lse;
      cpu::backward(make_problem(c.backward_call()), *kernels);
      // Beyond its own size, a gradient is off by roundings of the terms that cancel in it: scale (dout . v) k, say.
      const auto expect_gradient = [&](const HostTensor& got, const HostTensor& expected, double term) {
        return close(got, expected, (4e-5 + 4 * unit) * largest(expected) + (1e-6 + unit) * 10 * term + 1e-37);
      };
      EXPECT_TRUE(expect_gradient(c.dq, want.dq, std::abs(extreme.scale) * k_size));
      EXPECT_TRUE(expect_gradient(c.dk, want.dk, std::abs(extreme.scale) * extreme.size));
      EXPECT_TRUE(expect_gradient(c.dv, want.dv, 0));
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Cpu, Extremes,
                         ::testing::Combine(::testing::ValuesIn(kernels_under_test()), ::testing::ValuesIn(kExtremes)),
                         [](const auto& info) {
                           std::string name =
                               std::string(std::get<0>(info.param)->name) + "_" + std::get<1>(info.param).what;
                           for (char& x : name)
                             if (!std::isalnum(static_cast<unsigned char>(x))) x = '_';
                           return name;
                         });

}  // namespace
}  // namespace flash_attn::test
