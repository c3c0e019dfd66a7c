// RMSNorm, every kernel: against the formula in double, whatever the dtypes, strides and sizes; never beyond a row.
#include <gtest/gtest.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cmath>

#include "cpu/isa.hpp"
#include "cpu/rms_norm.hpp"
#include "flash_attn/flash_attn.hpp"
#include "support/compare.hpp"
#include "support/draw.hpp"

namespace flash_attn::test {
namespace {

double half_unit(DType t) { return t == DType::bf16 ? 0x1p-8 : t == DType::f16 ? 0x1p-11 : 0x1p-23; }
DType any_dtype(Draw& draw) { return draw.of({DType::f32, DType::bf16, DType::f16}); }

/// A call, forward and backward, that owns its tensors. `exact` of them: the formula's results.
struct NormCase {
  HostTensor x, residual, weight, dy, dstream;
  HostTensor y, h, rstd, dx, dresidual, dweight;
  HostTensor exact_y, exact_h, exact_dh, exact_dweight;
  double eps = 1e-5;
  bool zero_centered = false;

  static NormCase drawn(uint64_t seed) {
    Draw draw(seed);
    NormCase c;
    const int64_t rows = draw.between(1, 70);
    const int64_t cols = draw.one_in(4) ? draw.between(1000, 2500) : draw.between(1, 150);
    const auto rows_of = [&](DType dtype, uint64_t of) {
      return HostTensor::normal(dtype, {rows, cols}, of, 1.0, {.pad = draw.between(0, 3)});
    };
    c.x = rows_of(any_dtype(draw), 10 * seed);
    if (draw.one_in(2)) c.residual = rows_of(any_dtype(draw), 10 * seed + 1);
    if (c.residual.present() || draw.one_in(3)) c.h = rows_of(any_dtype(draw), 0).like();
    c.weight = HostTensor::normal(any_dtype(draw), {cols}, 10 * seed + 2);
    c.y = rows_of(any_dtype(draw), 0).like();
    c.rstd = HostTensor(DType::f32, {rows, 1});
    c.dy = rows_of(c.y.dtype(), 10 * seed + 3);
    if (draw.one_in(2)) c.dstream = rows_of(c.h.present() ? c.h.dtype() : c.x.dtype(), 10 * seed + 4);
    c.dx = rows_of(c.x.dtype(), 0).like();
    if (draw.one_in(2)) c.dresidual = rows_of(any_dtype(draw), 0).like();
    c.dweight = c.weight.like();
    c.eps = draw.of({1e-6, 1e-2});
    c.zero_centered = draw.one_in(3);
    return c;
  }

  /// The backward follows the h and the rstd that the forward wrote, as autograd keeps them.
  void run() {
    cpu::rms_norm({.x = x.tensor(),
                   .residual = residual.tensor(),
                   .weight = weight.tensor(),
                   .y = y.tensor(),
                   .h = h.tensor(),
                   .rstd = rstd.tensor(),
                   .eps = eps,
                   .zero_centered_weight = zero_centered});
    cpu::rms_norm_backward({.dy = dy.tensor(),
                            .dstream = dstream.tensor(),
                            .h = kept().tensor(),
                            .rstd = rstd.tensor(),
                            .weight = weight.tensor(),
                            .dx = dx.tensor(),
                            .dresidual = dresidual.tensor(),
                            .dweight = dweight.tensor(),
                            .zero_centered_weight = zero_centered});
  }
  const HostTensor& kept() const { return h.present() ? h : x; }

  void compute_exactly() {
    const int64_t rows = x.size(0), cols = x.size(1);
    exact_y = HostTensor(DType::f64, {rows, cols}), exact_h = exact_y.like(), exact_dh = exact_y.like();
    exact_dweight = HostTensor::full(DType::f64, {cols}, 0.0);
    for (int64_t r = 0; r < rows; ++r) {
      double squares = 0, kept_squares = 0, along = 0;
      for (int64_t c = 0; c < cols; ++c) {
        const double s = x.at(r, c) + (residual.present() ? residual.at(r, c) : 0.0);
        exact_h.put(s, r, c);
        squares += s * s;
        kept_squares += kept().at(r, c) * kept().at(r, c);
      }
      const double inverse = 1 / std::sqrt(squares / static_cast<double>(cols) + eps);
      const auto w = [&](int64_t c) { return weight.at(c) + (zero_centered ? 1.0 : 0.0); };
      for (int64_t c = 0; c < cols; ++c) {
        exact_y.put(exact_h.at(r, c) * inverse * w(c), r, c);
        along += dy.at(r, c) * kept().at(r, c) * w(c);
      }
      for (int64_t c = 0; c < cols; ++c) {
        const double k = kept().at(r, c);
        const double dh = inverse * (dy.at(r, c) * w(c) - k * inverse * inverse * along / static_cast<double>(cols));
        exact_dh.put(dh + (dstream.present() ? dstream.at(r, c) : 0.0), r, c);
        exact_dweight.put(exact_dweight.at(c) + dy.at(r, c) * k * inverse, c);
      }
    }
  }

  void expect_right() {
    compute_exactly();
    // Beside the rounding of a result: roundings to fp32 of numbers whose size is that of the largest, a few for each
    // of up to 2500 terms in chains of at most 40.
    const double fp32 = 40 * 0x1p-24;
    const auto within = [&](const HostTensor& got, const HostTensor& exact, double size) {
      return close(got, exact, fp32 * size, half_unit(got.dtype()));
    };
    EXPECT_TRUE(within(y, exact_y, 20));
    if (h.present()) {
      EXPECT_TRUE(within(h, exact_h, 1));
    }
    EXPECT_TRUE(within(dx, exact_dh, 50));
    if (dresidual.present()) {
      EXPECT_TRUE(within(dresidual, exact_dh, 50));
    }
    EXPECT_TRUE(within(dweight, exact_dweight, 100));
    for (int64_t r = 0; r < x.size(0); ++r) {
      double squares = 0;
      for (int64_t c = 0; c < x.size(1); ++c) squares += exact_h.at(r, c) * exact_h.at(r, c);
      EXPECT_NEAR(rstd.at(r, int64_t{0}) * std::sqrt(squares / static_cast<double>(x.size(1)) + eps), 1, fp32);
    }
    for (const HostTensor* t : {&y, &h, &dx, &dresidual})
      if (t->present()) {
        EXPECT_TRUE(t->gaps_untouched());
      }
  }
};

TEST(RmsNorm, FollowsTheFormula) {
  for (uint64_t seed = 0; seed < 60; ++seed) {
    NormCase c = NormCase::drawn(seed);
    c.run();
    c.expect_right();
    if (HasFailure()) FAIL() << "seed " << seed;
  }
}

TEST(RmsNorm, ThreadsDoNotChangeABit) {
  for (uint64_t seed = 0; seed < 10; ++seed) {
    NormCase c = NormCase::drawn(seed);
    set_num_threads(1);
    c.run();
    for (int threads : {2, 3, 8}) {
      NormCase other = NormCase::drawn(seed);
      set_num_threads(threads);
      other.run();
      EXPECT_TRUE(close(other.y, c.y, 0.0) && close(other.dx, c.dx, 0.0) && close(other.dweight, c.dweight, 0.0));
    }
  }
  set_num_threads(0);
}

TEST(RmsNorm, ANanStaysInItsRow) {
  NormCase c = NormCase::drawn(3);
  const int64_t rows = c.x.size(0), cols = c.x.size(1);
  ASSERT_GT(rows, 1);
  c.x.put(NAN, int64_t{1}, cols - 1);
  c.run();
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t col = 0; col < cols; ++col) {
      EXPECT_EQ(std::isnan(c.y.at(r, col)), r == 1);
      EXPECT_EQ(std::isnan(c.dx.at(r, col)), r == 1);
    }
  for (int64_t col = 0; col < cols; ++col) EXPECT_TRUE(std::isnan(c.dweight.at(col)));  // rstd is NaN, of all columns
}

TEST(RmsNorm, NoRowsAndNoColumns) {
  for (const Shape& shape : {Shape{0, 5}, Shape{3, 0}}) {
    NormCase c;
    c.x = c.y = c.dy = c.dx = HostTensor(DType::f32, shape);
    c.rstd = HostTensor(DType::f32, {shape[0], 1});
    c.weight = c.dweight = HostTensor(DType::f32, {shape[1]});
    c.run();
    EXPECT_TRUE(all_equal(c.dweight, 0.0));  // an empty sum
  }
}

TEST(RmsNorm, RefusesWhatDoesNotFit) {
  const auto refused = [](const auto& spoil) {
    NormCase c = NormCase::drawn(1);
    spoil(c);
    EXPECT_THROW(c.run(), Error);
  };
  refused([](NormCase& c) { c.x = HostTensor(DType::f64, {c.x.size(0), c.x.size(1)}); });
  refused([](NormCase& c) { c.y = HostTensor(DType::f32, {c.x.size(0), c.x.size(1) + 1}); });
  refused([](NormCase& c) { c.residual = HostTensor(DType::f32, {c.x.size(0) + 1, c.x.size(1)}); });
  refused([](NormCase& c) { c.weight = HostTensor(DType::f32, {c.x.size(1) + 1}); });
  refused([](NormCase& c) { c.rstd = HostTensor(DType::f32, {c.x.size(0)}); });
  refused([](NormCase& c) { c.rstd = HostTensor(DType::f32, {c.x.size(0), 1}, {.step = 2}); });
  refused([](NormCase& c) { c.x = HostTensor(DType::f32, {c.x.size(0), c.x.size(1)}, {.step = 2}); });
  refused([](NormCase& c) { c.dweight = HostTensor(DType::f32, {c.x.size(1) + 1}); });
  refused([](NormCase& c) { c.dy = HostTensor(DType::f32, {c.x.size(0) + 1, c.x.size(1)}); });
}

class EveryNorm : public ::testing::TestWithParam<const cpu::Kernels*> {};

/// The kernels of one instruction set, one row at the end of a page, against those in use.
TEST_P(EveryNorm, TouchesNothingBeyondARow) {
  const cpu::Kernels &k = *GetParam(), &active = cpu::active_kernels();
  const auto page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
  const auto guarded = [page] {
    char* const memory =
        static_cast<char*>(mmap(nullptr, 2 * page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    EXPECT_NE(memory, MAP_FAILED);
    EXPECT_EQ(mprotect(memory + page, page, PROT_NONE), 0);  // reading or writing there ends the test
    return memory;
  };
  char *const in = guarded(), *const to = guarded(), *const other = guarded();
  for (DType dtype : {DType::f32, DType::bf16, DType::f16})
    for (int64_t cols = 1; cols <= 150; ++cols) {
      const auto padded = static_cast<std::size_t>((cols + 15) / 16 * 16);
      const auto at_end = [&](char* memory) {
        return cpu::Rows{memory + page - static_cast<std::size_t>(cols) * size_of(dtype), dtype, cols};
      };
      const HostTensor x = HostTensor::normal(dtype, {1, cols}, static_cast<uint64_t>(cols));
      std::memcpy(at_end(in).data, x.tensor().data, static_cast<std::size_t>(cols) * size_of(dtype));
      const auto compute = [&](const cpu::Kernels& kernels) {
        std::vector<float> weight(padded), dweight(padded), results;
        kernels.read_row(at_end(in), cols, 1.0f, weight.data());
        float rstd = 0;
        kernels.norm_rows({1, cols, at_end(in), at_end(in), weight.data(), 1e-3f, at_end(to), at_end(other), &rstd});
        kernels.norm_gradient_rows({1,
                                    cols,
                                    at_end(to),
                                    at_end(other),
                                    at_end(in),
                                    weight.data(),
                                    &rstd,
                                    {at_end(to), at_end(other)},
                                    dweight.data()});
        results.assign(dweight.begin(), dweight.begin() + cols);
        kernels.sum_parts(dweight.data(), 1, static_cast<int64_t>(padded), cols, at_end(to));
        results.push_back(rstd);
        return results;
      };
      const std::vector<float> got = compute(k), want = compute(active);
      for (std::size_t i = 0; i < want.size(); ++i)
        EXPECT_NEAR(got[i], want[i],
                    (0x1p-6 * half_unit(DType::bf16) + 2 * half_unit(dtype)) * (1 + std::abs(want[i])));
    }
  for (char* memory : {in, to, other}) munmap(memory, 2 * page);
}

INSTANTIATE_TEST_SUITE_P(Cpu, EveryNorm, ::testing::ValuesIn(cpu::usable_kernels()),
                         [](const auto& info) { return std::string(info.param->name); });

}  // namespace
}  // namespace flash_attn::test
