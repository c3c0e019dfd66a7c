#include "cpu/plan.hpp"

#include <gtest/gtest.h>

#include <map>

#include "cpu/isa.hpp"
#include "support/attention_case.hpp"

namespace flash_attn::test {
namespace {

TEST(Plan, AttendRangesCoverEveryRowOnce) {
  const cpu::Kernels& k = *cpu::usable_kernels().front();
  for (int64_t group : {1, 3, 8, 500}) {
    for (int64_t seqlen_q : {1, 5, 24, 96, 97, 191, 192, 193, 1000}) {
      Problem p;
      p.batch = 2, p.nheads_k = 3, p.nheads = 3 * group, p.headdim = p.headdim_v = 64;
      p.max_seqlen_q = seqlen_q, p.max_seqlen_k = 777;
      const cpu::AttendKernel& kernel = *k.attend_f32;
      const cpu::Plan plan = cpu::make_plan(p, kernel, k.width);
      EXPECT_EQ(plan.rows % kernel.group, 0);
      std::map<std::pair<int64_t, int64_t>, int> seen;
      for (int64_t hk = 0; hk < p.nheads_k; ++hk) {
        for (const cpu::AttendRange& r : cpu::attend_ranges(p, plan, hk, seqlen_q)) {
          EXPECT_LE(r.heads * r.rows, plan.rows);
          EXPECT_TRUE(r.rows == seqlen_q ||
                      r.row % kernel.group == 0);  // groups of rows are the same for any task size
          for (int64_t h = r.head; h < r.head + r.heads; ++h)
            for (int64_t i = r.row; i < r.row + r.rows; ++i) {
              EXPECT_EQ(h / group, hk);
              ++seen[{h, i}];
            }
        }
      }
      EXPECT_EQ(static_cast<int64_t>(seen.size()), p.nheads * seqlen_q);
      for (const auto& [row, times] : seen) EXPECT_EQ(times, 1);
    }
  }
}

TEST(Plan, WorkspaceIsLinearInSeqlen) {
  const cpu::Kernels& k = *cpu::usable_kernels().front();
  Problem p;
  p.batch = 1, p.nheads = p.nheads_k = 16, p.headdim = p.headdim_v = 128;
  const auto bytes = [&](int64_t seqlen) {
    p.max_seqlen_q = p.max_seqlen_k = seqlen;
    const cpu::Plan f = cpu::make_plan(p, *k.attend_f32, k.width);
    const cpu::BackwardPlan b = cpu::make_backward_plan(p, k);
    return f.workspace_shared + f.workspace_per_worker + b.workspace_shared + b.workspace_per_worker;
  };
  EXPECT_LE(bytes(int64_t{1} << 20), 2.2 * static_cast<double>(bytes(int64_t{1} << 19)));
}

TEST(Plan, FewHeadsOfTheBackwardAreSplit) {
  const cpu::Kernels& k = *cpu::usable_kernels().front();
  Problem p;
  p.batch = 1, p.nheads = p.nheads_k = 1, p.headdim = p.headdim_v = 64;
  p.max_seqlen_q = p.max_seqlen_k = 4096;
  const cpu::BackwardPlan one = cpu::make_backward_plan(p, k);
  EXPECT_GT(one.splits, 1);
  EXPECT_GE(one.splits * one.keys_per_split, p.max_seqlen_k);
  EXPECT_EQ(one.keys_per_split % k.panel, 0);
  p.nheads = p.nheads_k = 64;
  EXPECT_EQ(cpu::make_backward_plan(p, k).splits, 1);
}

}  // namespace
}  // namespace flash_attn::test
