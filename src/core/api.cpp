// The public entry points: problem, choice, run.
#include <memory>
#include <new>

#include "core/append.hpp"
#include "core/backend.hpp"
#include "core/problem.hpp"

namespace flash_attn {
namespace {

template <class Call, class Run>
void run(const Call& call, Run run_on) {
  try {
    const Problem problem = make_problem(call);
    const Backend& backend = choose_or_throw(problem);
    if (!problem.writes_nothing()) run_on(backend, problem);
  } catch (const std::bad_alloc&) {
    throw Error(ErrorCode::out_of_memory, "out of memory");
  }
}

template <class Call>
Explanation explain_call(const Call& call) {
  const Problem problem = make_problem(call);
  Choice choice = choose(problem);
  return {describe(problem), std::move(choice.candidates),
          choice.backend ? choice.backend->plan(problem) : std::string()};
}

/// q as a (batch, row, head, col) tensor in `memory`.
Operand compact_queries(const Problem& p, char* memory) {
  Operand q = p.q;
  q.data = memory;
  q.stride_col = 1, q.stride_head = p.headdim, q.stride_row = p.nheads * p.headdim;
  q.stride_batch = p.rows_q * q.stride_row;
  return q;
}

void forward_with_append(const Backend& backend, Problem problem) {
  std::unique_ptr<char[]> memory;
  Operand q;
  if (problem.append.rotates()) {
    const int64_t elements = problem.batch_q * problem.rows_q * problem.nheads * problem.headdim;
    memory = std::make_unique_for_overwrite<char[]>(static_cast<std::size_t>(elements) * size_of(problem.dtype));
    q = compact_queries(problem, memory.get());
  }
  backend.append(problem, q);
  if (problem.append.rotates()) problem.q = q;
  backend.forward(problem);
}

}  // namespace

void Backend::append(const Problem& problem, const Operand& q) const {
  for (int64_t i = 0; i < append_blocks(problem); ++i) append_block(problem, q, i);
}

void forward(const Forward& call) {
  run(call, [](const Backend& backend, const Problem& problem) {
    problem.append.present() ? forward_with_append(backend, problem) : backend.forward(problem);
  });
}

void backward(const Backward& call) {
  run(call, [](const Backend& backend, const Problem& problem) { backend.backward(problem); });
}

Explanation explain(const Forward& call) { return explain_call(call); }
Explanation explain(const Backward& call) { return explain_call(call); }

std::vector<BackendInfo> backends() {
  std::vector<BackendInfo> infos;
  for (const Backend* backend : registered_backends())
    infos.push_back({std::string(backend->name()), std::string(backend->description()), backend->unavailable()});
  return infos;
}

const char* version() { return FLASH_ATTN_VERSION; }

}  // namespace flash_attn
