#include "cpu/plan.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <vector>

#include "cpu/isa.hpp"
#include "support/attention_case.hpp"

namespace flash_attn::test {
namespace {

Problem fixed(int64_t batch, int64_t nheads, int64_t nheads_k, int64_t seqlen_q, int64_t seqlen_k, int64_t headdim) {
  Problem p;
  p.batch = batch, p.nheads = nheads, p.nheads_k = nheads_k, p.headdim = p.headdim_v = headdim;
  p.max_seqlen_q = p.sequences.seqlen_q = seqlen_q, p.max_seqlen_k = p.sequences.seqlen_k = seqlen_k;
  return p;
}

TEST(Plan, AttendRangesCoverEveryRowOnce) {
  const cpu::Kernels& k = *cpu::usable_kernels().front();
  const cpu::AttendKernel& kernel = *k.attend_f32;
  for (const int workers : {1, 2, 16})
    for (int64_t group : {1, 3, 8, 500})
      for (int64_t longest : {1, 5, 24, 96, 97, 191, 192, 193, 1000, 3000}) {
        const cpu::Plan plan = cpu::make_plan(fixed(2, 3 * group, 3, longest, 777, 64), kernel, k.width, workers);
        EXPECT_EQ(plan.rows % kernel.tile_rows, 0);
        if (plan.own_keys) {
          EXPECT_GE(plan.rows, group * longest);
          continue;
        }
        for (int64_t seqlen_q : {longest, longest / 2, longest / 7}) {  // as the sequences of a ragged batch
          std::vector<int> seen(static_cast<std::size_t>(group * seqlen_q));
          for (const cpu::RowRange& r : cpu::attend_ranges(plan, kernel, group, seqlen_q)) {
            EXPECT_LE(r.rows, plan.rows);
            // Whole heads, or groups of rows that are the same for any task size.
            const int64_t query = r.first % seqlen_q;
            EXPECT_TRUE(r.rows % seqlen_q == 0 || (query % kernel.tile_rows == 0 && query + r.rows <= seqlen_q));
            for (int64_t i = r.first; i < r.first + r.rows; ++i) ++seen.at(static_cast<std::size_t>(i));
          }
          for (const int times : seen) EXPECT_EQ(times, 1);
        }
      }
}

/// Few workers get long tasks, and many enough of them; what bits depend on is the same for any.
TEST(Plan, TasksFollowTheWorkers) {
  const cpu::Kernels& k = *cpu::usable_kernels().front();
  const cpu::AttendKernel& kernel = *k.attend_f32;
  const auto plan = [&](const Problem& p, int workers) { return cpu::make_plan(p, kernel, k.width, workers); };
  const auto tasks_of_head = [&](const Problem& p, int workers) {
    return cpu::attend_ranges(plan(p, workers), kernel, p.group(), 4096).size();
  };
  const Problem one_head = fixed(1, 1, 1, 4096, 4096, 64), many_heads = fixed(4, 32, 32, 4096, 4096, 64);
  EXPECT_LE(tasks_of_head(one_head, 1), 6);
  EXPECT_GE(tasks_of_head(one_head, 2), 16);
  EXPECT_GE(tasks_of_head(one_head, 16), 16);
  EXPECT_LE(tasks_of_head(many_heads, 2), 6);
  EXPECT_EQ(plan(fixed(1, 1, 1, 4096, 0, 64), 2).rows, plan(fixed(1, 1, 1, 4096, 0, 64), 2).rows_shared);  // no work
  for (const int workers : {2, 5, 64}) {
    EXPECT_EQ(plan(one_head, workers).rows_shared, plan(one_head, 1).rows_shared);
    EXPECT_EQ(plan(many_heads, workers).heads_per_wave, plan(many_heads, 1).heads_per_wave);
  }
  // One long sequence among short ones is nearly all of the work: it must do for all workers.
  std::vector<int32_t> cu_seqlens{0};
  for (int b = 0; b < 64; ++b) cu_seqlens.push_back(cu_seqlens.back() + (b == 40 ? 4096 : 16));
  Problem ragged = fixed(64, 1, 1, 4096, 4096, 64);
  EXPECT_LE(tasks_of_head(ragged, 4), 6);
  ragged.sequences.cu_seqlens_q = ragged.sequences.cu_seqlens_k = cu_seqlens.data();
  EXPECT_GE(tasks_of_head(ragged, 4), 16);
}

/// Every key has a split, and no split is empty.
void expect_splits_cover(const cpu::Plan& plan, const Problem& p) {
  EXPECT_GE(plan.splits * plan.keys_per_split, p.max_seqlen_k);
  EXPECT_LT((plan.splits - 1) * plan.keys_per_split, p.max_seqlen_k);
}

TEST(Plan, FewRowsOwnTheirKeys) {
  const cpu::Kernels& k = *cpu::usable_kernels().front();
  const cpu::AttendKernel& kernel = *k.attend_f32;
  Problem p;
  p.batch = 1, p.nheads = 4, p.nheads_k = 1, p.headdim = p.headdim_v = 64;
  p.max_seqlen_q = 1, p.max_seqlen_k = 8192;
  const cpu::Plan one = cpu::make_plan(p, kernel, k.width, 2);
  EXPECT_TRUE(one.own_keys);
  EXPECT_GE(one.splits, 16);  // one head must do for many workers
  EXPECT_GT(one.workers, 1);
  expect_splits_cover(one, p);
  EXPECT_EQ(one.keys_per_split % kernel.panel, 0);
  EXPECT_EQ(one.pack_keys % kernel.panel, 0);
  p.batch = 64;
  const cpu::Plan many = cpu::make_plan(p, kernel, k.width, 2);
  EXPECT_EQ(many.splits, 1);
  EXPECT_EQ(many.workspace_shared, 0);
  EXPECT_LE(many.workspace_per_worker, int64_t{1} << 21);  // whatever seqlen_k is
  p.max_seqlen_q = 1000;
  EXPECT_FALSE(cpu::make_plan(p, kernel, k.width, 2).own_keys);
  p.batch = 1, p.max_seqlen_q = p.max_seqlen_k = 16;
  EXPECT_EQ(cpu::make_plan(p, kernel, k.width, 2).workers, 1);
}

TEST(Plan, HeadsShareATaskAndKeysAreSplit) {
  const cpu::Kernels& k = *cpu::usable_kernels().front();
  const cpu::AttendKernel& kernel = *k.attend_in_place;
  Problem p;
  p.batch = 1, p.nheads = 32, p.nheads_k = 8, p.headdim = p.headdim_v = 128;
  p.max_seqlen_q = 1, p.max_seqlen_k = 65536;
  const cpu::Plan one = cpu::make_plan(p, kernel, k.width, 2);
  EXPECT_TRUE(one.own_keys);
  EXPECT_EQ(one.heads_per_task, 8);
  EXPECT_GE(one.splits, 32);
  expect_splits_cover(one, p);
  p.batch = 64;
  const cpu::Plan many = cpu::make_plan(p, kernel, k.width, 2);
  EXPECT_EQ(many.splits, 1);
  EXPECT_LE(many.workspace_per_worker, int64_t{1} << 19);  // whatever seqlen_k is
  p.nheads = 256, p.nheads_k = 128;
  EXPECT_LE(cpu::make_plan(p, kernel, k.width, 2).heads_per_task * 2, 64);
}

TEST(Plan, WorkspaceIsLinearInSeqlen) {
  const cpu::Kernels& k = *cpu::usable_kernels().front();
  Problem p;
  p.batch = 1, p.nheads = p.nheads_k = 16, p.headdim = p.headdim_v = 128;
  const auto bytes = [&](int64_t seqlen) {
    p.max_seqlen_q = p.max_seqlen_k = seqlen;
    const cpu::Plan f = cpu::make_plan(p, *k.attend_f32, k.width, 2);
    const cpu::BackwardPlan b = cpu::make_backward_plan(p, k, *k.backward_f32, 1);
    return f.workspace_shared + f.workspace_per_worker + b.workspace_shared + b.workspace_per_worker;
  };
  EXPECT_LE(bytes(int64_t{1} << 20), 2.2 * static_cast<double>(bytes(int64_t{1} << 19)));
}

TEST(Plan, FewHeadsOfTheBackwardAreSplit) {
  const cpu::Kernels& k = *cpu::usable_kernels().front();
  Problem p;
  p.batch = 1, p.nheads = p.nheads_k = 1, p.headdim = p.headdim_v = 64;
  p.max_seqlen_q = p.max_seqlen_k = 4096;
  const cpu::BackwardPlan one = cpu::make_backward_plan(p, k, *k.backward_f32, 1);
  EXPECT_GT(one.splits, 1);
  EXPECT_GE(one.splits * one.keys_per_split, p.max_seqlen_k);
  EXPECT_EQ(one.keys_per_split % k.backward_f32->tile_keys, 0);
  p.nheads = p.nheads_k = 64;
  EXPECT_EQ(cpu::make_backward_plan(p, k, *k.backward_f32, 1).splits, 1);
}

/// Tasks of the backward take every split once, each head's in their order; the first take many, the last few.
TEST(Plan, BackwardRangesCoverEverySplitOnce) {
  const cpu::Kernels& k = *cpu::usable_kernels().front();
  for (const int workers : {1, 2, 16})
    for (const int64_t heads : {1, 2, 9, 64}) {
      const Problem p = fixed(1, heads, heads, 4096, 4096, 64);
      const cpu::BackwardPlan plan = cpu::make_backward_plan(p, k, *k.backward_f32, workers);
      const std::vector<cpu::SplitRange> ranges = cpu::backward_ranges(plan, heads, workers);
      std::vector<int64_t> next(static_cast<std::size_t>(heads));
      for (const cpu::SplitRange& r : ranges) {
        EXPECT_EQ(r.first, next.at(static_cast<std::size_t>(r.head)));
        EXPECT_LT(r.first, r.last);
        EXPECT_LE(r.last - r.first, plan.chained ? plan.splits : plan.splits_at_once);
        next.at(static_cast<std::size_t>(r.head)) = r.last;
      }
      for (const int64_t splits : next) EXPECT_EQ(splits, plan.splits);
      EXPECT_GE(static_cast<int64_t>(ranges.size()),
                workers == 1 ? heads : std::min<int64_t>(4 * workers, heads * plan.splits));
      EXPECT_LE(ranges.back().last - ranges.back().first, plan.chained ? plan.splits : 1);
      EXPECT_EQ(plan.splits, cpu::make_backward_plan(p, k, *k.backward_f32, 1).splits);  // bits depend on it
    }
}

/// Heads whose sums of dbias meet share an owner, no others do; tasks that take turns are made up for by splits.
TEST(Plan, OneOwnerForEachSumOfDbias) {
  const cpu::Kernels& k = *cpu::usable_kernels().front();
  float memory = 0;
  Problem p;
  p.batch = 16, p.nheads = 8, p.nheads_k = 4, p.headdim = p.headdim_v = 64;
  p.max_seqlen_q = p.max_seqlen_k = 4096;
  for (int64_t batch : {1, 16})
    for (int64_t nheads : {1, 8}) {
      const int64_t shape[] = {batch, nheads, 4096, 4096};
      std::copy(shape, shape + 4, p.scores.bias_shape);
      p.dbias.data = reinterpret_cast<char*>(&memory);
      std::map<int64_t, int> heads;
      for (int64_t b = 0; b < 16; ++b)
        for (int64_t hk = 0; hk < 4; ++hk) ++heads[cpu::dbias_owner(p, b, hk)];
      const int64_t owners = batch * (nheads == 1 ? 1 : 4);
      EXPECT_EQ(static_cast<int64_t>(heads.size()), owners);
      for (const auto& [owner, count] : heads) EXPECT_EQ(count, 64 / owners);
      EXPECT_GE(owners * cpu::make_backward_plan(p, k, *k.backward_f32, 1).splits, 16);
      p.dbias = {};
      EXPECT_NE(cpu::dbias_owner(p, 0, 0), cpu::dbias_owner(p, 1, 0));
      EXPECT_NE(cpu::dbias_owner(p, 0, 0), cpu::dbias_owner(p, 0, 1));
      EXPECT_EQ(cpu::make_backward_plan(p, k, *k.backward_f32, 1).splits, 1);
    }
}

}  // namespace
}  // namespace flash_attn::test
