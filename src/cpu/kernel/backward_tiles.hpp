// The backward on AMX tiles, for numbers of kParts bf16 parts. The same loop as backward.hpp; what differs:
//
//   q, dout  [part][rows][cols padded to 32]               operand A of x and u
//            [part][cols padded to 16][rows], transposed   operand A of dk^T and dv^T: pairs of rows (i, i + 16) of 32
//   k, v     as k of attend_tiles.hpp                      operand B of x and u
//   k        as v of attend_tiles.hpp                      operand B of dq
//   p, dx    [rows i, i + 16][keys], pairs in a lane       operand B of dv^T and dk^T; the parts take the place of
//                                                          the two rows that they are made of
//   dx       [row][keys / 32][2 parts][32]                 operand A of dq
//
// dk and dv are summed transposed, [cols padded to 16][keys], so that nothing is transposed but q and dout, when they
// are packed. p and dx have two parts, more than 16 bits.
//
// Cycles for 16 scores, a tile product taking 16: d N / 32 with N products of parts in all, bf16: 1 + 1 + 2 + 2 + 2,
// fp16: 4 + 4 + 3 + 3 + 3; about 20 for p, dx and their parts; and tiles of dk, dv and dq to load and store, once for
// every 64 rows (dq: 128 keys).

namespace flash_attn::cpu::FLASH_ATTN_ISA {

inline constexpr int64_t kBackwardTiledRows = 64;
inline constexpr int64_t kBackwardTiledKeys = 128;

template <int kParts>
struct BackwardTiles {
  using Forward = Tiles<kParts>;
  static constexpr int64_t lds = kBackwardTiledKeys + W;  // off the power of two: rows must not share L1 sets

  /// The packs of q and dout: where each begins, in elements.
  struct Queries {
    int64_t rows, d, dv;  // columns padded to 32
    int64_t q() const { return 0; }
    int64_t dout() const { return q() + kParts * rows * d; }
    int64_t q_transposed() const { return dout() + kParts * rows * dv; }
    int64_t dout_transposed() const { return q_transposed() + kParts * rows * d; }
    int64_t end() const { return dout_transposed() + kParts * rows * dv; }
  };
  static Queries queries(int64_t rows, int64_t headdim, int64_t headdim_v) {
    return {rows, pad_to(headdim, kDepth), pad_to(headdim_v, kDepth)};
  }
  /// The packs of k and v, in bytes.
  struct Keys {
    int64_t k_bytes, v_bytes, k_rows_bytes;
    int64_t v() const { return k_bytes; }
    int64_t k_rows() const { return v() + v_bytes; }
    int64_t end() const { return k_rows() + k_rows_bytes; }
  };
  static Keys keys(int64_t n, int64_t headdim, int64_t headdim_v) {
    return {Forward::k_bytes(n, headdim), Forward::k_bytes(n, headdim_v), Forward::v_bytes(n, headdim)};
  }

  static int64_t query_bytes(int64_t rows, int64_t headdim, int64_t headdim_v) {
    return 2 * queries(rows, headdim, headdim_v).end();
  }
  static int64_t key_bytes(int64_t n, int64_t headdim, int64_t headdim_v) { return keys(n, headdim, headdim_v).end(); }

  static bool pack_keys(const RowList& k, const RowList& v, char* to, int64_t n, int64_t first) {
    const Keys at = keys(n, k.cols, v.cols);
    const bool special_k = Forward::pack_k(k, to, n, first), special_v = Forward::pack_k(v, to + at.v(), n, first);
    return Forward::pack_v(k, to + at.k_rows(), n, first) || special_k || special_v;
  }

  static bool pack_queries(const RowList& q, const RowList& dout, float factor, char* to, int64_t row_capacity,
                           int64_t first) {
    const Queries at = queries(row_capacity, q.cols, dout.cols);
    bf16* const all = reinterpret_cast<bf16*>(to);
    const bool special = pack_rows(q, factor, all + at.q(), all + at.q_transposed(), row_capacity, first);
    return pack_rows(dout, 1.0f, all + at.dout(), all + at.dout_transposed(), row_capacity, first) || special;
  }

  /// Rows [first, first + 64) as they are and transposed, 32 rows x 32 columns at a time.
  static bool pack_rows(const RowList& rows, float factor, bf16* straight, bf16* transposed, int64_t row_capacity,
                        int64_t first) {
    const int64_t d = pad_to(rows.cols, kDepth), part_size = row_capacity * d;
    PartlessFinder finder;
    for (int64_t r0 = 0; r0 < kBackwardTiledRows; r0 += kDepth)
      for (int64_t c = 0; c < d; c += kDepth) {
        bf16* const block = straight + (first + r0) * d + c;
        for (int64_t r = 0; r < kDepth; ++r)
          Forward::load_parts(rows, r0 + r, c, factor, block + r * d, part_size, finder);
        for (int part = 0; part < kParts; ++part) {
          const bf16* const from = block + part * part_size;
          transpose_pairs<0>(from, d, transposed + part * part_size + c * row_capacity + first + r0, row_capacity);
          transpose_pairs<kTile>(from, d, transposed + part * part_size + (c + kTile) * row_capacity + first + r0,
                                 row_capacity);
        }
      }
    return finder.found();
  }
  /// Columns [kFrom, kFrom + 16) of 32 rows: column c -> to + c * ld, the pairs of rows (i, i + 16).
  template <int kFrom>
  static void transpose_pairs(const bf16* from, int64_t d, bf16* to, int64_t ld) {
    vf x[W];
    for (int i = 0; i < W; ++i) {
      alignas(64) bf16 line[kDepth];
      interleave<kFrom>(from + i * d, from + (i + kTile) * d, line);
      x[i] = load(reinterpret_cast<const float*>(line));
    }
    transpose(x);
    for (int i = 0; i < W; ++i) store(reinterpret_cast<float*>(to + i * ld), x[i]);
  }

  /// Rows [r0, r0 + rows) against keys [first, first + n).
  struct Item {
    int64_t r0, rows, first, n;
    int64_t halves() const { return (rows + kDepth - 1) / kDepth; }
  };

  template <class Stream>
  static void run(const TileSweep& sweep) {
    Stream tiles;
    tiles.start(sweep);
    while (tiles.busy()) tiles.unit();
  }

  /// s (rows, lds) = a b^T, with a of q or dout and b of k or v; `cols` padded to 32.
  static void scores(const Item& x, const bf16* a, int64_t a_part, const char* b, int64_t b_part, int64_t cols,
                     float* s) {
    for (int64_t r = 0; r < x.rows; r += kDepth)
      run<TileStream<>>({.a = a + (x.r0 + r) * cols,
                         .lda = cols,
                         .a_step = kDepth,
                         .a_part = a_part,
                         .b = reinterpret_cast<const bf16*>(b) + x.first * cols,
                         .b_column = kTile * cols,
                         .b_part = b_part,
                         .c = s + r * lds,
                         .ldc = lds,
                         .steps = cols / kDepth,
                         .columns = x.n / kTile,
                         .pairs = &kScorePairs[kParts - 1],
                         .two_rows = x.rows - r > kTile,
                         .add = false});
  }

  /// sums (cols, keys) += a^T p, with a of q or dout, transposed, and p of p or dx, in pairs of rows.
  static void key_sums(const BackwardTask& t, const Item& x, const bf16* a, int64_t a_part, const float* p,
                       int64_t cols, float* sums) {
    for (int64_t c = 0; c < cols; c += kDepth)
      run<TileStream<2 * lds, kDepth * 2 * lds>>({.a = a + c * t.row_capacity + x.r0,
                                                  .lda = t.row_capacity,
                                                  .a_step = kDepth,
                                                  .a_part = a_part,
                                                  .b = reinterpret_cast<const bf16*>(p),
                                                  .b_column = 2 * kTile,
                                                  .b_part = 2 * kTile * lds,
                                                  .c = sums + c * t.keys + x.first,
                                                  .ldc = t.keys,
                                                  .steps = x.halves(),
                                                  .columns = x.n / kTile,
                                                  .pairs = &kKeySumPairs[kParts - 1],
                                                  .two_rows = cols - c > kTile,
                                                  .add = true});
  }

  /// dq (rows, ld) += dx k.
  static void query_sums(const BackwardTask& t, const Item& x, const bf16* dx, const char* k, float* dq) {
    const int64_t d = pad_to(t.headdim, kTile);
    for (int64_t r = 0; r < x.rows; r += kDepth)
      run<TileStream<>>({.a = dx + r * 2 * lds,
                         .lda = 2 * lds,
                         .a_step = 2 * kDepth,
                         .a_part = kDepth,
                         .b = reinterpret_cast<const bf16*>(k) + x.first * kTile,
                         .b_column = kTile * t.keys,
                         .b_part = t.keys * d,
                         .c = dq + (x.r0 + r) * d,
                         .ldc = d,
                         .steps = x.n / kDepth,
                         .columns = d / kTile,
                         .pairs = &kOutputPairs[kParts - 1],
                         .two_rows = x.rows - r > kTile,
                         .add = true});
  }

  /// p and dx of a score tile, in fp32, become the operands of the sums. Rows that pad it are 0.
  static void split(const Item& x, float* p, float* dx, bf16* dx_rows) {
    for (int64_t r = x.rows; r < x.halves() * kDepth; ++r)
      for (float* const all : {p, dx}) std::memset(all + r * lds, 0, static_cast<std::size_t>(x.n) * sizeof(float));
    for (int64_t r = 0; r < x.halves() * kDepth; ++r)
      for (int64_t j = 0; j < x.n; j += kDepth)
        store_two_parts(dx_rows + r * 2 * lds + 2 * j, kDepth, load(dx + r * lds + j), load(dx + r * lds + j + W));
    for (int64_t half = 0; half < x.halves(); ++half)
      for (int64_t i = half * kDepth; i < half * kDepth + kTile; ++i)
        for (float* const all : {p, dx}) pair_rows(all + i * lds, all + (i + kTile) * lds, x.n);
  }

  static void backward(const BackwardTask& t) {
    const Queries at = queries(t.row_capacity, t.headdim, t.headdim_v);
    const Keys packs = keys(t.keys, t.headdim, t.headdim_v);
    const auto* const q = reinterpret_cast<const bf16*>(t.queries);
    float* const p = reinterpret_cast<float*>(t.scratch);  // (64, lds)
    float* const dx = p + kBackwardTiledRows * lds;
    auto* const dx_rows = reinterpret_cast<bf16*>(dx + kBackwardTiledRows * lds);
    Asker asker(
        t.ahead, t.aheads,
        pad_to(t.rows, kRowsPerTurn) / kRowsPerTurn * (pad_to(t.keys, kBackwardTiledKeys) / kBackwardTiledKeys));
    begin_tiles();
    for (int64_t block = 0; block < t.keys; block += kBackwardTiledKeys) {
      const int64_t block_end = block + kBackwardTiledKeys < t.keys ? block + kBackwardTiledKeys : t.keys;
      for (int64_t r0 = 0; r0 < t.rows; r0 += kBackwardTiledRows) {
        const int64_t rows = t.rows - r0 < kBackwardTiledRows ? t.rows - r0 : kBackwardTiledRows;
        const auto [first, last, partial] = seen_by<kTileKeys, kTileKeys>(t.lo + r0, t.hi + r0, rows, block, block_end);
        if (last <= first) continue;
        const Item x{r0, rows, first, last - first};
        prefetch_bias(t.bias, r0, rows, first, last);
        scores(x, q + at.q(), at.rows * at.d, t.keys_packed, t.keys * at.d, at.d, p);
        scores(x, q + at.dout(), at.rows * at.dv, t.keys_packed + packs.v(), t.keys * at.dv, at.dv, dx);
        for (int64_t begin = 0; begin < rows; begin += kRowsPerTurn) {
          asker.turn();
          for (int64_t r = begin; r < begin + kRowsPerTurn && r < rows; ++r)
            gradient_row<kBackwardTiledKeys>(t, r0 + r, p + r * lds, dx + r * lds, first, x.n, partial);
        }
        split(x, p, dx, dx_rows);
        key_sums(t, x, q + at.dout_transposed(), at.rows * at.dv, p, pad_to(t.headdim_v, kTile), t.dv);
        key_sums(t, x, q + at.q_transposed(), at.rows * at.d, dx, pad_to(t.headdim, kTile), t.dk);
        query_sums(t, x, dx_rows, t.keys_packed + packs.k_rows(), t.dq);
      }
    }
    end_tiles();
    asker.finish();
  }

  /// [cols][keys] -> (keys, cols padded to the width)
  static void sum_rows(const float* sums, int64_t n, int64_t cols, float* rows) {
    const int64_t ld = pad_to(cols, W);
    for (int64_t c = 0; c < ld; c += W)
      for (int64_t j = 0; j < n; j += W) {
        vf x[W];
        for (int i = 0; i < W; ++i) x[i] = load(sums + (c + i) * n + j);
        transpose(x);
        for (int i = 0; i < W; ++i) store(rows + (j + i) * ld + c, x[i]);
      }
  }

  static constexpr BackwardKernel kernel(const char* name) {
    return {.name = name,
            .panel = kTileKeys,
            .tile_rows = kBackwardTiledRows,
            .tile_keys = kBackwardTiledKeys,
            .scratch = 3 * kBackwardTiledRows * lds * 4,
            .query_bytes = query_bytes,
            .key_bytes = key_bytes,
            .pack_queries = pack_queries,
            .pack_keys = pack_keys,
            .backward = backward,
            .sum_rows = sum_rows,
            .plain_only = true};
  }
};

}  // namespace flash_attn::cpu::FLASH_ATTN_ISA
