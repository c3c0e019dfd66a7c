// The CPU backend as the core sees it.
#include "core/backend.hpp"
#include "core/append.hpp"
#include "cpu/driver.hpp"
#include "cpu/isa.hpp"
#include "cpu/plan.hpp"
#include "cpu/threads.hpp"

namespace flash_attn {
namespace {

// Of keys and queries, moved in less time than waking a thread takes.
constexpr int64_t kFewElements = 1 << 13;

constexpr uint32_t kDTypes = bit(DType::f32) | bit(DType::bf16) | bit(DType::f16);
constinit const Serves kServes = {.dtypes = kDTypes, .features = kAllFeatures};

/// New keys into the cache, queries rotated: blocks of rows, on as many workers as pay.
void append(const Problem& p, const Operand& q) {
  const int64_t moved = p.batch * (p.append.max_rows * p.nheads_k * (p.headdim + p.headdim_v) +
                                   (p.append.rotates() ? p.max_seqlen_q * p.nheads * p.headdim : 0));
  const int workers = moved <= kFewElements ? 1 : cpu::max_workers();
  const MoveRow move = cpu::active_kernels().move_row;
  cpu::parallel_for(append_blocks(p), workers, [&](int64_t i, int) { append_block(p, q, i, move); });
}

class CpuBackend final : public Backend {
 public:
  std::string_view name() const override { return "cpu"; }
  std::string_view description() const override { return "SIMD kernels for the CPU, threaded, bitwise reproducible"; }
  std::span<const int32_t> devices() const override { return kHostMemory; }
  const Serves* serves(Pass) const override { return &kServes; }

  std::string plan(const Problem& p) const override {
    const cpu::Kernels& k = cpu::active_kernels();
    if (p.pass == Pass::backward) {
      const cpu::BackwardKernel& kernel = cpu::backward_kernel(k, p.dtype);
      return cpu::describe(cpu::make_backward_plan(p, k, kernel, cpu::max_workers()), k, kernel);
    }
    const cpu::AttendKernel& kernel = cpu::attend_kernel(k, p);
    return cpu::describe(cpu::make_plan(p, kernel, k.width, cpu::max_workers()), k, kernel);
  }
  void forward(const Problem& p) const override {
    if (!p.append.present()) return cpu::forward(p, cpu::active_kernels());
    const RotatedQueries queries(p);
    cpu::ForwardRun run(queries.attend_after(p), cpu::active_kernels());  // memory runs out before a cache is written
    append(p, queries.operand());
    run.attend();
  }
  void backward(const Problem& p) const override { cpu::backward(p, cpu::active_kernels()); }
};

}  // namespace

std::unique_ptr<Backend> make_cpu_backend() { return std::make_unique<CpuBackend>(); }

}  // namespace flash_attn
