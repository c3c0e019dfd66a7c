// fp16 and bfloat16 conversions, over all 65536 patterns and all the midpoints between neighbours.
#include "core/half.hpp"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <random>

namespace flash_attn {
namespace {

struct F16 {
  static constexpr int kExp = 5, kMant = 10;
  static constexpr double widen(uint16_t h) { return f16_to_double(h); }
  static constexpr float widen_to_float(uint16_t h) { return f16_to_float(h); }
  static constexpr uint16_t narrow(double x) { return f16_from_double(x); }
  static constexpr uint16_t narrow_float(float x) { return f16_from_float(x); }
};
struct BF16 {
  static constexpr int kExp = 8, kMant = 7;
  static constexpr double widen(uint16_t h) { return bf16_to_double(h); }
  static constexpr float widen_to_float(uint16_t h) { return bf16_to_float(h); }
  static constexpr uint16_t narrow(double x) { return bf16_from_double(x); }
  static constexpr uint16_t narrow_float(float x) { return bf16_from_float(x); }
};

static_assert(f16_from_double(1.0) == 0x3C00 && f16_to_float(0x3C00) == 1.0f && f16_from_float(-2.0f) == 0xC000);
static_assert(bf16_from_double(1.0) == 0x3F80 && bf16_to_float(0x3F80) == 1.0f && bf16_from_float(-2.0f) == 0xC000);

template <class Format>
class Half : public ::testing::Test {
 public:
  static constexpr int kBias = (1 << (Format::kExp - 1)) - 1;
  static constexpr uint16_t kInfinity = ((1 << Format::kExp) - 1) << Format::kMant;

  /// The value of a pattern by the definition of the format.
  static double defined_value(uint16_t h) {
    const int exponent = (h & 0x7FFF) >> Format::kMant, fraction = h & ((1 << Format::kMant) - 1);
    const double sign = h & 0x8000 ? -1.0 : 1.0;
    if (exponent == (1 << Format::kExp) - 1) return sign * (fraction ? std::nan("") : INFINITY);
    if (exponent == 0) return sign * std::ldexp(fraction, 1 - kBias - Format::kMant);
    return sign * std::ldexp(fraction + (1 << Format::kMant), exponent - kBias - Format::kMant);
  }
};
using Formats = ::testing::Types<F16, BF16>;
TYPED_TEST_SUITE(Half, Formats);

TYPED_TEST(Half, EveryPatternHasItsDefinedValueAndComesBack) {
  for (uint32_t pattern = 0; pattern < 65536; ++pattern) {
    const auto h = static_cast<uint16_t>(pattern);
    const double want = this->defined_value(h), got = TypeParam::widen(h);
    if (std::isnan(want)) {
      EXPECT_TRUE(std::isnan(got) && std::isnan(TypeParam::widen_to_float(h))) << pattern;
      for (const uint16_t back : {TypeParam::narrow(got), TypeParam::narrow_float(TypeParam::widen_to_float(h))}) {
        EXPECT_GT(back & 0x7FFF, this->kInfinity) << pattern;
        EXPECT_EQ(back & 0x8000, h & 0x8000) << pattern;
      }
      continue;
    }
    EXPECT_EQ(got, want) << pattern;
    EXPECT_EQ(std::signbit(got), std::signbit(want)) << pattern;
    EXPECT_EQ(static_cast<double>(TypeParam::widen_to_float(h)), want) << pattern;
    EXPECT_EQ(TypeParam::narrow(want), h);
    EXPECT_EQ(TypeParam::narrow_float(static_cast<float>(want)), h);
  }
}

TYPED_TEST(Half, BetweenNeighboursTheNearerWinsAndTiesGoToEven) {
  for (uint16_t low = 0; low < this->kInfinity; ++low) {
    const uint16_t high = low + 1, even = low % 2 == 0 ? low : high;
    const double a = this->defined_value(low);
    // Past the largest finite value the next step of the same size stands for infinity.
    const double b = high == this->kInfinity ? std::ldexp(1.0, this->kBias + 1) : this->defined_value(high);
    const double middle = (a + b) / 2;
    EXPECT_EQ(TypeParam::narrow(middle), even) << low;
    EXPECT_EQ(TypeParam::narrow(std::nextafter(middle, a)), low) << low;
    EXPECT_EQ(TypeParam::narrow(std::nextafter(middle, INFINITY)), high) << low;
    EXPECT_EQ(TypeParam::narrow(-middle), even | 0x8000) << low;
    const auto single = static_cast<float>(middle);
    EXPECT_EQ(static_cast<double>(single), middle) << low;
    EXPECT_EQ(TypeParam::narrow_float(single), even) << low;
    EXPECT_EQ(TypeParam::narrow_float(std::nextafter(single, 0.0f)), low) << low;
    EXPECT_EQ(TypeParam::narrow_float(std::nextafter(single, INFINITY)), high) << low;
  }
}

TYPED_TEST(Half, ADoubleIsRoundedOnceNotThroughFloat) {
  const double ulp = std::ldexp(1.0, -TypeParam::kMant);
  const double above_the_tie = 1.0 + ulp / 2 + std::ldexp(1.0, -50);
  ASSERT_EQ(static_cast<float>(above_the_tie), static_cast<float>(1.0 + ulp / 2));
  EXPECT_EQ(TypeParam::widen(TypeParam::narrow(above_the_tie)), 1.0 + ulp);
}

TYPED_TEST(Half, ExtremesOfDouble) {
  EXPECT_EQ(TypeParam::narrow(std::numeric_limits<double>::max()), this->kInfinity);
  EXPECT_EQ(TypeParam::narrow(-INFINITY), this->kInfinity | 0x8000);
  EXPECT_EQ(TypeParam::narrow(std::numeric_limits<double>::denorm_min()), 0);
  EXPECT_EQ(TypeParam::narrow(-std::numeric_limits<double>::min()), 0x8000);
}

#ifdef __FLT16_MANT_DIG__
__extension__ typedef _Float16 CompilerHalf;

TEST(HalfAgainstCompiler, RandomDoublesRoundTheSame) {
  std::mt19937_64 random(7);
  std::uniform_real_distribution<double> mantissa(-2.0, 2.0);
  std::uniform_int_distribution<int> exponent(-28, 18);
  for (int n = 0; n < 200000; ++n) {
    const double x = std::ldexp(mantissa(random), exponent(random));
    ASSERT_EQ(f16_from_double(x), std::bit_cast<uint16_t>(static_cast<CompilerHalf>(x))) << x;
    const auto single = static_cast<float>(x);
    ASSERT_EQ(f16_from_float(single), std::bit_cast<uint16_t>(static_cast<CompilerHalf>(single))) << x;
  }
}
#endif

}  // namespace
}  // namespace flash_attn
