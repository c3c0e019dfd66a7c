// Backward: a task is (sequence, key head, some splits of its keys). It owns the dk and dv of its keys; it goes through
// the query heads of the group one after the other, so nothing is shared while it runs.
//
// dq gets a contribution from every split. One split: the task writes dq itself. Several: each fills a partial of its
// own, and they are summed in the order of the splits; a worker that has all splits of a head adds them up at once, in
// that order. An element of dbias is written by one task, or is a sum, to which tasks add in turns (plan.hpp). Either
// way the sums have one order, whatever the threads.
#include <algorithm>
#include <cmath>
#include <utility>
#include <vector>

#include "cpu/arena.hpp"
#include "cpu/backward_worker.hpp"
#include "cpu/driver.hpp"
#include "cpu/memory.hpp"
#include "cpu/rounding.hpp"
#include "cpu/threads.hpp"

namespace flash_attn::cpu {

const BackwardKernel& backward_kernel(const Kernels& k, DType dtype) {
  return *(dtype == DType::f32 ? k.backward_f32 : dtype == DType::bf16 ? k.backward_bf16 : k.backward_f16);
}

namespace {

struct Task {
  int64_t b, hk;
  int64_t first_split, last_split;
  Sequence sequence;
  float* dq_partials;  // (partials, group, max_seqlen_q, ldq) of this key head; nullptr with one split
};

void add_to(float* sums, const float* x, int64_t n) {
  for (int64_t i = 0; i < n; ++i) sums[i] += x[i];
}

/// Rows [first, last) of dq, from `dq`.
void store_dq(const BackwardPass& pass, const Sequence& seq, int64_t head, int64_t first, int64_t last,
              const float* dq) {
  const Problem& p = pass.p;
  store_rows(pass.k, last - first, p.headdim, p.dq.stride_col, p.dtype, static_cast<float>(p.scores.scale), dq,
             pass.plan.ldq, [&](int64_t i) { return p.dq.at(seq.q_batch, seq.q_row + first + i, head); });
}

/// What a worker writes and reads after the products of a task: the gradients of its head, and then most likely the
/// next head. `next`: its task, or nullptr.
void ask_after_task(const BackwardPass& pass, const Task& t, const Task* next, std::vector<Ahead>& ahead) {
  const Problem& p = pass.p;
  const auto queries = [&](const Operand& x, const Task& of, int64_t cols) {
    ask_queries(x, of.sequence, of.hk, of.sequence.seqlen_q, cols, ahead);
  };
  const auto keys = [&](const Operand& x, const Task& of, int64_t cols) {
    ask_keys(p, x, of.sequence, of.hk, of.sequence.seqlen_k, cols, ahead);
  };
  ahead.clear();
  queries(p.dq, t, p.headdim), keys(p.dk, t, p.headdim), keys(p.dv, t, p.headdim_v);
  if (!next) return;
  keys(p.k, *next, p.headdim), keys(p.v, *next, p.headdim_v);
  queries(p.out, *next, p.headdim_v), queries(p.dout, *next, p.headdim_v), queries(p.q, *next, p.headdim);
}

/// Queries [first, last) of head g of the group against splits [split, split + n) of the task, which the worker has
/// packed.
void add_queries(const BackwardPass& pass, const Task& t, int64_t split, int64_t n, int64_t g, int64_t first,
                 int64_t last, BackwardWorker& worker, double* dsink) {
  const Problem& p = pass.p;
  const int64_t head = t.hk * p.group() + g, d = pass.plan.ldq;
  GradientRows& queries = worker.queries;
  queries.look_up(pass, t.sequence, t.b, head, first, last);
  const bool sinks = dsink && split == 0;
  if (sinks || queries.may_see(worker.splits.front().begin(), worker.splits[static_cast<std::size_t>(n - 1)].end()))
    queries.compute_delta(pass);
  if (sinks) dsink[t.b * p.nheads + head] += queries.sink_gradient(pass);
  for (int64_t i = 0; i < n; ++i) {
    KeySplit& keys = worker.splits[static_cast<std::size_t>(i)];
    const bool seen = queries.may_see(keys.begin(), keys.end()), adds = pass.plan.chained && split + i > 0;
    const float* const dq = seen ? keys.add_queries(pass, queries, worker.ahead) : queries.clear_dq(pass);
    if (p.dbias.present() && !dbias_sums(p)) queries.clear_unseen_dbias(pass, keys.begin(), keys.end());
    if (!t.dq_partials) {
      store_dq(pass, t.sequence, head, first, last, dq);
      continue;
    }
    const int64_t plane = pass.plan.chained ? 0 : split + i;
    float* const partial = t.dq_partials + ((plane * p.group() + g) * p.max_seqlen_q + first) * d;
    if (!adds)
      std::copy(dq, dq + (last - first) * d, partial);
    else if (seen)
      add_to(partial, dq, (last - first) * d);
  }
}

void run_task(const BackwardPass& pass, const Task& t, BackwardWorker& worker, double* dsink) {
  const BackwardPlan& plan = pass.plan;
  for (int64_t split = t.first_split; split < t.last_split; split += plan.splits_at_once) {
    const int64_t n = std::min(plan.splits_at_once, t.last_split - split);
    for (int64_t i = 0; i < n; ++i) {
      const int64_t begin = std::min((split + i) * plan.keys_per_split, t.sequence.seqlen_k);
      const int64_t end = std::min(begin + plan.keys_per_split, t.sequence.seqlen_k);
      worker.splits[static_cast<std::size_t>(i)].begin_keys(pass, t.sequence, t.hk, begin, end);
    }
    for (int64_t g = 0; g < pass.p.group(); ++g)
      for (int64_t first = 0; first < t.sequence.seqlen_q; first += plan.rows)
        add_queries(pass, t, split, n, g, first, std::min(first + plan.rows, t.sequence.seqlen_q), worker, dsink);
    for (int64_t i = 0; i < n; ++i) worker.splits[static_cast<std::size_t>(i)].write_gradients(pass);
  }
}

/// dq of one head = the sum of its partials, in the order of the splits (into the first one).
void reduce_dq(const BackwardPass& pass, const Task& t, int64_t g) {
  const int64_t d = pass.plan.ldq, plane = pass.p.max_seqlen_q * d, n = t.sequence.seqlen_q * d;
  float* const sum = t.dq_partials + g * plane;
  for (int64_t split = 1; split < partials_of_head(pass.plan); ++split)
    add_to(sum, t.dq_partials + (split * pass.p.group() + g) * plane, n);
  store_dq(pass, t.sequence, t.hk * pass.p.group() + g, 0, t.sequence.seqlen_q, sum);
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
  const auto place = [&](const Task& t) { return std::pair(dbias_owner(p, t.b, t.hk), t.first_split); };
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
  const BackwardKernel& kernel = backward_kernel(k, p.dtype);
  const int threads = max_workers();
  const BackwardPass pass{p, k, kernel, make_backward_plan(p, k, kernel, threads)};
  const BackwardPlan& plan = pass.plan;
  Arena arena(plan.workspace_shared + plan.workers * plan.workspace_per_worker);
  advise_huge_pages(p);
  clear_if_uncovered(p);
  if (p.dbias.present() && !tasks_write_dbias(p)) clear_dbias(p, threads);
  float* const partials = take_partials(arena, plan, p);
  std::vector<BackwardWorker> memory;
  for (int w = 0; w < plan.workers; ++w) memory.emplace_back(arena, plan);
  std::vector<double> dsink(p.dsink.present() ? static_cast<std::size_t>(p.batch * p.nheads) : 0);

  const int64_t all_heads = p.batch * p.nheads_k;
  for (int64_t first = 0; first < all_heads; first += plan.heads_per_wave) {
    std::vector<Task> heads, tasks;
    for (int64_t i = first; i < std::min(first + plan.heads_per_wave, all_heads); ++i) {
      const Sequence s = p.sequences.at(i / p.nheads_k);
      if (s.empty()) continue;
      heads.push_back({i / p.nheads_k, i % p.nheads_k, 0, plan.splits, s,
                       partials ? partials + (i - first) * partial_floats(plan, p) : nullptr});
    }
    for (const SplitRange& r : backward_ranges(plan, static_cast<int64_t>(heads.size()), threads)) {
      tasks.push_back(heads[static_cast<std::size_t>(r.head)]);
      tasks.back().first_split = r.first, tasks.back().last_split = r.last;
    }
    const std::vector<std::size_t> begins = arrange_turns(p, tasks);
    // One split: neighbouring heads share pages of the results, as in few_rows.cpp. Several: the heaviest go first.
    parallel_for(
        static_cast<int64_t>(begins.size()) - 1, plan.workers,
        [&](int64_t i, int w) {
          BackwardWorker& worker = memory[static_cast<std::size_t>(w)];
          for (std::size_t at = begins[static_cast<std::size_t>(i)]; at < begins[static_cast<std::size_t>(i) + 1];
               ++at) {
            const Task* const next = at + 1 < tasks.size() ? &tasks[at + 1] : nullptr;
            if (plan.asks_ahead) ask_after_task(pass, tasks[at], next, worker.ahead);
            run_task(pass, tasks[at], worker, dsink.empty() ? nullptr : dsink.data());
          }
        },
        plan.splits == 1 ? Order::by_place : Order::rising);
    if (!partials) continue;
    parallel_for(static_cast<int64_t>(heads.size()) * p.group(), plan.workers, [&](int64_t i, int) {
      reduce_dq(pass, heads[static_cast<std::size_t>(i / p.group())], i % p.group());
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
