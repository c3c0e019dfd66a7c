// Forward: for each wave of heads, pack keys and values, then attend row by row range. Heads that the kernel of the
// dtype has to leave (special rows in a kernel of plain ones) are done again by the kernel that takes any.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <vector>

#include "cpu/arena.hpp"
#include "cpu/driver.hpp"
#include "cpu/plan.hpp"
#include "cpu/threads.hpp"

namespace flash_attn::cpu {
namespace {

/// One key head of one sequence, and where its packs are.
struct Head {
  int64_t index;  // batch entry * nheads_k + key head
  Sequence sequence;
  char *k, *v;
  uint8_t* v_special;
  int64_t keys;  // padded to panels
};

/// Scratch of one worker, for tasks of plan.rows rows.
struct Scratch {
  char *q, *tiles;
  float *o, *l, *m, *slope, *factor, *lse;
  int64_t *lo, *hi, *position;
  const char **q_rows, **out_rows;

  Scratch(Arena& arena, const Problem& p, const Plan& plan, const AttendKernel& kernel, int64_t width)
      : q(arena.take<char>(kernel.q_bytes(plan.rows, p.headdim))),
        tiles(arena.take<char>(kernel.scratch)),
        o(arena.take<float>(plan.rows * round_up(p.headdim_v, width))),
        l(arena.take<float>(plan.rows * width)),
        m(arena.take<float>(plan.rows)),
        slope(arena.take<float>(plan.rows)),
        factor(arena.take<float>(plan.rows)),
        lse(arena.take<float>(plan.rows)),
        lo(arena.take<int64_t>(plan.rows)),
        hi(arena.take<int64_t>(plan.rows)),
        position(arena.take<int64_t>(plan.rows)),
        q_rows(arena.take<const char*>(plan.rows)),
        out_rows(arena.take<const char*>(plan.rows)) {}
};

/// What all tasks of a pass over heads share.
struct Pass {
  const Problem& p;
  const Kernels& k;
  const AttendKernel& kernel;
  const Plan plan;
  std::vector<std::atomic<bool>> left;  // (heads of the wave): to be done again by another kernel
};

/// Packs the panel of keys from `first` of a head; returns whether the head must be left.
bool pack(const Pass& pass, const Head& h, int64_t first) {
  const Problem& p = pass.p;
  const AttendKernel& kernel = pass.kernel;
  const char* rows[64];
  const int64_t n = std::min(kernel.panel, h.sequence.seqlen_k - first), hk = h.index % p.nheads_k;
  std::fill(rows, rows + kernel.panel, nullptr);
  key_rows(p, p.k, h.sequence, hk, first, n, rows);
  const bool k_special = kernel.pack_k({rows, kernel.panel, p.headdim, p.k.stride_col, p.dtype}, h.k, h.keys, first);
  key_rows(p, p.v, h.sequence, hk, first, n, rows);
  const bool v_special = kernel.pack_v({rows, kernel.panel, p.headdim_v, p.v.stride_col, p.dtype}, h.v, h.keys, first);
  h.v_special[first / kernel.panel] = v_special;
  return kernel.plain_only && (k_special || v_special);
}

/// One more logit in the denominator of row r: 1 / (l + e^sink) = 1 / l / (1 + e^(sink - lse)).
void add_sink(const Scratch& s, int64_t r, double sink) {
  const double lse = s.lse[r], top = std::max(lse, sink), bottom = std::min(lse, sink);
  if (sink == -INFINITY) return;
  const double with_sink = top + std::log1p(std::exp(bottom - top));
  s.factor[r] *= static_cast<float>(std::exp(lse - with_sink));
  s.lse[r] = static_cast<float>(with_sink);
}

/// Attends and writes the rows of a range; returns whether the head must be left instead.
bool attend(const Pass& pass, const Head& h, const AttendRange& range, const Scratch& s) {
  const Problem& p = pass.p;
  const Kernels& k = pass.k;
  const Sequence& seq = h.sequence;
  const ScoreScale scale = score_scale(p.scores);
  const int64_t n = range.heads * range.rows, ldo = round_up(p.headdim_v, k.width);
  for (int64_t r = 0; r < n; ++r) {
    const int64_t head = range.head + r / range.rows, i = range.row + r % range.rows;
    const Interval seen = p.scores.mask.row(i, seq.seqlen_q, seq.seqlen_k);
    s.lo[r] = seen.lo;
    s.hi[r] = seen.hi;
    s.position[r] = i + seq.seqlen_k - seq.seqlen_q;
    s.slope[r] = static_cast<float>(p.scores.alibi_slope(h.index / p.nheads_k, head) * kLog2e);
    s.m[r] = -INFINITY;
    s.q_rows[r] = p.q.at(seq.q_batch, seq.q_row + i, head);
    s.out_rows[r] = p.out.at(seq.q_batch, seq.q_row + i, head);
  }
  std::fill(s.o, s.o + n * ldo, 0.0f);
  std::fill(s.l, s.l + n * k.width, 0.0f);
  const bool special = pass.kernel.pack_q({s.q_rows, n, p.headdim, p.q.stride_col, p.dtype}, scale.sign, s.q);
  if (special && pass.kernel.plain_only) return true;
  pass.kernel.attend({
      .rows = n,
      .headdim = p.headdim,
      .headdim_v = p.headdim_v,
      .q = s.q,
      .k = h.k,
      .v = h.v,
      .keys = h.keys,
      .v_special = h.v_special,
      .lo = s.lo,
      .hi = s.hi,
      .scale = scale.scale,
      .softcap_log2 = scale.softcap_log2,
      .slope_log2 = p.scores.alibi ? s.slope : nullptr,
      .position = s.position,
      .o = s.o,
      .m = s.m,
      .l = s.l,
      .scratch = s.tiles,
  });
  k.finish_rows(n, s.m, s.l, s.factor, s.lse);
  for (int64_t r = 0; r < n; ++r) {
    const int64_t head = range.head + r / range.rows, row = seq.q_row + range.row + r % range.rows;
    if (p.scores.sink.present()) add_sink(s, r, sink_logit(p.scores, head));
    if (p.lse.present())
      *reinterpret_cast<float*>(p.lse.at(seq.q_batch, row, head)) = s.lse[r] == -INFINITY ? p.empty_lse() : s.lse[r];
  }
  k.store_rows({s.out_rows, n, p.headdim_v, p.out.stride_col, p.dtype}, s.factor, s.o, ldo);
  return false;
}

struct Work {
  std::size_t head;
  AttendRange range;
};

/// The forward of the heads listed by index; returns those that the kernel leaves.
std::vector<int64_t> attend_heads(const Problem& p, const Kernels& k, const AttendKernel& kernel,
                                  const std::vector<int64_t>& indices) {
  Pass pass{p, k, kernel, make_plan(p, kernel, k.width), {}};
  const Plan& plan = pass.plan;
  const int workers = max_workers();
  Arena arena(static_cast<std::size_t>(plan.workspace_shared + workers * plan.workspace_per_worker));
  char* const packs = arena.take<char>(plan.heads_per_wave * plan.pack_bytes);
  uint8_t* const special = arena.take<uint8_t>(plan.heads_per_wave * (plan.keys_padded / kernel.panel));
  std::vector<Scratch> scratch;
  for (int w = 0; w < workers; ++w) scratch.emplace_back(arena, p, plan, kernel, k.width);

  std::vector<Head> heads;
  std::vector<Work> work;
  std::vector<int64_t> left;
  const auto count = static_cast<int64_t>(indices.size());
  for (int64_t first = 0; first < count; first += plan.heads_per_wave) {
    heads.clear();
    work.clear();
    for (int64_t i = first; i < std::min(first + plan.heads_per_wave, count); ++i) {
      const int64_t index = indices[static_cast<std::size_t>(i)], slot = i - first;
      const Sequence s = p.sequences.at(index / p.nheads_k);
      char* const pack = packs + slot * plan.pack_bytes;
      heads.push_back({index, s, pack, pack + plan.k_bytes, special + slot * (plan.keys_padded / kernel.panel),
                       round_up(s.seqlen_k, kernel.panel)});
    }
    // Chunks of packing of about 2^15 elements, 5 us each: few heads must do for many workers. The heads' offsets in
    // chunks are found by binary search.
    const int64_t chunk =
        std::max<int64_t>(1, (int64_t{1} << 15) / (kernel.panel * (p.headdim + p.headdim_v))) * kernel.panel;
    std::vector<int64_t> chunks_before(1, 0);
    for (std::size_t i = 0; i < heads.size(); ++i) {
      const Sequence& s = heads[i].sequence;
      chunks_before.push_back(chunks_before.back() + (s.seqlen_k + chunk - 1) / chunk);
      for (const AttendRange& r : attend_ranges(p, plan, heads[i].index % p.nheads_k, s.seqlen_q))
        work.push_back({i, r});
    }
    pass.left = std::vector<std::atomic<bool>>(heads.size());
    parallel_for(chunks_before.back(), workers, [&](int64_t i, int) {
      const auto next = std::upper_bound(chunks_before.begin(), chunks_before.end(), i);
      const auto at = static_cast<std::size_t>(next - chunks_before.begin() - 1);
      const Head& h = heads[at];
      const int64_t begin = (i - *(next - 1)) * chunk;
      for (int64_t j = begin; j < std::min(begin + chunk, h.sequence.seqlen_k); j += kernel.panel)
        if (pack(pass, h, j)) pass.left[at] = true;
    });
    parallel_for(static_cast<int64_t>(work.size()), workers, [&](int64_t i, int worker) {
      const Work& w = work[static_cast<std::size_t>(i)];
      if (!pass.left[w.head] && attend(pass, heads[w.head], w.range, scratch[static_cast<std::size_t>(worker)]))
        pass.left[w.head] = true;
    });
    for (std::size_t i = 0; i < heads.size(); ++i)
      if (pass.left[i]) left.push_back(heads[i].index);
  }
  return left;
}

}  // namespace

void forward(const Problem& p, const Kernels& k) {
  clear_if_uncovered(p);
  std::vector<int64_t> heads;
  for (int64_t b = 0; b < p.batch; ++b) {
    if (p.sequences.at(b).empty()) continue;
    for (int64_t hk = 0; hk < p.nheads_k; ++hk) heads.push_back(b * p.nheads_k + hk);
  }
  const std::vector<int64_t> left = attend_heads(p, k, attend_kernel(k, p.dtype), heads);
  if (!left.empty()) attend_heads(p, k, *k.attend_any, left);
}

}  // namespace flash_attn::cpu
