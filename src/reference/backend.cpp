// The oracle as a backend: serves everything on the CPU, but only when asked for by name.
#include "core/backend.hpp"
#include "core/append.hpp"
#include "reference/reference.hpp"

namespace flash_attn {
namespace {

class ReferenceBackend final : public Backend {
 public:
  std::string_view name() const override { return "reference"; }
  std::string_view description() const override {
    return "the formula in plain loops, in double: slow, the measure of the others";
  }
  std::span<const int32_t> devices() const override { return kHostMemory; }
  const Serves* serves(Pass) const override { return &kServesAll; }
  bool automatic() const override { return false; }
  std::string plan(const Problem&) const override { return "one thread, row by row, all sums in float64"; }
  void forward(const Problem& problem) const override {
    if (!problem.append.present()) return reference::forward(problem);
    const RotatedQueries queries(problem);
    append_all(problem, queries.operand());
    reference::forward(queries.attend_after(problem));
  }
  void backward(const Problem& problem) const override { reference::backward(problem); }
};

}  // namespace

std::unique_ptr<Backend> make_reference_backend() { return std::make_unique<ReferenceBackend>(); }

}  // namespace flash_attn
