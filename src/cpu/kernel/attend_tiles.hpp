// The forward on AMX tiles, for numbers of kParts bf16 parts. The same loop as attend.hpp; what differs:
//
//   q  [part][rows padded][headdim padded]                 operand A of the scores
//   k  [part][keys / 16][headdim / 32] tiles               operand B: a row of a tile is two columns of 16 keys
//   p  [32 rows][block / 32][2 parts][32]                    operand A of the output; takes the place of the scores
//   v  [part][headdim_v / 16][keys / 32] tiles             operand B: a row of a tile is two keys of 16 columns
//
// Cycles for 16 scores, a tile product (16 x 16 x 32) taking 16 cycles: d N / 32 for N products of parts in all (bf16:
// 3, fp16: 7), and about 12 for the softmax. A tile product holds a port that vector operations could use: together
// they take about the larger of d N / 32 and 24, or the sum of d N / 32 and 12.

namespace flash_attn::cpu::FLASH_ATTN_ISA {

inline constexpr int64_t kTiledRows = 2 * kTile;
inline constexpr int64_t kTiledKeys = 256;
inline constexpr int64_t kTileKeys = 32;  // keys are padded to pairs of tiles

template <int kParts>
struct Tiles {
  static int64_t q_bytes(int64_t rows, int64_t headdim) {
    return kParts * 2 * pad_to(rows, kTiledRows) * pad_to(headdim, kDepth);
  }
  static int64_t k_bytes(int64_t keys, int64_t headdim) { return kParts * 2 * keys * pad_to(headdim, kDepth); }
  static int64_t v_bytes(int64_t keys, int64_t headdim_v) { return kParts * 2 * keys * pad_to(headdim_v, kTile); }

  /// Parts of columns [c, c + 32) of row r times factor, `distance` apart; zeros beyond the row, and for rows beyond
  /// the list.
  FLASH_ATTN_INLINE static void load_parts(const RowList& rows, int64_t r, int64_t c, float factor, bf16* to,
                                           int64_t distance, PartlessFinder& finder) {
    const char* const row = r < rows.rows ? rows.row[r] : nullptr;
    if constexpr (kParts == 1) {
      if (row && rows.stride_col == 1 && c + kDepth <= rows.cols && factor == 1.0f) {  // as it is
        v32h x;
        std::memcpy(&x, row + 2 * c, sizeof x);
        std::memcpy(to, &x, sizeof x);
        return finder.see(x);
      }
    }
    constexpr AnyLoader load{};
    vf a{}, b{};
    if (row && c < rows.cols) a = load(rows, r, c) * factor;
    if (row && c + W < rows.cols) b = load(rows, r, c + W) * factor;
    store_parts<kParts>(to, distance, a, b);
    if constexpr (kParts == 1)
      finder.see(to_bf16_pair(a, b));
    else
      finder.see(a), finder.see(b);
  }

  static bool pack_q(const RowList& rows, float factor, char* to) {
    const int64_t d = pad_to(rows.cols, kDepth), padded = pad_to(rows.rows, kTiledRows);
    PartlessFinder finder;
    for (int64_t r = 0; r < padded; ++r)
      for (int64_t c = 0; c < d; c += kDepth)
        load_parts(rows, r, c, factor, reinterpret_cast<bf16*>(to) + r * d + c, padded * d, finder);
    return finder.found();
  }

  /// 16 keys x 32 columns at a time: each key is 16 pairs, and a tile is the transpose of 16 x 16 pairs.
  static bool pack_k(const RowList& rows, char* to, int64_t keys, int64_t first) {
    const int64_t d = pad_to(rows.cols, kDepth);
    PartlessFinder finder;
    for (int64_t r0 = 0; r0 < kTileKeys; r0 += kTile)
      for (int64_t c = 0; c < d; c += kDepth) {
        alignas(64) bf16 lines[kParts][kTileSize];
        for (int64_t r = 0; r < kTile; ++r) load_parts(rows, r0 + r, c, 1.0f, lines[0] + r * kDepth, kTileSize, finder);
        for (int part = 0; part < kParts; ++part) {
          vf x[W];
          for (int i = 0; i < W; ++i) x[i] = load(reinterpret_cast<const float*>(lines[part] + i * kDepth));
          transpose(x);
          bf16* const tile = reinterpret_cast<bf16*>(to) + part * keys * d + (first + r0) * d + c * kTile;
          for (int i = 0; i < W; ++i) store(reinterpret_cast<float*>(tile + i * kDepth), x[i]);
        }
      }
    return finder.found();
  }

  /// Two keys interleaved, two tiles of 16 columns at a time.
  static bool pack_v(const RowList& rows, char* to, int64_t keys, int64_t first) {
    const int64_t d = pad_to(rows.cols, kTile);
    PartlessFinder finder;
    for (int64_t r = 0; r < kTileKeys; r += 2)
      for (int64_t c = 0; c < d; c += kDepth) {
        alignas(64) bf16 even[kParts][kDepth], odd[kParts][kDepth];
        load_parts(rows, r, c, 1.0f, even[0], kDepth, finder);
        load_parts(rows, r + 1, c, 1.0f, odd[0], kDepth, finder);
        for (int part = 0; part < kParts; ++part) {
          bf16* const line = reinterpret_cast<bf16*>(to) + part * keys * d + c * keys + first * kTile + r * kTile;
          interleave<0>(even[part], odd[part], line);
          if (c + kTile < d) interleave<kTile>(even[part], odd[part], line + kTile * keys);
        }
      }
    return finder.found();
  }

  /// A score tile: rows [r0, r0 + rows) against keys [first, first + n).
  struct Item {
    int64_t block, r0, rows, first, n;
    bool partial;
  };
  /// What an item leaves from one stage to the next; two take turns.
  struct Buffer {
    float* s;  // (32, lds): scores, then p
    float base[kTiledRows], rescale[kTiledRows];
  };
  static constexpr int64_t lds = kTiledKeys + W;  // off the power of two: rows must not share L1 sets

  /// The next score tile that holds a visible key, from block `block` and row r0 on; rows 0: there is none.
  static Item next_item(const AttendTask& t, int64_t block, int64_t r0) {
    for (; block < t.keys; block += kTiledKeys, r0 = 0) {
      const int64_t block_end = block + kTiledKeys < t.keys ? block + kTiledKeys : t.keys;
      for (; r0 < t.rows; r0 += kTiledRows) {
        const int64_t rows = t.rows - r0 < kTiledRows ? t.rows - r0 : kTiledRows;
        const auto [first, last, partial] = seen_by<kTileKeys, kTileKeys>(t.lo + r0, t.hi + r0, rows, block, block_end);
        if (last > first) return {block, r0, rows, first, last - first, partial};
      }
    }
    return {};
  }

  static TileSweep scores(const AttendTask& t, const Item& x, const Buffer& to) {
    const int64_t d = pad_to(t.headdim, kDepth);
    return {.a = reinterpret_cast<const bf16*>(t.q) + x.r0 * d,
            .lda = d,
            .a_step = kDepth,
            .a_part = pad_to(t.rows, kTiledRows) * d,
            .b = reinterpret_cast<const bf16*>(t.k) + x.first * d,
            .b_column = kTile * d,
            .b_part = t.keys * d,
            .c = to.s,
            .ldc = lds,
            .steps = d / kDepth,
            .columns = x.n / kTile,
            .pairs = &kScorePairs[kParts - 1],
            .two_rows = x.rows > kTile,
            .add = false};
  }

  /// Scales what was summed before, then adds p . v.
  static TileSweep output(const AttendTask& t, const Item& x, const Buffer& from) {
    const int64_t d = pad_to(t.headdim_v, kTile);
    float* const o = t.o + x.r0 * d;
    for (int64_t r = 0; r < x.rows; ++r) {
      if (from.rescale[r] == 1.0f) continue;
      for (int64_t c = 0; c < d; c += W) store(o + r * d + c, load(o + r * d + c) * from.rescale[r]);
    }
    return {.a = reinterpret_cast<const bf16*>(from.s),
            .lda = 2 * lds,
            .a_step = 2 * kDepth,
            .a_part = kDepth,
            .b = reinterpret_cast<const bf16*>(t.v) + x.first * kTile,
            .b_column = kTile * t.keys,
            .b_part = t.keys * d,
            .c = o,
            .ldc = d,
            .steps = x.n / kDepth,
            .columns = d / kTile,
            .pairs = &kOutputPairs[kParts - 1],
            .two_rows = x.rows > kTile,
            .add = true};
  }

  /// p of the item before and q of the item after, a unit now and then, evenly over `calls` calls.
  struct Background {
    TileStream<> stream;
    TileSweep after{};
    bool has_after = false;
    int64_t units = 0, calls = 1, credit = 0;

    FLASH_ATTN_INLINE void turn() {
      for (credit += units; credit >= calls; credit -= calls) work();
    }
    FLASH_ATTN_INLINE void work() {
      if (!stream.busy()) {
        if (!has_after) return;
        stream.start(after);
        has_after = false;
      }
      stream.unit();
    }
    void finish() {
      while (stream.busy() || has_after) work();
    }
  };

  /// 32 scores become 32 times two parts, in the same 128 bytes.
  struct InPlace {
    float* s;
    Background& background;
    FLASH_ATTN_INLINE void operator()(int64_t j, vf a, vf b) const {
      store_two_parts(reinterpret_cast<bf16*>(s + j), kDepth, a, b);
      background.turn();
    }
  };

  /// Three stages in a pipeline: while the vector units take the exponentials of one item, the tile unit multiplies p
  /// of the item before and q of the item after. Items are finished in order, so sums have one order.
  template <bool kDrops>
  __attribute__((noinline)) static void attend(const AttendTask& t) {
    float* const memory = reinterpret_cast<float*>(t.scratch);
    Buffer buffers[2] = {{memory, {}, {}}, {memory + kTiledRows * lds, {}, {}}};
    begin_tiles();
    Background background;
    Item before{}, now = next_item(t, 0, 0);
    if (now.rows > 0) background.stream.start(scores(t, now, buffers[0]));
    background.finish();
    for (int turn = 0; now.rows > 0; turn ^= 1) {
      Buffer &mine = buffers[turn], &other = buffers[turn ^ 1];
      const Item after = next_item(t, now.block, now.r0 + kTiledRows);
      float scale = 1.0f;
      for (int64_t r = 0; r < now.rows; ++r)
        scale = score_row(t, now.r0 + r, mine.s + r * lds, now.first, now.n, now.partial);
      raise_maxima(mine.s, lds, now.rows, now.n, scale, t.m + now.r0, mine.base, mine.rescale);
      background.units = 0, background.credit = 0, background.calls = now.rows * now.n / (2 * W);
      if (before.rows > 0) {
        const TileSweep sweep = output(t, before, other);
        background.units += sweep.units();
        background.stream.start(sweep);
      }
      background.has_after = after.rows > 0;
      if (background.has_after) {
        background.after = scores(t, after, other);
        background.units += background.after.units();
      }
      for (int64_t r = 0; r < now.rows; ++r) {
        if (r < after.rows) prefetch_bias(t.bias, after.r0 + r, 1, after.first, after.first + after.n);
        float* const row = mine.s + r * lds;
        exponentials_kept<kDrops, kTiledKeys>(
            t.dropout, now.r0 + r, now.first, row, now.n, is_huge(mine.base[r]) ? scale_row(row, now.n, scale) : scale,
            mine.base[r], mine.rescale[r], t.l + (now.r0 + r) * W, InPlace{row, background});
      }
      background.finish();
      before = now, now = after;
      if (now.rows == 0) background.stream.start(output(t, before, mine));
    }
    background.finish();
    end_tiles();
    // All at once: between rows, where exponentials and tile products share the ports, asking costs 5 % and more.
    Asker(t.ahead, t.aheads, 1).finish();
  }

  static void attend_any(const AttendTask& t) { t.dropout.threshold == 0 ? attend<false>(t) : attend<true>(t); }

  static constexpr AttendKernel kernel(const char* name) {
    return {.name = name,
            .panel = kTileKeys,
            .tile_rows = kTiledRows,
            .tile_keys = kTiledKeys,
            .scratch = 2 * kTiledRows * lds * 4,
            .q_bytes = q_bytes,
            .k_bytes = k_bytes,
            .v_bytes = v_bytes,
            .pack_q = pack_q,
            .pack_k = pack_k,
            .pack_v = pack_v,
            .attend = attend_any,
            .attend_in_place = nullptr,
            .plain_only = true};
  }
};

}  // namespace flash_attn::cpu::FLASH_ATTN_ISA
