// The forward of few rows, which reads keys where they lie: a decode step, short queries against a long cache.
//
// A key and its value are read from memory once, for all R rows of the task (the heads of a group), and used for
// 4 d R FLOPs. Memory gives a core 4 to 6 bytes a cycle, so a key of d = 128 in bf16 takes 85 - 130 cycles to arrive:
//
//   cycles a key at two W-wide operations a cycle, W = 16, d = 128
//     q . k    8 R FMAs, 8 conversions, 3 R to reduce lanes
//     p v      8 R FMAs, 8 conversions
//     softmax  12 / 16 R
//   together   8 + 10 R
//
// Packing (a transpose and a copy, written and read again) would cost more than it saves up to some 16 rows. What
// matters is that memory is never idle and gives whole runs. In a (row, head, col) cache the rows of one head lie a
// page apart: a task takes up several heads, kStep keys of one after those of another, K of a block and then V of it.
// Every step asks L2 for what the same head needs next, evenly as it goes.

namespace flash_attn::cpu::FLASH_ATTN_ISA {

inline constexpr int64_t kInPlaceScoreKeys = 256;
inline constexpr int64_t kInPlaceLds = kInPlaceScoreKeys + W;
inline constexpr int64_t kStep = 16;

/// Two vectors of columns from column c of a row, in fp32. Those of bf16 are the even columns and the odd ones, which
/// take one operation each; q, and o while a task runs, are brought into that order.
struct Pair {
  vf a, b;
};
template <DType kType>
FLASH_ATTN_INLINE Pair load_pair(const char* row, int64_t c) {
  if constexpr (kType == DType::bf16) {
    vi x;
    std::memcpy(&x, row + 2 * c, sizeof x);
    return {as_float(x << 16), as_float(x & static_cast<int32_t>(0xffff0000))};
  } else if constexpr (kType == DType::f16) {
    return {from_f16(load_half(row + 2 * c)), from_f16(load_half(row + 2 * (c + W)))};
  } else {
    const float* const x = reinterpret_cast<const float*>(row) + c;
    return {load(x), load(x + W)};
  }
}

template <int... kLane>
FLASH_ATTN_INLINE Pair even_and_odd(Pair x, std::integer_sequence<int, kLane...>) {
  return {__builtin_shufflevector(x.a, x.b, (2 * kLane)...), __builtin_shufflevector(x.a, x.b, (2 * kLane + 1)...)};
}
template <int... kLane>
FLASH_ATTN_INLINE Pair in_turns(Pair x, std::integer_sequence<int, kLane...>) {
  return {__builtin_shufflevector(x.a, x.b, (kLane / 2 + kLane % 2 * W)...),
          __builtin_shufflevector(x.a, x.b, (W / 2 + kLane / 2 + kLane % 2 * W)...)};
}
/// n floats, whole pairs: from their own order into that of load_pair, and back.
template <DType kType>
inline void pair_columns(float* x, int64_t n) {
  for (int64_t c = 0; kType == DType::bf16 && c < n; c += 2 * W) {
    const Pair p = even_and_odd({load(x + c), load(x + c + W)}, std::make_integer_sequence<int, W>{});
    store(x + c, p.a), store(x + c + W, p.b);
  }
}
template <DType kType>
inline void unpair_columns(float* x, int64_t n) {
  for (int64_t c = 0; kType == DType::bf16 && c < n; c += 2 * W) {
    const Pair p = in_turns({load(x + c), load(x + c + W)}, std::make_integer_sequence<int, W>{});
    store(x + c, p.a), store(x + c + W, p.b);
  }
}

/// Asks L2 for bytes [from, to) of a row.
FLASH_ATTN_INLINE void ask(const char* row, int64_t from, int64_t to) {
  for (int64_t at = from; at < to; at += 64) __builtin_prefetch(row + at, 0, 2);
}

/// Rows of one head: where those of the first lie, and how far this head is from it.
struct HeadRows {
  const char* const* row;
  int64_t head;  // bytes
  FLASH_ATTN_INLINE const char* operator[](int64_t j) const { return row[j] + head; }
  FLASH_ATTN_INLINE HeadRows from(int64_t j) const { return {row + j, head}; }
};

/// s[r][j] = q_r . k_j for MR rows and KR keys, MR KR = W: as many sums as lanes, reduced together.
template <DType kType, int MR>
FLASH_ATTN_INLINE void dots(const float* q, int64_t d, const char* const* k, float* s) {
  constexpr int KR = W / MR, kMost = MR == 1 ? 8 : 4, kAtOnce = KR < kMost ? KR : kMost;
  vf sum[W];
#pragma GCC unroll 4
  for (int k0 = 0; k0 < KR; k0 += kAtOnce) {
    vf acc[MR][kAtOnce]{};
    for (int64_t c = 0; c < d; c += 2 * W) {
      Pair x[kAtOnce];
#pragma GCC unroll 8
      for (int i = 0; i < kAtOnce; ++i) x[i] = load_pair<kType>(k[k0 + i], c);
#pragma GCC unroll 4
      for (int r = 0; r < MR; ++r) {
        const vf a = load(q + r * d + c), b = load(q + r * d + c + W);
#pragma GCC unroll 8
        for (int i = 0; i < kAtOnce; ++i) acc[r][i] += a * x[i].a;
#pragma GCC unroll 8
        for (int i = 0; i < kAtOnce; ++i) acc[r][i] += b * x[i].b;
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < MR; ++r)
#pragma GCC unroll 8
      for (int i = 0; i < kAtOnce; ++i) sum[r * KR + k0 + i] = acc[r][i];
  }
  float lanes[W];
  store(lanes, reduce_each(sum, [](vf a, vf b) { return a + b; }));
  for (int r = 0; r < MR; ++r) std::memcpy(s + r * kInPlaceLds, lanes + r * KR, KR * sizeof(float));
}

/// One step: n <= kStep keys, for any rows. `next`: as many keys or values that come next.
template <DType kType>
FLASH_ATTN_INLINE void dots(const float* q, int64_t rows, int64_t d, HeadRows k, int64_t n, float* s, HeadRows next,
                            int64_t next_bytes) {
  for (int64_t j = 0; j < n; j += W) {
    const char* key[W];
    for (int64_t i = 0; i < W; ++i) key[i] = k[j + i < n ? j + i : j];
    for (int64_t i = 0; i < W && j + i < n; ++i) ask(next[j + i], 0, next_bytes);
    const float* x = q;
    float* to = s + j;
    int64_t left = rows;
    constexpr int kMost = W < 4 ? W : 4;
    for (; left >= kMost; left -= kMost, x += kMost * d, to += kMost * kInPlaceLds)
      for (int i = 0; i < W; i += W / kMost) dots<kType, kMost>(x, d, key + i, to + i);
    for (; left >= 2; left -= 2, x += 2 * d, to += 2 * kInPlaceLds)
      for (int i = 0; i < W; i += W / 2) dots<kType, 2>(x, d, key + i, to + i);
    if (left > 0) dots<kType, 1>(x, d, key, to);
  }
}

/// One step of values: n rows, their probabilities p (row r at p + r * kInPlaceLds), and where o is.
struct Values {
  const float* p;
  HeadRows row;
  int64_t n, cols;
  const float* scale;  // of the rows' o
  float* o;
  HeadRows next;  // as many rows that come next
};

/// o = scale o + p v for MR rows and NP pairs of vectors of columns from c.
template <DType kType, int MR, int NP, bool kAsks>
FLASH_ATTN_INLINE void add_tile(const Values& v, int64_t r0, int64_t c) {
  constexpr int64_t kSize = kType == DType::f32 ? 4 : 2;
  float* const o = v.o + r0 * v.cols + c;
  const float* const p = v.p + r0 * kInPlaceLds;
  Pair acc[MR][NP];
#pragma GCC unroll 4
  for (int r = 0; r < MR; ++r)
#pragma GCC unroll 4
    for (int x = 0; x < NP; ++x) {
      acc[r][x].a = load(o + r * v.cols + 2 * x * W) * v.scale[r0 + r];
      acc[r][x].b = load(o + r * v.cols + (2 * x + 1) * W) * v.scale[r0 + r];
    }
  for (int64_t j = 0; j < v.n; ++j) {
    if constexpr (kAsks) ask(v.next[j], c * kSize, (c + 2 * NP * W) * kSize);
    const char* const from = v.row[j];
    Pair row[NP];
#pragma GCC unroll 4
    for (int x = 0; x < NP; ++x) row[x] = load_pair<kType>(from, c + 2 * x * W);
#pragma GCC unroll 4
    for (int r = 0; r < MR; ++r) {
      const vf y = all(p[r * kInPlaceLds + j]);
#pragma GCC unroll 4
      for (int x = 0; x < NP; ++x) acc[r][x].a += y * row[x].a, acc[r][x].b += y * row[x].b;
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < MR; ++r)
#pragma GCC unroll 4
    for (int x = 0; x < NP; ++x) {
      store(o + r * v.cols + 2 * x * W, acc[r][x].a);
      store(o + r * v.cols + (2 * x + 1) * W, acc[r][x].b);
    }
}

/// All columns of MR rows; at least eight sums are under way at once. The first rows ask for what comes next.
template <DType kType, int MR>
FLASH_ATTN_INLINE void add_rows(const Values& v, int64_t r0) {
  constexpr int NP = (kRegisters == 32 && MR == 4) ? 2 : 4 / MR;
  int64_t c = 0;
  for (; c + 2 * NP * W <= v.cols; c += 2 * NP * W)
    r0 == 0 ? add_tile<kType, MR, NP, true>(v, r0, c) : add_tile<kType, MR, NP, false>(v, r0, c);
  for (; c < v.cols; c += 2 * W)
    r0 == 0 ? add_tile<kType, MR, 1, true>(v, r0, c) : add_tile<kType, MR, 1, false>(v, r0, c);
}

/// o = scale o + p v for any rows.
template <DType kType>
FLASH_ATTN_INLINE void add_values(const Values& v, int64_t rows) {
  int64_t r = 0;
  for (; r + 4 <= rows; r += 4) add_rows<kType, 4>(v, r);
  if (r + 2 <= rows) add_rows<kType, 2>(v, r), r += 2;
  if (r < rows) add_rows<kType, 1>(v, r);
}

/// A row's own run of values in [first, last): 0 * inf is NaN, so a row must meet no value that it does not see.
template <DType kType>
FLASH_ATTN_INLINE void add_seen_values(const AttendTask& t, const float* s, const float* row_scale, HeadRows v,
                                       int64_t first, int64_t last) {
  for (int64_t r = 0; r < t.rows; ++r) {
    const int64_t lo = t.lo[r] > first ? t.lo[r] - first : 0, hi = (t.hi[r] < last ? t.hi[r] : last) - first;
    if (lo < hi)
      add_values<kType>({s + r * kInPlaceLds + lo, v.from(lo), hi - lo, t.headdim_v, row_scale + r,
                         t.o + r * t.headdim_v, v.from(lo)},
                        1);
  }
}

template <DType kType, bool kDrops>
__attribute__((noinline)) void attend_in_place(const AttendTask* tasks, int64_t heads, const KeysInPlace& keys) {
  static constexpr float kOnes[kInPlaceRows] = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1};
  const AttendTask& any = tasks[0];  // what all have in common: rows, sizes, what they see
  const int64_t k_bytes = any.headdim * bytes_of(kType), v_bytes = any.headdim_v * bytes_of(kType);
  for (int64_t h = 0; h < heads; ++h) pair_columns<kType>(tasks[h].o, any.rows * any.headdim_v);
  for (int64_t block = 0; block < any.keys; block += kInPlaceScoreKeys) {
    const int64_t block_end = block + kInPlaceScoreKeys < any.keys ? block + kInPlaceScoreKeys : any.keys;
    const auto [first, last, partial] = seen_by<kPanel, 1>(any.lo, any.hi, any.rows, block, block_end);
    if (last <= first) continue;
    const int64_t n = last - first, padded = pad_to(n, W);
    const char *const *const k_rows = keys.k.row + first, *const *const v_rows = keys.v.row + first;
    const auto k = [&](int64_t h, int64_t j) { return HeadRows{k_rows + j, h * keys.k_head}; };
    const auto v = [&](int64_t h, int64_t j) { return HeadRows{v_rows + j, h * keys.v_head}; };
    const auto s = [&](int64_t h) { return reinterpret_cast<float*>(tasks[h].scratch); };
    const auto row_scale = [&](int64_t h) { return s(h) + kInPlaceRows * kInPlaceLds; };

    for (int64_t j = 0; j < n; j += kStep) {
      const int64_t count = n - j < kStep ? n - j : kStep;
      const bool more = j + kStep + count <= n;
      for (int64_t h = 0; h < heads; ++h)
        dots<kType>(reinterpret_cast<const float*>(tasks[h].q), any.rows, any.headdim, k(h, j), count, s(h) + j,
                    more ? k(h, j + kStep) : v(h, 0), more ? k_bytes : v_bytes);
    }
    // Columns beyond n are hidden as keys that no row sees are: the last key is the last of the sequence.
    for (int64_t h = 0; h < heads; ++h)
      softmax_rows<kDrops, kInPlaceScoreKeys>(tasks[h], 0, any.rows, s(h), kInPlaceLds, first, padded,
                                              partial || padded != n, row_scale(h) + kInPlaceRows, row_scale(h));
    for (int64_t j = 0; j < n && !partial; j += kStep) {
      const int64_t count = n - j < kStep ? n - j : kStep;
      for (int64_t h = 0; h < heads; ++h) {
        const HeadRows next = j + kStep + count <= n ? v(h, j + kStep) : last + count <= any.keys ? k(h, n) : v(h, j);
        add_values<kType>({s(h) + j, v(h, j), count, any.headdim_v, j == 0 ? row_scale(h) : kOnes, tasks[h].o, next},
                          any.rows);
      }
    }
    for (int64_t h = 0; h < heads && partial; ++h)
      add_seen_values<kType>(tasks[h], s(h), row_scale(h), v(h, 0), first, last);
  }
  for (int64_t h = 0; h < heads; ++h) unpair_columns<kType>(tasks[h].o, any.rows * any.headdim_v);
}

template <DType kType>
void attend_in_place(const AttendTask* tasks, int64_t heads, const KeysInPlace& keys) {
  tasks[0].dropout.threshold == 0 ? attend_in_place<kType, false>(tasks, heads, keys)
                                  : attend_in_place<kType, true>(tasks, heads, keys);
}

inline void attend_any_in_place(const AttendTask* tasks, int64_t heads, const KeysInPlace& keys) {
  if (keys.k.dtype == DType::f32) return attend_in_place<DType::f32>(tasks, heads, keys);
  if (keys.k.dtype == DType::bf16) return attend_in_place<DType::bf16>(tasks, heads, keys);
  return attend_in_place<DType::f16>(tasks, heads, keys);
}

inline bool pack_q_in_place(const RowList& rows, float factor, char* to) {
  auto* const q = reinterpret_cast<float*>(to);
  const bool special = load_rows(rows, factor, q, rows.cols);
  if (rows.dtype == DType::bf16) pair_columns<DType::bf16>(q, rows.rows * rows.cols);
  return special;
}

inline constexpr AttendKernel kAttendInPlace = {
    .name = "fp32 where the keys lie",
    .panel = kPanel,
    .tile_rows = 4,
    .tile_keys = kInPlaceScoreKeys,
    .scratch = (kInPlaceRows * (kInPlaceLds + 2) + 15) / 16 * 64,
    .q_bytes = attend_q_bytes,
    .k_bytes = nullptr,
    .v_bytes = nullptr,
    .pack_q = pack_q_in_place,
    .pack_k = nullptr,
    .pack_v = nullptr,
    .attend = nullptr,
    .attend_in_place = attend_any_in_place,
    .plain_only = false,
};

}  // namespace flash_attn::cpu::FLASH_ATTN_ISA
