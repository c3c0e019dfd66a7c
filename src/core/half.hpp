// fp16 (IEEE binary16) and bfloat16 as bit patterns: exact widening, and narrowing that rounds once.
//
// Both formats are 1 sign bit, kExp exponent bits and kMant fraction bits. Narrowing takes a double, because every
// float is one: the nearest representable value, ties to the even pattern, overflow to infinity, NaN to a quiet NaN.
// Going through float on the way would round twice and miss ties.
#pragma once

#include <bit>
#include <cstdint>

namespace flash_attn {

namespace half_detail {

template <int kExp, int kMant>
constexpr uint16_t narrow(double value) {
  constexpr int kBias = (1 << (kExp - 1)) - 1;
  constexpr uint16_t kInfinity = ((1 << kExp) - 1) << kMant;
  const uint64_t bits = std::bit_cast<uint64_t>(value);
  const uint16_t sign = static_cast<uint16_t>(bits >> 63 << 15);
  const uint64_t fraction = bits & ((uint64_t{1} << 52) - 1);
  const int biased = static_cast<int>(bits >> 52 & 0x7FF);

  if (biased == 0x7FF) {
    if (fraction == 0) return sign | kInfinity;
    return static_cast<uint16_t>(sign | kInfinity | 1 << (kMant - 1) | fraction >> (52 - kMant));
  }
  const int e = biased - 1023;  // |value| = 1.fraction * 2^e; doubles that are subnormal are far below our last bit
  if (e > kBias) return sign | kInfinity;

  // Cut the 53-bit significand to kMant + 1 bits, or to fewer where the result is subnormal.
  const bool subnormal = e < 1 - kBias;
  const int shift = 52 - kMant + (subnormal ? 1 - kBias - e : 0);
  if (shift > 53) return sign;  // below half of the smallest subnormal
  const uint64_t significand = fraction | uint64_t{1} << 52;
  const uint64_t half_ulp = uint64_t{1} << (shift - 1);
  const uint64_t rest = significand & (2 * half_ulp - 1);
  uint64_t kept = significand >> shift;
  if (rest > half_ulp || (rest == half_ulp && kept % 2 == 1)) ++kept;

  // A carry out of the fraction is a carry into the exponent: 1.11..1 becomes 2, the largest value becomes infinity.
  const int exponent_above_one = subnormal ? 0 : e + kBias - 1;
  return static_cast<uint16_t>(sign | ((static_cast<uint64_t>(exponent_above_one) << kMant) + kept));
}

}  // namespace half_detail

constexpr uint16_t f16_from_double(double value) { return half_detail::narrow<5, 10>(value); }
constexpr uint16_t f16_from_float(float value) { return f16_from_double(value); }
constexpr uint16_t bf16_from_double(double value) { return half_detail::narrow<8, 7>(value); }

constexpr uint16_t bf16_from_float(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  if ((bits & 0x7FFFFFFFu) > 0x7F800000u) return static_cast<uint16_t>(bits >> 16 | 0x40u);
  return static_cast<uint16_t>((bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16);
}

constexpr float f16_to_float(uint16_t h) {
  const uint32_t sign = uint32_t{h} >> 15 << 31, exponent = h >> 10 & 0x1Fu, fraction = h & 0x3FFu;
  if (exponent == 0) {  // fraction * 2^-24, exactly
    const float magnitude = static_cast<float>(fraction) * 0x1p-24f;
    return sign ? -magnitude : magnitude;
  }
  if (exponent == 0x1F) {  // infinity, or a NaN made quiet
    const uint32_t quiet = fraction ? 0x00400000u : 0u;
    return std::bit_cast<float>(sign | 0x7F800000u | fraction << 13 | quiet);
  }
  return std::bit_cast<float>(sign | (exponent + 127 - 15) << 23 | fraction << 13);
}

constexpr float bf16_to_float(uint16_t h) { return std::bit_cast<float>(uint32_t{h} << 16); }
constexpr double f16_to_double(uint16_t h) { return f16_to_float(h); }
constexpr double bf16_to_double(uint16_t h) { return bf16_to_float(h); }

}  // namespace flash_attn
