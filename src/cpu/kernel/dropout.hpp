// Dropout: the draws of core/dropout.hpp for a row of keys, by Philox4x32-10 on W / 2 counters at a time, eight keys
// each.
//
// A word of a counter is the low half of a 64-bit lane. What is above it is never read, so that the low half of a
// product costs nothing and the high half a shift. A round of W / 2 counters is 2 products, 2 shifts and 2 exclusive
// ors of three; bringing their words into the order of the keys takes 4 operations, 2 shuffles and 2 stores.
//
// Operations for 8 W keys: 2 x (60 + 8), then 2 for each of 8 vectors of p (compare, select; one more where there are
// no masks): 152. In fp32 their scores take 8 x (2 d + 12): dropout adds 14 % at d = 64 and 7 % at d = 128. On tiles,
// which leave the vector units little but the softmax, it adds more.

namespace flash_attn::cpu::FLASH_ATTN_ISA {

/// Which counter a lane holds: the even lanes the first W / 4, the odd lanes the next (see side_by_side).
FLASH_ATTN_INLINE vq lane_counters() {
  vq x{};
  for (uint64_t i = 0; i < W / 2; ++i) x[i] = i % 2 * (W / 4) + i / 2;
  return x;
}

/// a0 b0 a2 b2 ... (kOdd 0) or a1 b1 a3 b3 ... (kOdd 1).
template <int kOdd, int... kLane>
FLASH_ATTN_INLINE vq side_by_side(vq a, vq b, std::integer_sequence<int, kLane...>) {
  return __builtin_shufflevector(a, b, (kLane / 2 * 2 + kOdd + kLane % 2 * (W / 2))...);
}

/// The draws of keys [first, first + n) of row r, in their order; n is rounded up to 4 W.
FLASH_ATTN_INLINE void draw_row(const DropoutTask& t, int64_t r, int64_t first, int64_t n, uint16_t* draws) {
  const vq row = vq{} + t.rows[r].row, plane = vq{} + t.rows[r].plane, offset = vq{} + t.offset;
  for (int64_t j = 0; j < n; j += 4 * W) {
    vq c0 = lane_counters() + static_cast<uint64_t>((t.first_key + first + j) / 8), c1 = row, c2 = plane, c3 = offset;
    uint32_t k0 = t.key[0], k1 = t.key[1];
#pragma GCC unroll 10
    for (int round = 0; round < 10; ++round) {
      const vq a = multiply_low(c0, vq{} + 0xD2511F53u), b = multiply_low(c2, vq{} + 0xCD9E8D57u);
      c0 = (b >> 32) ^ c1 ^ k0, c1 = b;
      c2 = (a >> 32) ^ c3 ^ k1, c3 = a;
      k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
    }
    const vq low = (c0 & 0xffffffff) | (c1 << 32), high = (c2 & 0xffffffff) | (c3 << 32);
    const vq front = side_by_side<0>(low, high, std::make_integer_sequence<int, W / 2>{});
    const vq back = side_by_side<1>(low, high, std::make_integer_sequence<int, W / 2>{});
    std::memcpy(draws + j, &front, sizeof front);
    std::memcpy(draws + j + 2 * W, &back, sizeof back);
  }
}

/// emit of the probabilities that are kept, and of 0 for the others; `draws` are those of column 0 on.
template <class Emit>
struct EmitKept {
  const Emit& emit;
  const uint16_t* draws;
  int32_t threshold;
  FLASH_ATTN_INLINE void operator()(int64_t j, vf p0, vf p1) const {
    emit(j, where_at_least(load_half(draws + j), threshold, p0),
         where_at_least(load_half(draws + j + W), threshold, p1));
  }
  FLASH_ATTN_INLINE void operator()(int64_t j, vf p) const requires requires { emit(j, p); }
  { emit(j, where_at_least(load_half(draws + j), threshold, p)); }
};

/// exponentials (softmax.hpp) of row r of a task against keys [first, first + n <= kMost), with its dropout if kDrops.
template <bool kDrops, int64_t kMost, class Emit>
FLASH_ATTN_INLINE void exponentials_kept(const DropoutTask& t, int64_t r, int64_t first, const float* s, int64_t n,
                                         float scale, float base, float rescale, float* l, const Emit& emit) {
  if constexpr (kDrops) {
    static_assert(kMost % (4 * W) == 0);
    alignas(64) uint16_t draws[kMost];
    draw_row(t, r, first, n, draws);
    exponentials(s, n, scale, base, rescale, l, EmitKept<Emit>{emit, draws, t.threshold});
  } else {
    exponentials(s, n, scale, base, rescale, l, emit);
  }
}

}  // namespace flash_attn::cpu::FLASH_ATTN_ISA
