// Forward. Heads are attended by few_rows.cpp or many_rows.cpp; those with values that a plain kernel cannot treat are
// done again by the kernel that takes any.
#include <algorithm>
#include <optional>
#include <vector>

#include "cpu/arena.hpp"
#include "cpu/driver.hpp"
#include "cpu/few_rows.hpp"
#include "cpu/many_rows.hpp"
#include "cpu/memory.hpp"
#include "cpu/threads.hpp"

namespace flash_attn::cpu {

const AttendKernel& attend_kernel(const Kernels& k, const Problem& p) {
  const bool few_rows = p.max_seqlen_q * p.group() <= kInPlaceRows && p.max_seqlen_k >= kInPlaceKeys;
  const bool whole_pairs = p.headdim % (2 * k.width) == 0 && p.headdim_v % (2 * k.width) == 0;
  if (few_rows && whole_pairs && p.k.stride_col == 1 && p.v.stride_col == 1) return *k.attend_in_place;
  const DType dtype = p.dtype;
  return *(dtype == DType::f32 ? k.attend_f32 : dtype == DType::bf16 ? k.attend_bf16 : k.attend_f16);
}

namespace {

std::vector<Head> heads_with_rows(const Problem& p) {
  std::vector<Head> heads;
  for (int64_t b = 0; b < p.batch; ++b) {
    const Sequence s = p.sequences.at(b);
    if (s.empty()) continue;
    for (int64_t hk = 0; hk < p.nheads_k; ++hk) heads.push_back({b * p.nheads_k + hk, s});
  }
  return heads;
}

ForwardPass pass_of(const Problem& p, const Kernels& k, const AttendKernel& kernel) {
  return {p, k, kernel, make_plan(p, kernel, k.width, max_workers())};
}

int64_t workspace(const ForwardPass& pass) {
  return pass.plan.workspace_shared + pass.plan.workers * pass.plan.workspace_per_worker;
}

/// Some heads, in the way of the plan.
class Heads {
 public:
  Heads(const ForwardPass& pass, std::vector<Head> heads, Arena& arena) {
    if (pass.plan.own_keys)
      few_.emplace(pass, std::move(heads), arena);
    else
      many_.emplace(pass, std::move(heads), arena);
  }
  std::vector<int64_t> attend() { return few_ ? few_->attend() : many_->attend(); }

 private:
  std::optional<FewRows> few_;
  std::optional<ManyRows> many_;
};

}  // namespace

struct ForwardRun::Memory {
  Memory(const Problem& problem, const Kernels& kernels)
      : p(problem),
        pass(pass_of(p, kernels, attend_kernel(kernels, p))),
        any_pass(pass.kernel.plain_only ? pass_of(p, kernels, *kernels.attend_any) : pass),
        arena(std::max(workspace(pass), workspace(any_pass))),
        heads(pass, heads_with_rows(p), arena) {}

  const Problem p;
  const ForwardPass pass, any_pass;  // any_pass: of the kernel that takes special values
  Arena arena;
  Heads heads;
};

ForwardRun::ForwardRun(const Problem& problem, const Kernels& kernels)
    : memory_(std::make_unique<Memory>(problem, kernels)) {}
ForwardRun::~ForwardRun() = default;

void ForwardRun::attend() {
  const Problem& p = memory_->p;
  advise_huge_pages(p);
  clear_if_uncovered(p);
  const std::vector<int64_t> to_redo = memory_->heads.attend();
  if (to_redo.empty()) return;
  std::vector<Head> heads;
  for (const int64_t index : to_redo) heads.push_back({index, p.sequences.at(index / p.nheads_k)});
  memory_->arena.rewind();
  Heads(memory_->any_pass, std::move(heads), memory_->arena).attend();
}

void forward(const Problem& p, const Kernels& k) { ForwardRun(p, k).attend(); }

}  // namespace flash_attn::cpu
