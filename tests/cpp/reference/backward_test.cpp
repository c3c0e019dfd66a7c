// The oracle's backward against central differences of its forward, in float64, for every feature.
//
// The loss is sum(dout * out) + sum(dlse * lse), over the rows that see something; its derivative by every single
// element of q, k, v, bias and sink must be the gradient.
#include <gtest/gtest.h>

#include "core/backend.hpp"
#include "reference/cases.hpp"
#include "support/compare.hpp"

namespace flash_attn::test {
namespace {

/// The same element layout in float64: lse, dbias and dsink are float32 in the API, too coarse for differences.
Operand in_double(Operand x, const HostTensor& memory) {
  x.data = static_cast<char*>(memory.tensor().data);
  x.dtype = DType::f64;
  return x;
}

double loss(const AttentionCase& c) {
  HostTensor lse = c.lse.like(DType::f64);
  Problem problem = make_problem(c.forward_call());
  problem.lse = in_double(problem.lse, lse);
  make_reference_backend()->forward(problem);
  double sum = 0.0;
  for (int64_t n = 0; n < c.out.numel(); ++n) sum += c.dout.get(n) * c.out.get(n);
  for (int64_t n = 0; n < lse.numel(); ++n) {
    if (c.dlse.present() && std::isfinite(lse.get(n))) sum += c.dlse.get(n) * lse.get(n);
  }
  return sum;
}

/// d loss / d x, one element of `x` (a tensor of `c`) after the other.
HostTensor differences(const AttentionCase& c, HostTensor& x) {
  constexpr double kStep = 1e-5;
  HostTensor gradient = x.like();
  for (int64_t n = 0; n < x.numel(); ++n) {
    const double at = x.get(n);
    x.set(n, at + kStep);
    const double above = loss(c);
    x.set(n, at - kStep);
    const double below = loss(c);
    x.set(n, at);
    gradient.set(n, (above - below) / (2 * kStep));
  }
  return gradient;
}

class ReferenceBackward : public ::testing::TestWithParam<NamedCase> {
 protected:
  void check(AttentionCase c) {
    const Backward call = c.backward_call();
    HostTensor dbias = c.dbias.present() ? c.dbias.like(DType::f64) : HostTensor();
    HostTensor dsink = c.dsink.present() ? c.dsink.like(DType::f64) : HostTensor();
    Problem problem = make_problem(call);
    if (dbias.present()) problem.dbias = in_double(problem.dbias, dbias);
    if (dsink.present()) problem.dsink = in_double(problem.dsink, dsink);
    make_reference_backend()->backward(problem);

    constexpr double kTolerance = 2e-9;  // step^2 times third derivatives, and rounding of the loss over the step
    EXPECT_TRUE(close(c.dq, differences(c, c.q), kTolerance, kTolerance)) << "dq";
    EXPECT_TRUE(close(c.dk, differences(c, c.k), kTolerance, kTolerance)) << "dk";
    EXPECT_TRUE(close(c.dv, differences(c, c.v), kTolerance, kTolerance)) << "dv";
    if (dbias.present()) {
      HostTensor want = differences(c, c.bias);
      for (int64_t n = 0; n < want.numel(); ++n) {
        if (std::isinf(c.bias.get(n))) want.set(n, 0.0);  // no difference there: a hidden key has no influence
      }
      EXPECT_TRUE(close(dbias, want, kTolerance, kTolerance)) << "dbias";
    }
    if (dsink.present()) {
      EXPECT_TRUE(close(dsink, differences(c, c.sink), kTolerance, kTolerance)) << "dsink";
    }
    for (const HostTensor* x : {&c.dq, &c.dk, &c.dv}) EXPECT_TRUE(x->gaps_untouched());
  }
};

TEST_P(ReferenceBackward, EqualsCentralDifferences) {
  AttentionCase c = GetParam().make();
  c.dlse = {};
  check(c);
}

TEST_P(ReferenceBackward, EqualsCentralDifferencesThroughLse) { check(GetParam().make()); }

TEST_P(ReferenceBackward, WritesEveryGradientInEveryDtype) {
  for (const auto& [dtype, half_ulp] : {std::pair{DType::f16, 0x1p-11}, {DType::bf16, 0x1p-8}, {DType::f32, 0x1p-24}}) {
    AttentionCase narrow = GetParam().make(), wide = GetParam().make();
    for (HostTensor AttentionCase::*x :
         {&AttentionCase::q, &AttentionCase::k, &AttentionCase::v, &AttentionCase::dout}) {
      narrow.*x = (narrow.*x).like(dtype);
      for (int64_t n = 0; n < (wide.*x).numel(); ++n) {
        (narrow.*x).set(n, (wide.*x).get(n));
        (wide.*x).set(n, (narrow.*x).get(n));
      }
    }
    for (HostTensor AttentionCase::*x :
         {&AttentionCase::out, &AttentionCase::dq, &AttentionCase::dk, &AttentionCase::dv}) {
      narrow.*x = (narrow.*x).like(dtype);
    }
    const Backward narrow_call = narrow.backward_call(), wide_call = wide.backward_call();
    make_reference_backend()->backward(make_problem(narrow_call));
    make_reference_backend()->backward(make_problem(wide_call));
    const double subnormal = dtype == DType::f16 ? 0x1p-25 : 0.0, once = half_ulp * (1 + 1e-9);
    EXPECT_TRUE(close(narrow.dq, wide.dq, subnormal, once)) << "dq " << name_of(dtype);
    EXPECT_TRUE(close(narrow.dk, wide.dk, subnormal, once)) << "dk " << name_of(dtype);
    EXPECT_TRUE(close(narrow.dv, wide.dv, subnormal, once)) << "dv " << name_of(dtype);
    if (narrow.dbias.present()) {
      EXPECT_TRUE(close(narrow.dbias, wide.dbias, 0.0)) << "dbias " << name_of(dtype);
    }
    if (narrow.dsink.present()) {
      EXPECT_TRUE(close(narrow.dsink, wide.dsink, 0.0)) << "dsink " << name_of(dtype);
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Features, ReferenceBackward, ::testing::ValuesIn(differentiable_cases()),
                         [](const auto& info) { return info.param.name; });

}  // namespace
}  // namespace flash_attn::test
