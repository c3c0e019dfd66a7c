// The register tile: C[MR][NR vectors] (+)= A[MR][K] . B[K][NR vectors], the only place where FLOPs happen.
//
// Per step of K: NR loads of B, MR broadcasts of A, MR * NR FMAs. Loads per FMA = 1 / MR + 1 / NR must stay below the
// machine's loads per FMA (1 on AVX-512 and AVX2 cores of today, with margin 0.5), accumulators above latency * ports
// (4 * 2), and MR * NR + NR + 1 within the registers:
//
//   registers  NR  MR   loads/FMA  accumulators
//          32   4   6       0.42            24
//          32   3   8       0.46            24
//          32   2  12       0.58            24     (columns left over)
//          16   2   6       0.67            12
//
// A is broadcast from memory with any two strides: row-major (scores, out, dq) and column-major (dk, dv) alike.

namespace flash_attn::cpu::FLASH_ATTN_ISA {

#if FLASH_ATTN_WIDTH == 16 || defined(__aarch64__)
inline constexpr int kRegisters = 32;
#else
inline constexpr int kRegisters = 16;
#endif
inline constexpr int kPanelVectors = kRegisters == 32 ? 4 : 2;  // NR of a full panel or strip
inline constexpr int kPanel = kPanelVectors * W;

constexpr int full_rows(int nr) { return kRegisters == 32 ? (nr == 4 ? 6 : nr == 3 ? 8 : 12) : (nr == 2 ? 6 : 12); }

inline constexpr int64_t kRowsPerTurn = 8;

/// Asks L2 for what is needed after this task (kernels.hpp), some lines a turn. Turns stand between products, about as
/// often as their number says; what they leave is asked for at the end.
///
/// A core has some 16 lines under way at once, and memory takes 100 ns and more to answer: 3 times 32 rows of 256
/// bytes, all asked for at once, would be waited for as long as if they were read. Between products the wait costs
/// nothing. A turn is a call, and a call leaves no vector in its register: a loop over rows of tiles takes one in
/// kRowsPerTurn rows, outside of the loop that holds constants.
class Asker {
 public:
  Asker(const Ahead* run, int64_t runs, int64_t turns) : run_(run), end_(run + runs) {
    for (const Ahead* x = run; x != end_; ++x) lines_ += x->rows * ((x->bytes + 63) / 64);
    lines_ = (lines_ + turns - 1) / (turns > 0 ? turns : 1);
  }
  __attribute__((noinline)) void turn() { ask(lines_); }
  void finish() { ask(INT64_MAX); }

 private:
  void ask(int64_t lines) {
    for (; lines > 0 && run_ != end_; --lines) {
      __builtin_prefetch(run_->first + row_ * run_->step + at_, 0, 2);
      if ((at_ += 64) < run_->bytes) continue;
      at_ = 0;
      if (++row_ >= run_->rows) row_ = 0, ++run_;
    }
  }

  const Ahead *run_, *end_;
  int64_t row_ = 0, at_ = 0, lines_ = 0;
};

/// A: element (r, k) at a[r * row_stride + k * k_stride].  B: row k at b + k * ldb.  C: row r at c + r * ldc.
struct Gemm {
  const float* a;
  int64_t a_row, a_k;
  const float* b;
  int64_t ldb;
  float* c;
  int64_t ldc;
  int64_t k;
  Asker* asker = nullptr;  // gets a turn before each tile
};

/// What happens to C: written, added to, or first scaled per row (an online softmax's old sum) and then added to.
enum class Into { store, add, scale_add };

template <int MR, int NR, Into kInto>
FLASH_ATTN_INLINE void tile(const Gemm& g, const float* row_scale) {
  vf acc[MR][NR];
#pragma GCC unroll 12
  for (int r = 0; r < MR; ++r)
#pragma GCC unroll 4
    for (int n = 0; n < NR; ++n) {
      if constexpr (kInto == Into::store) acc[r][n] = vf{};
      if constexpr (kInto == Into::add) acc[r][n] = load(g.c + r * g.ldc + n * W);
      if constexpr (kInto == Into::scale_add) acc[r][n] = load(g.c + r * g.ldc + n * W) * row_scale[r];
    }
  const float *a = g.a, *b = g.b;
#pragma GCC unroll 4
  for (int64_t k = 0; k < g.k; ++k, a += g.a_k, b += g.ldb) {
    vf bv[NR];
#pragma GCC unroll 4
    for (int n = 0; n < NR; ++n) bv[n] = load(b + n * W);
#pragma GCC unroll 12
    for (int r = 0; r < MR; ++r) {
      const vf av = all(a[r * g.a_row]);
#pragma GCC unroll 4
      for (int n = 0; n < NR; ++n) acc[r][n] += av * bv[n];
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < MR; ++r)
#pragma GCC unroll 4
    for (int n = 0; n < NR; ++n) store(g.c + r * g.ldc + n * W, acc[r][n]);
}

/// One tile of MR rows; then what is left of C, A and the scales begins after them.
template <int MR, int NR, Into kInto>
FLASH_ATTN_INLINE void tile_step(Gemm& g, int64_t& rows, const float*& row_scale) {
  if (g.asker) g.asker->turn();
  tile<MR, NR, kInto>(g, row_scale);
  g.a += MR * g.a_row, g.c += MR * g.ldc, rows -= MR;
  if constexpr (kInto == Into::scale_add) row_scale += MR;
}

/// `rows` rows of a tile NR vectors wide: full tiles, then 4, 2 and 1 rows.
template <int NR, Into kInto>
FLASH_ATTN_INLINE void tile_rows(Gemm g, int64_t rows, const float* row_scale) {
  constexpr int MR = full_rows(NR);
  while (rows >= MR) tile_step<MR, NR, kInto>(g, rows, row_scale);
  while (rows >= 4) tile_step<4, NR, kInto>(g, rows, row_scale);
  if (rows >= 2) tile_step<2, NR, kInto>(g, rows, row_scale);
  if (rows >= 1) tile_step<1, NR, kInto>(g, rows, row_scale);
}

/// The same for 1 <= vectors <= kPanelVectors.
template <Into kInto>
__attribute__((noinline)) void tile_rows(int64_t vectors, const Gemm& g, int64_t rows, const float* row_scale) {
  switch (vectors) {
    case 1: return tile_rows<1, kInto>(g, rows, row_scale);
    case 2: return tile_rows<2, kInto>(g, rows, row_scale);
#if FLASH_ATTN_WIDTH == 16 || defined(__aarch64__)
    case 3: return tile_rows<3, kInto>(g, rows, row_scale);
    case 4: return tile_rows<4, kInto>(g, rows, row_scale);
#endif
  }
}

/// C (rows, cols) (+)= A (rows, k) . strips of (rows_pad, cols), using rows [first, first + g.k) of the strips.
template <Into kInto>
FLASH_ATTN_INLINE void multiply_strips(Gemm g, int64_t rows, const float* strips, int64_t rows_pad, int64_t first,
                                       int64_t cols, const float* row_scale) {
  for (int64_t c = 0; c < cols; c += kPanel) {
    const int64_t vectors = (cols - c >= kPanel ? kPanel : cols - c + W - 1) / W;
    Gemm part = g;
    part.ldb = vectors * W;
    part.b = strips + c * rows_pad + first * part.ldb;
    part.c = g.c + c;
    tile_rows<kInto>(vectors, part, rows, row_scale);
  }
}

/// C (rows, keys [first, last)) = A (rows, depth) . panels^T; `first` is a panel's start, `last` is cut to vectors.
FLASH_ATTN_INLINE void multiply_panels(Gemm g, int64_t rows, const float* panels, int64_t first, int64_t last) {
  g.ldb = kPanel;
  for (int64_t j = first; j < last; j += kPanel, g.c += kPanel) {
    g.b = panels + j * g.k;
    tile_rows<Into::store>((last - j >= kPanel ? kPanel : last - j + W - 1) / W, g, rows, nullptr);
  }
}

}  // namespace flash_attn::cpu::FLASH_ATTN_ISA
