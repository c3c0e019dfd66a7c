// Dropout is a function of position.
//
//   keep(b, h, i, j) = bits16(philox4x32-10(key, counter))[j % 8] >= threshold
//     key     = (seed lo, seed hi ^ offset hi)
//     counter = (j / 8, i, b * nheads + h, offset lo)
//   threshold = round(p * 65536): a kept entry is scaled by 65536 / (65536 - threshold), so the expectation is exact.
//
// i and j count within the sequence. Philox: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
#pragma once

#include <array>
#include <cmath>
#include <cstdint>

#include "flash_attn/flash_attn.hpp"

namespace flash_attn {

inline std::array<uint32_t, 4> philox4x32_10(std::array<uint32_t, 4> c, std::array<uint32_t, 2> k) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t{0xD2511F53u} * c[0], b = uint64_t{0xCD9E8D57u} * c[2];
    c = {static_cast<uint32_t>(b >> 32) ^ c[1] ^ k[0], static_cast<uint32_t>(b),
         static_cast<uint32_t>(a >> 32) ^ c[3] ^ k[1], static_cast<uint32_t>(a)};
    k[0] += 0x9E3779B9u;
    k[1] += 0xBB67AE85u;
  }
  return c;
}

/// What a kernel needs to know of Dropout: an integer threshold and the scale of what is kept.
struct DropoutRule {
  uint32_t threshold = 0;  // 0: keep all
  float scale = 1.0f;      // of kept entries; 0 if all are dropped
  uint64_t seed = 0, offset = 0;

  explicit DropoutRule(const Dropout& d) : seed(d.seed), offset(d.offset) {
    threshold = static_cast<uint32_t>(std::lround(d.p * 65536.0));
    scale = threshold >= 65536 ? 0.0f : static_cast<float>(65536.0 / (65536.0 - threshold));
  }
  bool active() const { return threshold != 0; }
  std::array<uint32_t, 2> key() const {
    return {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32) ^ static_cast<uint32_t>(offset >> 32)};
  }

  /// The eight 16-bit draws of keys [8 * j8, 8 * j8 + 8) of row i of plane bh = b * nheads + h.
  std::array<uint32_t, 4> draw(int64_t bh, int64_t i, int64_t j8) const {
    return philox4x32_10(
        {static_cast<uint32_t>(j8), static_cast<uint32_t>(i), static_cast<uint32_t>(bh), static_cast<uint32_t>(offset)},
        key());
  }
  bool keep(int64_t bh, int64_t i, int64_t j) const {
    const uint32_t word = draw(bh, i, j / 8)[(j % 8) / 2];
    return ((word >> (16 * (j % 2))) & 0xFFFFu) >= threshold;
  }
};

}  // namespace flash_attn
