// The public entry points: problem, choice, run.
#include <memory>
#include <new>

#include "core/append.hpp"
#include "core/backend.hpp"
#include "core/problem.hpp"
#include "core/work.hpp"

namespace flash_attn {
namespace {

template <class Call, class Run>
void run(const Call& call, Run run_on) {
  try {
    const Problem problem = make_problem(call);
    const Backend& backend = choose_or_throw(problem);
    if (problem.writes_nothing()) return;
    run_on(backend, problem);
  } catch (const std::bad_alloc&) {
    throw Error(ErrorCode::out_of_memory, "out of memory");
  }
}

template <class Call>
Explanation explain_call(const Call& call) {
  const Problem problem = make_problem(call);
  Choice choice = choose(problem);
  return {describe(problem), std::move(choice.candidates),
          choice.backend ? choice.backend->plan(problem) : std::string(), describe(count_work(problem))};
}

}  // namespace

void forward(const Forward& call) {
  run(call, [](const Backend& backend, const Problem& problem) { backend.forward(problem); });
}

void backward(const Backward& call) {
  run(call, [](const Backend& backend, const Problem& problem) { backend.backward(problem); });
}

Explanation explain(const Forward& call) { return explain_call(call); }
Explanation explain(const Backward& call) { return explain_call(call); }

std::vector<BackendInfo> backends() {
  std::vector<BackendInfo> infos;
  for (const Backend* backend : registered_backends())
    infos.push_back({std::string(backend->name()), std::string(backend->description()), backend->unavailable(),
                     serves_text(backend->serves(Pass::forward)), serves_text(backend->serves(Pass::backward))});
  return infos;
}

const char* version() { return FLASH_ATTN_VERSION; }

}  // namespace flash_attn
