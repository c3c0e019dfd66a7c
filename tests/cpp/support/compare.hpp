// Comparison of tensors that says how far apart they are, and where.
#pragma once

#include <gtest/gtest.h>

#include <cmath>
#include <sstream>

#include "support/host_tensor.hpp"

namespace flash_attn::test {

/// NaN equals NaN and an infinity equals itself; else the distance.
inline double distance(double got, double want) {
  if (std::isnan(got) && std::isnan(want)) return 0.0;
  if (got == want) return 0.0;
  const double d = std::abs(got - want);
  return std::isnan(d) ? INFINITY : d;
}

/// Every |got - want| <= atol + rtol * |want|, for tensors of one shape and of any layouts and dtypes.
inline ::testing::AssertionResult close(const HostTensor& got, const HostTensor& want, double atol, double rtol = 0.0) {
  if (got.tensor().ndim != want.tensor().ndim) return ::testing::AssertionFailure() << "ranks differ";
  for (int d = 0; d < got.tensor().ndim; ++d) {
    if (got.size(d) != want.size(d)) return ::testing::AssertionFailure() << "shapes differ in dimension " << d;
  }
  int64_t beyond = 0, worst = 0;
  double largest = -1.0;
  for (int64_t n = 0; n < got.numel(); ++n) {
    const double error = distance(got.get(n), want.get(n));
    const double scale = std::isfinite(want.get(n)) ? std::abs(want.get(n)) : 0.0;
    if (error > atol + rtol * scale) ++beyond;
    if (error > largest) largest = error, worst = n;
  }
  if (beyond == 0) return ::testing::AssertionSuccess();
  std::ostringstream where;
  for (int64_t i : got.index(worst)) where << (where.tellp() > 0 ? ", " : "") << i;
  where.precision(10);
  where << "): got " << got.get(worst) << ", expected " << want.get(worst);
  return ::testing::AssertionFailure() << beyond << " of " << got.numel() << " elements differ; max error " << largest
                                       << " at (" << where.str();
}

/// Every element is exactly `value` (NaN too).
inline ::testing::AssertionResult all_equal(const HostTensor& got, double value) {
  const Tensor t = got.tensor();
  return close(got, HostTensor::full(DType::f64, Shape(t.shape, t.shape + t.ndim), value), 0.0);
}

}  // namespace flash_attn::test
