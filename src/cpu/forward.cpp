// Forward: for each wave of heads, pack keys and values, then attend row by row range.
#include <algorithm>
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
  int64_t b, hk;
  Sequence sequence;
  float* k_panels;
  float* v_strips;
  uint8_t* v_special;
  int64_t keys;  // padded to panels
};

/// Scratch of one worker, for tasks of plan.rows rows.
struct Scratch {
  float *q, *o, *l, *m, *slope, *factor, *scores;
  int64_t *lo, *hi, *position;
  const char **q_rows, **out_rows;

  Scratch(Arena& arena, const Problem& p, const Plan& plan, const Kernels& k)
      : q(arena.take<float>(plan.rows * p.headdim)),
        o(arena.take<float>(plan.rows * round_up(p.headdim_v, k.width))),
        l(arena.take<float>(plan.rows * k.width)),
        m(arena.take<float>(plan.rows)),
        slope(arena.take<float>(plan.rows)),
        factor(arena.take<float>(plan.rows)),
        scores(arena.take<float>(k.attend_scratch)),
        lo(arena.take<int64_t>(plan.rows)),
        hi(arena.take<int64_t>(plan.rows)),
        position(arena.take<int64_t>(plan.rows)),
        q_rows(arena.take<const char*>(plan.rows)),
        out_rows(arena.take<const char*>(plan.rows)) {}
};

/// Packs the P keys from `first` of a head.
void pack(const Problem& p, const Kernels& k, const Head& h, int64_t first) {
  const char* rows[64];
  const int64_t n = std::min(k.panel, h.sequence.seqlen_k - first);
  std::fill(rows, rows + k.panel, nullptr);
  key_rows(p, p.k, h.sequence, h.hk, first, n, rows);
  k.pack_panel({rows, k.panel, p.headdim, p.k.stride_col, p.dtype}, h.k_panels + first * p.headdim);
  key_rows(p, p.v, h.sequence, h.hk, first, n, rows);
  h.v_special[first / k.panel] =
      k.pack_strips({rows, k.panel, p.headdim_v, p.v.stride_col, p.dtype}, h.v_strips, h.keys, first);
}

/// The end of the softmax: o / l, and lse = ln 2 (m + log2 l), with a sink as one more logit of the denominator.
void finish_row(const Problem& p, const Kernels& k, const Scratch& s, int64_t r, int64_t batch, int64_t row,
                int64_t head) {
  double sum = 0;
  for (int64_t i = 0; i < k.width; ++i) sum += s.l[r * k.width + i];
  double m = s.m[r];
  float factor = sum == 0.0 ? 0.0f : static_cast<float>(1.0 / sum);
  double lse = sum == 0.0 ? p.empty_lse() : kLn2 * m + std::log(sum);
  if (p.scores.sink.present()) {
    const double sink = sink_logit(p.scores, head);
    const double top = sum == 0.0 ? sink : std::max(lse, sink);
    if (!(sink == -INFINITY)) {
      const double with_sink = top + std::log((sum == 0.0 ? 0.0 : std::exp(lse - top)) + std::exp(sink - top));
      factor = sum == 0.0 ? 0.0f : static_cast<float>(std::exp(kLn2 * m - with_sink));
      lse = with_sink;
    }
  }
  s.factor[r] = factor;
  if (p.lse.present()) *reinterpret_cast<float*>(p.lse.at(batch, row, head)) = static_cast<float>(lse);
}

void attend(const Problem& p, const Kernels& k, const Head& h, const AttendRange& range, const Scratch& s) {
  const Sequence& seq = h.sequence;
  const int64_t n = range.heads * range.rows;
  for (int64_t r = 0; r < n; ++r) {
    const int64_t head = range.head + r / range.rows, i = range.row + r % range.rows;
    const Interval seen = p.scores.mask.row(i, seq.seqlen_q, seq.seqlen_k);
    s.lo[r] = seen.lo;
    s.hi[r] = seen.hi;
    s.position[r] = i + seq.seqlen_k - seq.seqlen_q;
    s.slope[r] = static_cast<float>(p.scores.alibi_slope(h.b, head) * kLog2e);
    s.m[r] = -INFINITY;
    s.q_rows[r] = p.q.at(seq.q_batch, seq.q_row + i, head);
    s.out_rows[r] = p.out.at(seq.q_batch, seq.q_row + i, head);
  }
  const int64_t ldo = round_up(p.headdim_v, k.width);
  std::fill(s.o, s.o + n * ldo, 0.0f);
  std::fill(s.l, s.l + n * k.width, 0.0f);
  k.load_rows({s.q_rows, n, p.headdim, p.q.stride_col, p.dtype}, q_factor(p.scores), s.q, p.headdim);
  k.attend({
      .rows = n,
      .headdim = p.headdim,
      .headdim_v = p.headdim_v,
      .q = s.q,
      .k_panels = h.k_panels,
      .v_strips = h.v_strips,
      .keys = h.keys,
      .v_special = h.v_special,
      .lo = s.lo,
      .hi = s.hi,
      .softcap_log2 = softcap_log2(p.scores),
      .slope_log2 = p.scores.alibi ? s.slope : nullptr,
      .position = s.position,
      .o = s.o,
      .m = s.m,
      .l = s.l,
      .scratch = s.scores,
  });
  for (int64_t r = 0; r < n; ++r)
    finish_row(p, k, s, r, seq.q_batch, seq.q_row + range.row + r % range.rows, range.head + r / range.rows);
  k.store_rows({s.out_rows, n, p.headdim_v, p.out.stride_col, p.dtype}, s.factor, s.o, ldo);
}

struct Work {
  const Head* head;
  AttendRange range;
};

}  // namespace

void forward(const Problem& p, const Kernels& k) {
  clear_if_uncovered(p);
  const Plan plan = make_plan(p, k);
  const int workers = max_workers();
  Arena arena(static_cast<std::size_t>(plan.workspace_shared + workers * plan.workspace_per_worker));
  float* const packs = arena.take<float>(plan.heads_per_wave * plan.pack_floats);
  uint8_t* const special = arena.take<uint8_t>(plan.heads_per_wave * (plan.keys_padded / k.panel));
  std::vector<Scratch> scratch;
  for (int w = 0; w < workers; ++w) scratch.emplace_back(arena, p, plan, k);

  std::vector<Head> heads;
  std::vector<Work> work;
  const int64_t all_heads = p.batch * p.nheads_k;
  for (int64_t first = 0; first < all_heads; first += plan.heads_per_wave) {
    heads.clear();
    work.clear();
    for (int64_t i = first; i < std::min(first + plan.heads_per_wave, all_heads); ++i) {
      const Sequence s = p.sequences.at(i / p.nheads_k);
      if (s.empty()) continue;
      const int64_t slot = i - first, keys = round_up(s.seqlen_k, k.panel);
      float* const pack = packs + slot * plan.pack_floats;
      heads.push_back({i / p.nheads_k, i % p.nheads_k, s, pack, pack + keys * p.headdim,
                       special + slot * (plan.keys_padded / k.panel), keys});
    }
    // Chunks of packing of about a quarter of a million elements; the heads' offsets in chunks, by binary search.
    const int64_t chunk = std::max<int64_t>(1, (int64_t{1} << 18) / (k.panel * (p.headdim + p.headdim_v))) * k.panel;
    std::vector<int64_t> chunks_before(1, 0);
    for (const Head& h : heads) {
      chunks_before.push_back(chunks_before.back() + (h.sequence.seqlen_k + chunk - 1) / chunk);
      for (const AttendRange& r : attend_ranges(p, plan, h.hk, h.sequence.seqlen_q)) work.push_back({&h, r});
    }
    parallel_for(chunks_before.back(), workers, [&](int64_t i, int) {
      const auto next = std::upper_bound(chunks_before.begin(), chunks_before.end(), i);
      const Head& h = heads[static_cast<std::size_t>(next - chunks_before.begin() - 1)];
      const int64_t begin = (i - *(next - 1)) * chunk;
      for (int64_t j = begin; j < std::min(begin + chunk, h.sequence.seqlen_k); j += k.panel) pack(p, k, h, j);
    });
    parallel_for(static_cast<int64_t>(work.size()), workers, [&](int64_t i, int worker) {
      const Work& w = work[static_cast<std::size_t>(i)];
      attend(p, k, *w.head, w.range, scratch[static_cast<std::size_t>(worker)]);
    });
  }
}

}  // namespace flash_attn::cpu
