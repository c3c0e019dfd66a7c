// AMX tiles: 16 x 16 fp32 += (16 x 32 bf16) . (32 x 16 bf16), and numbers as sums of bf16 parts.
//
// bf16 keeps 8 bits, so x = x0 + x1 + ... with each part the leading 8 bits of what is left: fp16 (11 bits) has two
// parts, bf16 one; p always has two, more than 16 bits would hold. A product of sums is a sum of products,
// all exact in fp32; the smallest one is left out where p is rounded anyway. bf16: 1 product for the scores, 2 with p;
// fp16: 4 and 3.
//
// Operand A is row-major. Operand B holds tiles of 16 rows, row r the pairs (2r, 2r + 1) of 16 columns. Accumulators
// are tiles 0 - 3 (two rows of two), A is in 4 and 5, B in 6 and 7.
#include <bit>

namespace flash_attn::cpu::FLASH_ATTN_ISA {

inline constexpr int64_t kTile = 16;       // rows of a tile
inline constexpr int64_t kDepth = 32;      // bf16 in a row of a tile
inline constexpr int64_t kTileSize = 512;  // bf16 in a tile

using bf16 = uint16_t;
using v32h = uint16_t __attribute__((vector_size(64)));

#if defined(FLASH_ATTN_EMULATE_TILES)
#include "cpu/kernel/tiles_emulated.hpp"
#else
struct alignas(64) TileConfig {
  uint8_t palette, start_row, reserved[14];
  uint16_t bytes[16];
  uint8_t rows[16];
};
/// Eight tiles of 16 rows of 64 bytes. A constant, because compilers take the instruction for a read of 8 bytes and may
/// leave out the stores of the rest.
inline constexpr TileConfig kTileConfig = {
    1, 0, {}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};

FLASH_ATTN_INLINE void begin_tiles() { _tile_loadconfig(&kTileConfig); }
FLASH_ATTN_INLINE void end_tiles() { _tile_release(); }
// Macros: the number of a tile is part of the instruction. Strides in bytes.
#define FLASH_ATTN_TILE_ZERO(tile) _tile_zero(tile)
#define FLASH_ATTN_TILE_LOAD(tile, from, stride) _tile_loadd(tile, from, stride)
#define FLASH_ATTN_TILE_STORE(tile, to, stride) _tile_stored(tile, to, stride)
#define FLASH_ATTN_TILE_MULTIPLY(c, a, b) _tile_dpbf16ps(c, a, b)
#endif

/// Two vectors as 32 bf16, rounded to nearest even.
FLASH_ATTN_INLINE v32h to_bf16_pair(vf a, vf b) {
#if defined(__AVX512BF16__)
  return reinterpret_cast<v32h>(_mm512_cvtne2ps_pbh(b, a));
#else
  const vh pair[2] = {to_bf16(a), to_bf16(b)};
  v32h both;
  std::memcpy(&both, pair, sizeof both);
  return both;
#endif
}
/// The nearest bf16 (ties away from zero), for finite x below 2^127. x - leading(x) is exact.
FLASH_ATTN_INLINE vf leading(vf x) { return as_float((as_int(x) + 0x8000) & static_cast<int32_t>(0xffff0000)); }

/// The parts of two vectors: part i to to + i * distance. Part sums are exact but for the last rounding.
template <int kParts>
FLASH_ATTN_INLINE void store_parts(bf16* to, int64_t distance, vf a, vf b) {
#pragma GCC unroll 2
  for (int i = 0; i < kParts; ++i) {
    const v32h part = to_bf16_pair(i + 1 < kParts ? leading(a) : a, i + 1 < kParts ? leading(b) : b);
    std::memcpy(to + i * distance, &part, sizeof part);
    a -= leading(a), b -= leading(b);
  }
}

/// x cut to a bf16 towards zero; x - cut(x) is exact.
FLASH_ATTN_INLINE vf cut(vf x) { return as_float(as_int(x) & static_cast<int32_t>(0xffff0000)); }

/// Two parts of two vectors. Cut instead of rounded, the first costs one operation less and the second is as exact.
FLASH_ATTN_INLINE void store_two_parts(bf16* to, int64_t distance, vf a, vf b) {
  const v32h part0 = to_bf16_pair(cut(a), cut(b)), part1 = to_bf16_pair(a - cut(a), b - cut(b));
  std::memcpy(to, &part0, sizeof part0);
  std::memcpy(to + distance, &part1, sizeof part1);
}

/// Two parts of two rows of n: lane i of a part is the pair (upper_i, lower_i). They take the place of the rows.
FLASH_ATTN_INLINE void pair_rows(float* upper, float* lower, int64_t n) {
  using vu = uint32_t __attribute__((vector_size(4 * W)));
  const auto pairs = [](vf x, vf y) {
    return as_float(reinterpret_cast<vi>(reinterpret_cast<vu>(x) >> 16) | as_int(cut(y)));
  };
  for (int64_t j = 0; j < n; j += W) {
    const vf a = load(upper + j), b = load(lower + j);
    store(upper + j, pairs(a, b));
    store(lower + j, pairs(a - cut(a), b - cut(b)));
  }
}

/// Looks for numbers that have no parts: inf and NaN; in fp32 also what is too large to round, or so small that a part
/// could be a denormal, which tiles take for zero.
class PartlessFinder {
 public:
  FLASH_ATTN_INLINE void see(v32h x) {
    const v32h magnitude = x & 0x7fff;
    largest_ = magnitude > largest_ ? magnitude : largest_;
  }
  FLASH_ATTN_INLINE void see(vf x) {
    large_ |= _mm512_cmp_ps_mask(abs(x), _mm512_set1_ps(0x1p127f), _CMP_NLT_UQ);
    small_ |= _mm512_mask_cmp_ps_mask(_mm512_cmp_ps_mask(x, vf{}, _CMP_NEQ_UQ), abs(x), _mm512_set1_ps(0x1p-100f),
                                      _CMP_LT_OQ);
  }
  bool found() const {
    return (large_ | small_) != 0 ||
           _mm512_cmpge_epu16_mask(reinterpret_cast<__m512i>(largest_), _mm512_set1_epi16(0x7f80)) != 0;
  }

 private:
  v32h largest_{};
  __mmask16 large_ = 0, small_ = 0;
};

/// a0 b0 a1 b1 ... of 16 elements each, from element kFrom on.
template <int kFrom, int... kPair>
FLASH_ATTN_INLINE v32h interleave_pairs(v32h a, v32h b, std::integer_sequence<int, kPair...>) {
  return __builtin_shufflevector(a, b, (kFrom + kPair / 2 + kPair % 2 * 32)...);
}
template <int kFrom>
FLASH_ATTN_INLINE void interleave(const bf16* a, const bf16* b, bf16* to) {
  v32h x, y;
  std::memcpy(&x, a, sizeof x);
  std::memcpy(&y, b, sizeof y);
  x = interleave_pairs<kFrom>(x, y, std::make_integer_sequence<int, 32>{});
  std::memcpy(to, &x, sizeof x);
}

/// Which parts meet, the smallest products first.
struct Pair {
  int a, b;
};
struct Pairs {
  int count;
  Pair at[4];
};
inline constexpr Pairs kScorePairs[2] = {{1, {{0, 0}}}, {4, {{1, 1}, {1, 0}, {0, 1}, {0, 0}}}};
inline constexpr Pairs kOutputPairs[2] = {{2, {{1, 0}, {0, 0}}}, {3, {{1, 0}, {0, 1}, {0, 0}}}};  // p is operand A
inline constexpr Pairs kKeySumPairs[2] = {{2, {{0, 1}, {0, 0}}}, {3, {{1, 0}, {0, 1}, {0, 0}}}};  // p is operand B

/// C (+)= A . B: C is one or two tiles high and `columns` tiles wide, A and B are `steps` tiles deep. Two columns of C
/// after two.
struct TileSweep {
  const bf16* a;
  int64_t lda, a_step, a_part;  // elements
  const bf16* b;                // column j of tiles at b + j * b_column
  int64_t b_column, b_part;
  float* c;
  int64_t ldc;
  int64_t steps, columns;  // columns of tiles
  const Pairs* pairs;
  bool two_rows, add;

  /// Units of work: products of up to four tiles.
  int64_t units() const { return (columns + 1) / 2 * pairs->count * steps; }
};

/// Sweeps that run a unit at a time between other instructions. The vector units and the tile unit work in parallel as
/// far as the processor looks ahead (about 500 operations), so products must stand close to the exponentials that hide
/// them. Accumulators stay in tiles 0 - 3 from unit to unit.
///
/// A tile of B has its rows kLdb elements apart, and the next step's tile begins kStep elements after it: constants, as
/// the unit is short of registers. By default tiles are packed.
template <int64_t kLdb = kDepth, int64_t kStep = kTileSize>
class TileStream {
 public:
  void start(const TileSweep& sweep) {
    asm volatile(
        "" ::
            : "memory");  // what was stored before is there for tile loads, which the compiler knows nothing of
    sweep_ = sweep;
    column_ = 0;
    left_ = sweep.units();
    begin_column();
  }
  bool busy() const { return left_ > 0; }

  FLASH_ATTN_INLINE void unit() {
    const TileSweep& w = sweep_;
    FLASH_ATTN_TILE_LOAD(6, b_, kLdb * 2);
    FLASH_ATTN_TILE_LOAD(4, a_, w.lda * 2);
    FLASH_ATTN_TILE_MULTIPLY(0, 4, 6);
    if (two_columns_) {
      FLASH_ATTN_TILE_LOAD(7, b_ + w.b_column, kLdb * 2);
      FLASH_ATTN_TILE_MULTIPLY(1, 4, 7);
    }
    if (w.two_rows) {
      FLASH_ATTN_TILE_LOAD(5, a_ + kTile * w.lda, w.lda * 2);
      FLASH_ATTN_TILE_MULTIPLY(2, 5, 6);
      if (two_columns_) FLASH_ATTN_TILE_MULTIPLY(3, 5, 7);
    }
    a_ += w.a_step, b_ += kStep, --left_;
    if (--steps_ == 0) next();
  }

 private:
  void begin_pair() {
    const TileSweep& w = sweep_;
    a_ = w.a + w.pairs->at[pair_].a * w.a_part;
    b_ = w.b + column_ * w.b_column + w.pairs->at[pair_].b * w.b_part;
    steps_ = w.steps;
  }
  void begin_column() {
    const TileSweep& w = sweep_;
    two_columns_ = w.columns - column_ > 1;
    pair_ = 0;
    begin_pair();
    float *const c0 = w.c + column_ * kTile, *const c1 = c0 + kTile * w.ldc;
    if (w.add) {
      FLASH_ATTN_TILE_LOAD(0, c0, w.ldc * 4);
      if (two_columns_) FLASH_ATTN_TILE_LOAD(1, c0 + kTile, w.ldc * 4);
      if (w.two_rows) FLASH_ATTN_TILE_LOAD(2, c1, w.ldc * 4);
      if (w.two_rows && two_columns_) FLASH_ATTN_TILE_LOAD(3, c1 + kTile, w.ldc * 4);
    } else {
      FLASH_ATTN_TILE_ZERO(0);
      FLASH_ATTN_TILE_ZERO(1);
      FLASH_ATTN_TILE_ZERO(2);
      FLASH_ATTN_TILE_ZERO(3);
    }
  }
  void end_column() {
    const TileSweep& w = sweep_;
    float *const c0 = w.c + column_ * kTile, *const c1 = c0 + kTile * w.ldc;
    FLASH_ATTN_TILE_STORE(0, c0, w.ldc * 4);
    if (two_columns_) FLASH_ATTN_TILE_STORE(1, c0 + kTile, w.ldc * 4);
    if (w.two_rows) FLASH_ATTN_TILE_STORE(2, c1, w.ldc * 4);
    if (w.two_rows && two_columns_) FLASH_ATTN_TILE_STORE(3, c1 + kTile, w.ldc * 4);
  }
  void next() {
    if (++pair_ < sweep_.pairs->count) return begin_pair();
    end_column();
    column_ += 2;
    if (left_ > 0) begin_column();
  }

  TileSweep sweep_{};
  const bf16 *a_ = nullptr, *b_ = nullptr;
  int64_t left_ = 0, steps_ = 0, column_ = 0;
  int pair_ = 0;
  bool two_columns_ = false;
};

}  // namespace flash_attn::cpu::FLASH_ATTN_ISA
