// Backward: one task per (sequence, key head, split of its keys). A task owns the dk and dv of its keys; it goes
// through the query heads of the group one after the other, so nothing is shared while it runs.
//
// dq gets a contribution from every split. One split: the task writes dq itself. Several: each fills a partial of its
// own, and they are summed in the order of the splits. dbias is added to where it lies, and tasks that add to the same
// elements take turns (plan.hpp). Either way the sums have one order, whatever the threads.
#include <algorithm>
#include <cmath>
#include <utility>
#include <vector>

#include "cpu/arena.hpp"
#include "cpu/driver.hpp"
#include "cpu/plan.hpp"
#include "cpu/threads.hpp"

namespace flash_attn::cpu {
namespace {

constexpr int64_t kRun = 64;  // rows found and moved at a time: a panel, or a group

/// Scratch of one worker: one split of keys, and plan.rows queries of one head.
struct Scratch {
  float *k_panels, *v_panels, *k_strips, *dk, *dv;
  float *q, *dout, *dq, *base, *delta, *slope, *tiles;
  int64_t *lo, *hi, *position;
  uint8_t *k_special, *row_special;
  const char** bias;
  float** dbias;
  DropoutRow* dropped;

  Scratch(Arena& a, const Problem& p, const BackwardPlan& plan, const Kernels& k) {
    const int64_t keys = plan.keys_per_split, rows = plan.rows;
    const int64_t d = round_up(p.headdim, k.width), dv_cols = round_up(p.headdim_v, k.width);
    k_panels = a.take<float>(keys * p.headdim), v_panels = a.take<float>(keys * p.headdim_v);
    k_strips = a.take<float>(keys * d), dk = a.take<float>(keys * d), dv = a.take<float>(keys * dv_cols);
    q = a.take<float>(rows * d), dout = a.take<float>(rows * dv_cols), dq = a.take<float>(rows * d);
    base = a.take<float>(rows), delta = a.take<float>(rows), slope = a.take<float>(rows);
    tiles = a.take<float>(k.backward_scratch);
    lo = a.take<int64_t>(rows), hi = a.take<int64_t>(rows), position = a.take<int64_t>(rows);
    k_special = a.take<uint8_t>(keys / k.panel), row_special = a.take<uint8_t>(rows / k.backward_group);
    bias = a.take<const char*>(rows), dbias = a.take<float*>(rows), dropped = a.take<DropoutRow>(rows);
  }
};

void pack_keys(const Problem& p, const Kernels& k, const Sequence& seq, int64_t hk, int64_t begin, int64_t end,
               const Scratch& s) {
  const char* rows[kRun];
  const int64_t keys = round_up(end - begin, k.panel);
  for (int64_t j = 0; j < keys; j += k.panel) {
    const int64_t n = std::min(k.panel, end - begin - j);
    std::fill(rows, rows + k.panel, nullptr);
    key_rows(p, p.k, seq, hk, begin + j, n, rows);
    const RowList key_list{rows, k.panel, p.headdim, p.k.stride_col, p.dtype};
    k.pack_panel(key_list, s.k_panels + j * p.headdim);
    s.k_special[j / k.panel] = k.pack_strips(key_list, s.k_strips, keys, j);
    key_rows(p, p.v, seq, hk, begin + j, n, rows);
    k.pack_panel({rows, k.panel, p.headdim_v, p.v.stride_col, p.dtype}, s.v_panels + j * p.headdim_v);
  }
}

/// Rows [first, first + n) of q's batch entry, as a list over `rows`.
RowList query_rows(const Operand& x, const Sequence& seq, int64_t head, int64_t first, int64_t n, int64_t cols,
                   const char** rows) {
  for (int64_t r = 0; r < n; ++r) rows[r] = x.at(seq.q_batch, seq.q_row + first + r, head);
  return {rows, n, cols, x.stride_col, x.dtype};
}

/// Brings rows [begin, end) of one head into the scratch.
void load_queries(const Problem& p, const Kernels& k, const Sequence& seq, int64_t head, int64_t begin, int64_t end,
                  const Scratch& s) {
  const char* rows[kRun];
  const int64_t d = round_up(p.headdim, k.width), dv_cols = round_up(p.headdim_v, k.width);
  const float sign = score_scale(p.scores).sign;
  if (d > p.headdim) std::fill(s.q, s.q + (end - begin) * d, 0.0f);  // what no column fills
  if (dv_cols > p.headdim_v) std::fill(s.dout, s.dout + (end - begin) * dv_cols, 0.0f);
  for (int64_t i = begin, r = 0; i < end; i += k.backward_group, r += k.backward_group) {
    const int64_t n = std::min(k.backward_group, end - i);
    float* const dout = s.dout + r * dv_cols;
    const bool special_q = k.load_rows(query_rows(p.q, seq, head, i, n, p.headdim, rows), sign, s.q + r * d, d);
    const bool special_dout = k.load_rows(query_rows(p.dout, seq, head, i, n, p.headdim_v, rows), 1.0f, dout, dv_cols);
    s.row_special[r / k.backward_group] = special_q || special_dout;
    k.dot_rows(query_rows(p.out, seq, head, i, n, p.headdim_v, rows), dout, dv_cols, s.delta + r);
    for (int64_t j = 0; j < n; ++j) {
      const float lse = *reinterpret_cast<const float*>(p.lse.at(seq.q_batch, seq.q_row + i + j, head));
      s.base[r + j] = std::isinf(lse) ? INFINITY : static_cast<float>(lse * kLog2e);
      if (p.dlse.present())
        s.delta[r + j] -= *reinterpret_cast<const float*>(p.dlse.at(seq.q_batch, seq.q_row + i + j, head));
    }
  }
}

/// d loss / d sink of `rows` rows of one head: the sink is a key without a value, so u = -delta.
double sink_gradient(const Problem& p, int64_t head, int64_t rows, const Scratch& s) {
  const double sink = sink_logit(p.scores, head) * kLog2e;
  double sum = 0;
  for (int64_t r = 0; r < rows; ++r) {
    const double probability = std::exp2(sink - s.base[r]);
    if (probability > 0) sum -= probability * s.delta[r];
  }
  return sum;
}

/// The same for queries without keys: the sink has probability 1 and out is 0, so only dlse reaches it.
double sink_gradient_without_keys(const Problem& p, const Sequence& seq, int64_t head) {
  double sum = 0;
  for (int64_t i = 0; p.dlse.present() && i < seq.seqlen_q; ++i)
    sum += *reinterpret_cast<const float*>(p.dlse.at(seq.q_batch, seq.q_row + i, head));
  return sum;
}

template <class FindRow>
void store_all(const Kernels& k, int64_t n, int64_t cols, int64_t stride_col, DType dtype, float factor,
               const float* src, int64_t ld, const FindRow& find) {
  const char* rows[kRun];
  float factors[kRun];
  std::fill(factors, factors + kRun, factor);
  for (int64_t r = 0; r < n; r += kRun) {
    const int64_t m = std::min(kRun, n - r);
    for (int64_t i = 0; i < m; ++i) rows[i] = find(r + i);
    k.store_rows({rows, m, cols, stride_col, dtype}, factors, src + r * ld, ld);
  }
}

/// Rows [begin, end) of dq, from `dq`.
void store_dq(const Problem& p, const Kernels& k, const Sequence& seq, int64_t head, int64_t begin, int64_t end,
              const float* dq) {
  store_all(k, end - begin, p.headdim, p.dq.stride_col, p.dtype, static_cast<float>(p.scores.scale), dq,
            round_up(p.headdim, k.width), [&](int64_t i) { return p.dq.at(seq.q_batch, seq.q_row + begin + i, head); });
}

struct Task {
  int64_t b, hk, split;
  Sequence sequence;
  float* dq_partials;  // (splits, group, max_seqlen_q, d) of this key head; nullptr with one split
};

/// What rows [begin, end) of a head see of the keys from `first_key` on, and the terms of their scores. Of a row that
/// has no lse nothing is seen: a bias may hide what the mask does not.
void place_rows(const Problem& p, const Task& t, int64_t head, int64_t first_key, int64_t begin, int64_t end,
                const Scratch& s) {
  const Sequence& seq = t.sequence;
  const Operand& bias = p.scores.bias;
  const float slope = static_cast<float>(p.scores.alibi_slope(t.b, head) * kLog2e);
  for (int64_t i = begin, r = 0; i < end; ++i, ++r) {
    const Interval seen = p.scores.mask.row(i, seq.seqlen_q, seq.seqlen_k);
    s.lo[r] = seen.lo - first_key;
    s.hi[r] = s.base[r] == INFINITY ? s.lo[r] : seen.hi - first_key;
    s.position[r] = i + seq.seqlen_k - seq.seqlen_q - first_key;
    s.slope[r] = slope;
    s.dropped[r] = {static_cast<uint32_t>(i), static_cast<uint32_t>(t.b * p.nheads + head)};
    if (bias.present())
      s.bias[r] = bias.at(t.b, i, head) + first_key * bias.stride_col * static_cast<int64_t>(size_of(bias.dtype));
    if (p.dbias.present())
      s.dbias[r] = reinterpret_cast<float*>(p.dbias.at(t.b, i, head)) + first_key * p.dbias.stride_col;
  }
}

/// Queries that see a key of [begin, end), and those between them.
Interval queries_of(const Problem& p, const Sequence& seq, int64_t begin, int64_t end) {
  Interval rows{seq.seqlen_q, 0};
  for (int64_t i = 0; i < seq.seqlen_q; ++i) {
    const Interval seen = p.scores.mask.row(i, seq.seqlen_q, seq.seqlen_k);
    if (seen.empty() || seen.hi <= begin || seen.lo >= end) continue;
    rows = {std::min(rows.lo, i), i + 1};
  }
  return rows.empty() ? Interval{0, 0} : rows;
}

/// Adds what rows [begin, end) of a head do to dk and dv, and computes their dq (rows, d).
void attend_back(const Problem& p, const Kernels& k, const Task& t, int64_t head, int64_t begin, int64_t end,
                 int64_t first_key, int64_t keys, const Scratch& s, float* dq) {
  const ScoreScale scale = score_scale(p.scores);
  const int64_t rows = end - begin;
  std::fill(dq, dq + rows * round_up(p.headdim, k.width), 0.0f);
  place_rows(p, t, head, first_key, begin, end, s);
  k.backward({
      .rows = rows,
      .headdim = p.headdim,
      .headdim_v = p.headdim_v,
      .q = s.q,
      .dout = s.dout,
      .base = s.base,
      .delta = s.delta,
      .row_special = s.row_special,
      .k_panels = s.k_panels,
      .v_panels = s.v_panels,
      .k_strips = s.k_strips,
      .keys = keys,
      .k_special = s.k_special,
      .lo = s.lo,
      .hi = s.hi,
      .scale = scale.scale,
      .softcap_log2 = scale.softcap_log2,
      .slope_log2 = p.scores.alibi ? s.slope : nullptr,
      .position = s.position,
      .bias = bias_rows(p.scores, s.bias, rows, first_key),
      .dropout = dropout_task(p.scores.dropout, s.dropped, first_key),
      .dbias = p.dbias.present() ? s.dbias : nullptr,
      .dbias_stride = p.dbias.stride_col,
      .dq = dq,
      .dk = s.dk,
      .dv = s.dv,
      .scratch = s.tiles,
  });
}

void run(const Problem& p, const Kernels& k, const BackwardPlan& plan, const Task& t, const Scratch& s, double* dsink) {
  const Sequence& seq = t.sequence;
  const int64_t d = round_up(p.headdim, k.width), dv_cols = round_up(p.headdim_v, k.width);
  const int64_t begin = t.split * plan.keys_per_split, end = std::min(begin + plan.keys_per_split, seq.seqlen_k);
  const int64_t keys = round_up(std::max<int64_t>(end - begin, 0), k.panel);
  if (keys > 0) pack_keys(p, k, seq, t.hk, begin, end, s);
  std::fill(s.dk, s.dk + keys * d, 0.0f);
  std::fill(s.dv, s.dv + keys * dv_cols, 0.0f);

  const bool sinks = dsink && t.split == 0;
  const Interval rows = sinks ? Interval{0, seq.seqlen_q} : queries_of(p, seq, begin, end);  // all see the sink
  for (int64_t g = 0; g < p.group(); ++g) {
    const int64_t head = t.hk * p.group() + g;
    float* const partial = t.dq_partials ? t.dq_partials + (t.split * p.group() + g) * p.max_seqlen_q * d : nullptr;
    const auto zero_dq = [&](int64_t from, int64_t to) {
      for (int64_t i = from; i < to; i += plan.rows) {
        float* const dq = partial ? partial + i * d : s.dq;
        const int64_t last = std::min(i + plan.rows, to);
        std::fill(dq, dq + (last - i) * d, 0.0f);
        if (!partial) store_dq(p, k, seq, head, i, last, dq);
      }
    };
    zero_dq(0, rows.lo);
    for (int64_t i = rows.lo; i < rows.hi; i += plan.rows) {
      const int64_t last = std::min(i + plan.rows, rows.hi);
      float* const dq = partial ? partial + i * d : s.dq;
      load_queries(p, k, seq, head, i, last, s);
      if (sinks) dsink[t.b * p.nheads + head] += sink_gradient(p, head, last - i, s);
      attend_back(p, k, t, head, i, last, begin, keys, s, dq);
      if (!partial) store_dq(p, k, seq, head, i, last, dq);
    }
    zero_dq(rows.hi, seq.seqlen_q);
  }
  if (end <= begin) return;
  store_all(k, end - begin, p.headdim, p.dk.stride_col, p.dtype, static_cast<float>(std::abs(p.scores.scale)), s.dk, d,
            [&](int64_t j) { return p.dk.at(seq.k_batch, seq.k_row + begin + j, t.hk); });
  store_all(k, end - begin, p.headdim_v, p.dv.stride_col, p.dtype, 1.0f, s.dv, dv_cols,
            [&](int64_t j) { return p.dv.at(seq.k_batch, seq.k_row + begin + j, t.hk); });
}

/// dq of one head = the sum of its partials, in the order of the splits (into the first one).
void reduce_dq(const Problem& p, const Kernels& k, const BackwardPlan& plan, const Task& t, int64_t g) {
  const int64_t plane = p.max_seqlen_q * round_up(p.headdim, k.width),
                n = t.sequence.seqlen_q * round_up(p.headdim, k.width);
  float* const sum = t.dq_partials + g * plane;
  for (int64_t split = 1; split < plan.splits; ++split) {
    const float* const part = t.dq_partials + (split * p.group() + g) * plane;
    for (int64_t i = 0; i < n; ++i) sum[i] += part[i];
  }
  store_dq(p, k, t.sequence, t.hk * p.group() + g, 0, t.sequence.seqlen_q, sum);
}

void clear_dbias(const Problem& p, int workers) {
  const int64_t* shape = p.scores.bias_shape;
  parallel_for(shape[0] * shape[1], workers, [&](int64_t i, int) {
    Operand plane = p.dbias;
    plane.data = plane.at(i / shape[1], 0, i % shape[1]);
    clear(plane, 1, shape[2], 1, shape[3]);
  });
}

/// Tasks that must take turns, in their order; mostly one each.
std::vector<std::vector<Task>> turns(const Problem& p, const std::vector<Task>& tasks) {
  const auto place = [&](const Task& t) { return std::pair(dbias_owner(p, t.b, t.hk), t.split); };
  std::vector<Task> sorted = tasks;
  std::stable_sort(sorted.begin(), sorted.end(), [&](const Task& a, const Task& b) { return place(a) < place(b); });
  std::vector<std::vector<Task>> all;
  for (const Task& t : sorted) {
    if (all.empty() || place(all.back().back()) != place(t)) all.emplace_back();
    all.back().push_back(t);
  }
  return all;
}

}  // namespace

void backward(const Problem& p, const Kernels& k) {
  clear_if_uncovered(p);
  const BackwardPlan plan = make_backward_plan(p, k);
  const int workers = max_workers();
  if (p.dbias.present()) clear_dbias(p, workers);
  Arena arena(static_cast<std::size_t>(plan.workspace_shared + workers * plan.workspace_per_worker));
  const int64_t partial = plan.splits * p.group() * p.max_seqlen_q * round_up(p.headdim, k.width);  // of a key head
  float* const partials = plan.splits > 1 ? arena.take<float>(plan.heads_per_wave * partial) : nullptr;
  std::vector<Scratch> scratch;
  for (int w = 0; w < workers; ++w) scratch.emplace_back(arena, p, plan, k);
  std::vector<double> dsink(p.dsink.present() ? static_cast<std::size_t>(p.batch * p.nheads) : 0);

  std::vector<Task> tasks;
  const int64_t all_heads = p.batch * p.nheads_k;
  for (int64_t first = 0; first < all_heads; first += plan.heads_per_wave) {
    tasks.clear();
    for (int64_t i = first; i < std::min(first + plan.heads_per_wave, all_heads); ++i) {
      const Sequence s = p.sequences.at(i / p.nheads_k);
      if (s.empty()) continue;
      for (int64_t split = 0; split < plan.splits; ++split)
        tasks.push_back(
            {i / p.nheads_k, i % p.nheads_k, split, s, partials ? partials + (i - first) * partial : nullptr});
    }
    const auto turn = turns(p, tasks);
    parallel_for(static_cast<int64_t>(turn.size()), workers, [&](int64_t i, int worker) {
      for (const Task& t : turn[static_cast<std::size_t>(i)])
        run(p, k, plan, t, scratch[static_cast<std::size_t>(worker)], dsink.empty() ? nullptr : dsink.data());
    });
    if (!partials) continue;
    const int64_t heads = static_cast<int64_t>(tasks.size()) / plan.splits;
    parallel_for(heads * p.group(), workers, [&](int64_t i, int) {
      reduce_dq(p, k, plan, tasks[static_cast<std::size_t>(i / p.group() * plan.splits)], i % p.group());
    });
  }

  for (int64_t h = 0; !dsink.empty() && h < p.nheads; ++h) {
    double sum = 0;
    for (int64_t b = 0; b < p.batch; ++b) {
      const Sequence s = p.sequences.at(b);
      sum += s.empty() ? sink_gradient_without_keys(p, s, h) : dsink[static_cast<std::size_t>(b * p.nheads + h)];
    }
    *reinterpret_cast<float*>(p.dsink.at(0, 0, h)) = static_cast<float>(sum);
  }
}

}  // namespace flash_attn::cpu
