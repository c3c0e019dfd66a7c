// Backward: one task per (sequence, key head, split of its keys). A task owns the dk and dv of its keys; it goes
// through the query heads of the group one after the other, so nothing is shared while it runs.
//
// dq gets a contribution from every split. One split: the task writes dq itself. Several: each fills a partial of its
// own, and they are summed in the order of the splits. An element of dbias is written by one task, or is a sum, to
// which tasks add in turns (plan.hpp). Either way the sums have one order, whatever the threads.
#include <algorithm>
#include <cmath>
#include <utility>
#include <vector>

#include "cpu/arena.hpp"
#include "cpu/driver.hpp"
#include "cpu/key_split.hpp"
#include "cpu/plan.hpp"
#include "cpu/threads.hpp"

namespace flash_attn::cpu {
namespace {

struct Task {
  int64_t b, hk, split;
  Sequence sequence;
  float* dq_partials;  // (splits, group, max_seqlen_q, d) of this key head; nullptr with one split
};

/// Rows [first, last) of dq, from `dq`.
void store_dq(const Backward& f, const Sequence& seq, int64_t head, int64_t first, int64_t last, const float* dq) {
  const Problem& p = f.p;
  store_rows(f.k, last - first, p.headdim, p.dq.stride_col, p.dtype, static_cast<float>(p.scores.scale), dq,
             round_up(p.headdim, f.k.width),
             [&](int64_t i) { return p.dq.at(seq.q_batch, seq.q_row + first + i, head); });
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

void run(const Backward& f, const Task& t, KeySplit& keys, double* dsink) {
  const Problem& p = f.p;
  const Sequence& seq = t.sequence;
  const int64_t d = round_up(p.headdim, f.k.width);
  const int64_t begin = t.split * f.plan.keys_per_split, end = std::min(begin + f.plan.keys_per_split, seq.seqlen_k);
  if (end > begin) keys.take_keys(f, seq, t.b, t.hk, begin, end);
  const bool sinks = dsink && t.split == 0;
  // Every row sees the sink, and may have gradients of its bias to write.
  const bool all_rows = sinks || (p.dbias.present() && !dbias_sums(p) && end > begin);
  const Interval rows = all_rows ? Interval{0, seq.seqlen_q} : queries_of(p, seq, begin, end);
  const std::vector<float> zeros(static_cast<std::size_t>(rows.hi - rows.lo < seq.seqlen_q ? f.plan.rows * d : 0));
  for (int64_t g = 0; g < p.group(); ++g) {
    const int64_t head = t.hk * p.group() + g;
    float* const partial = t.dq_partials ? t.dq_partials + (t.split * p.group() + g) * p.max_seqlen_q * d : nullptr;
    const auto put_dq = [&](int64_t first, int64_t last, const float* dq) {
      if (partial)
        std::copy(dq, dq + (last - first) * d, partial + first * d);
      else
        store_dq(f, seq, head, first, last, dq);
    };
    const auto put_zeros = [&](int64_t first, int64_t end_row) {
      for (; first < end_row; first += f.plan.rows) put_dq(first, std::min(first + f.plan.rows, end_row), zeros.data());
    };
    put_zeros(0, rows.lo);
    for (int64_t i = rows.lo; i < rows.hi; i += f.plan.rows) {
      const int64_t last = std::min(i + f.plan.rows, rows.hi);
      keys.take_queries(f, head, i, last);
      if (sinks) dsink[t.b * p.nheads + head] += keys.sink_gradient(f);
      put_dq(i, last, keys.attend(f));
    }
    put_zeros(rows.hi, seq.seqlen_q);
  }
  if (end > begin) keys.store(f);
}

/// dq of one head = the sum of its partials, in the order of the splits (into the first one).
void reduce_dq(const Backward& f, const Task& t, int64_t g) {
  const int64_t d = round_up(f.p.headdim, f.k.width), plane = f.p.max_seqlen_q * d, n = t.sequence.seqlen_q * d;
  float* const sum = t.dq_partials + g * plane;
  for (int64_t split = 1; split < f.plan.splits; ++split) {
    const float* const part = t.dq_partials + (split * f.p.group() + g) * plane;
    for (int64_t i = 0; i < n; ++i) sum[i] += part[i];
  }
  store_dq(f, t.sequence, t.hk * f.p.group() + g, 0, t.sequence.seqlen_q, sum);
}

/// Whether tasks write every element of dbias: it has no sums, and no rows or keys that no sequence has.
bool tasks_write_dbias(const Problem& p) {
  if (dbias_sums(p) || p.batch == 0) return false;
  for (int64_t b = 0; b < p.batch; ++b) {
    const Sequence s = p.sequences.at(b);
    if (s.empty() || s.seqlen_q != p.scores.bias_shape[2] || s.seqlen_k != p.scores.bias_shape[3]) return false;
  }
  return true;
}

void clear_dbias(const Problem& p, int workers) {
  const int64_t* shape = p.scores.bias_shape;
  parallel_for(shape[0] * shape[1], workers, [&](int64_t i, int) {
    Operand plane = p.dbias;
    plane.data = plane.at(i / shape[1], 0, i % shape[1]);
    clear(plane, 1, shape[2], 1, shape[3]);
  });
}

/// Brings tasks that must take turns next to each other, and returns where each run of them begins, and the end. Mostly
/// every task is a run of its own.
std::vector<std::size_t> arrange_turns(const Problem& p, std::vector<Task>& tasks) {
  const auto place = [&](const Task& t) { return std::pair(dbias_owner(p, t.b, t.hk), t.split); };
  const bool sums = p.dbias.present() && dbias_sums(p);
  if (sums)
    std::stable_sort(tasks.begin(), tasks.end(), [&](const Task& a, const Task& b) { return place(a) < place(b); });
  std::vector<std::size_t> begins;
  for (std::size_t i = 0; i < tasks.size(); ++i)
    if (i == 0 || !sums || place(tasks[i]) != place(tasks[i - 1])) begins.push_back(i);
  begins.push_back(tasks.size());
  return begins;
}

/// d loss / d sink of a sequence without keys: the sink has probability 1 and out is 0, so only dlse reaches it.
double sink_gradient_without_keys(const Problem& p, const Sequence& seq, int64_t head) {
  double sum = 0;
  for (int64_t i = 0; p.dlse.present() && i < seq.seqlen_q; ++i)
    sum += *reinterpret_cast<const float*>(p.dlse.at(seq.q_batch, seq.q_row + i, head));
  return sum;
}

}  // namespace

void backward(const Problem& p, const Kernels& k) {
  clear_if_uncovered(p);
  const BackwardKernel& kernel = backward_kernel(k, p.dtype);
  const Backward f{p, k, kernel, make_backward_plan(p, k, kernel)};
  const BackwardPlan& plan = f.plan;
  const int workers = max_workers();
  if (p.dbias.present() && !tasks_write_dbias(p)) clear_dbias(p, workers);
  Arena arena(static_cast<std::size_t>(plan.workspace_shared + workers * plan.workspace_per_worker));
  const int64_t partial = plan.splits * p.group() * p.max_seqlen_q * round_up(p.headdim, k.width);  // of a key head
  float* const partials = plan.splits > 1 ? arena.take<float>(plan.heads_per_wave * partial) : nullptr;
  std::vector<KeySplit> memory;
  for (int w = 0; w < workers; ++w) memory.emplace_back(arena, f);
  std::vector<double> dsink(p.dsink.present() ? static_cast<std::size_t>(p.batch * p.nheads) : 0);

  std::vector<Task> tasks, first_splits;  // first_splits: one a head, if there are partials to be summed
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
    if (partials) first_splits = tasks;
    std::erase_if(first_splits, [](const Task& t) { return t.split > 0; });
    const std::vector<std::size_t> begins = arrange_turns(p, tasks);
    parallel_for(static_cast<int64_t>(begins.size()) - 1, workers, [&](int64_t i, int worker) {
      for (std::size_t at = begins[static_cast<std::size_t>(i)]; at < begins[static_cast<std::size_t>(i) + 1]; ++at)
        run(f, tasks[at], memory[static_cast<std::size_t>(worker)], dsink.empty() ? nullptr : dsink.data());
    });
    parallel_for(static_cast<int64_t>(first_splits.size()) * p.group(), workers, [&](int64_t i, int) {
      reduce_dq(f, first_splits[static_cast<std::size_t>(i / p.group())], i % p.group());
    });
  }

  for (int64_t h = 0; p.dsink.present() && h < p.nheads; ++h) {
    double sum = 0;
    for (int64_t b = 0; b < p.batch; ++b) {
      const Sequence s = p.sequences.at(b);
      sum += s.empty() ? sink_gradient_without_keys(p, s, h) : dsink[static_cast<std::size_t>(b * p.nheads + h)];
    }
    *reinterpret_cast<float*>(p.dsink.at(0, 0, h)) = static_cast<float>(sum);
  }
}

}  // namespace flash_attn::cpu
