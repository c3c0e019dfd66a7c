// The registry of backends, and the choice among them.
//
// Readers take a snapshot of the list: a call never waits for another, and a backend may itself call the registry.
// Whoever unregisters a backend sees to it that no call is using it.
#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <mutex>
#include <utility>

#include "core/backend.hpp"
#include "core/check.hpp"

namespace flash_attn {
namespace {

using List = std::vector<std::shared_ptr<const Backend>>;

[[noreturn]] void unknown_backend(std::string_view name, const List& list, const char* said_by) {
  std::vector<std::string_view> names;
  for (const auto& backend : list) names.push_back(backend->name());
  throw Error(ErrorCode::invalid_argument,
              std::string(said_by) + ": expected one of " + join(names) + ", got \"" + std::string(name) + "\"");
}

template <class AnyList>
auto find(AnyList& list, std::string_view name) {
  return std::find_if(list.begin(), list.end(), [&](const auto& backend) { return backend->name() == name; });
}

/// Capability data that choice computes with: a remainder by 0 would end the process.
void check_serves(const Backend& backend) {
  for (const Pass pass : {Pass::forward, Pass::backward}) {
    const Serves* serves = backend.serves(pass);
    if (!serves) continue;
    if (serves->headdim_multiple < 1)
      invalid("headdim_multiple", "expected at least 1, got " + std::to_string(serves->headdim_multiple));
    if (serves->max_headdim < 0)
      invalid("max_headdim", "expected at least 0, 0 for any, got " + std::to_string(serves->max_headdim));
  }
}

class Registry {
 public:
  static Registry& instance() {
    static Registry registry;  // the built-ins are made on first use
    return registry;
  }

  std::shared_ptr<const List> list() {
    const std::lock_guard lock(mutex_);
    return list_;
  }

  /// In front of `before`, or where a hosted backend of this name stood that it may replace, or behind all.
  void add(std::shared_ptr<const Backend> backend, std::string_view before, bool may_replace) {
    if (!backend || backend->name().empty())
      throw Error(ErrorCode::invalid_argument, "backend: expected one with a name, got none");
    check_serves(*backend);
    const std::lock_guard lock(mutex_);
    List list = *list_;
    auto place = list.end();
    if (const auto old = find(list, backend->name()); old != list.end()) {
      if (!may_replace || !(*old)->hosted())
        throw Error(ErrorCode::invalid_argument,
                    "backend \"" + std::string(backend->name()) + "\" is registered already");
      place = list.erase(old);
    }
    if (!before.empty() && (place = find(list, before)) == list.end()) unknown_backend(before, list, "before");
    list.insert(place, std::move(backend));
    replace(std::move(list));
  }

  bool remove(std::string_view name) {
    const std::lock_guard lock(mutex_);
    List list = *list_;
    if (std::erase_if(list, [&](const auto& backend) { return backend->name() == name; }) == 0) return false;
    replace(std::move(list));
    return true;
  }

  uint64_t generation() const { return generation_.load(std::memory_order_acquire); }

 private:
  Registry() {
    add(make_cpu_backend(), {}, false);
    add(make_reference_backend(), {}, false);
    // A child must not find the mutex held by a thread that it does not have.
    pthread_atfork([] { instance().mutex_.lock(); }, [] { instance().mutex_.unlock(); },
                   [] { instance().mutex_.unlock(); });
  }

  /// With the lock held.
  void replace(List list) {
    list_ = std::make_shared<const List>(std::move(list));
    generation_.fetch_add(1, std::memory_order_release);
  }

  std::mutex mutex_;
  std::atomic<uint64_t> generation_{0};
  std::shared_ptr<const List> list_ = std::make_shared<const List>();
};

/// The backend that the call asks for by name; nullptr if it leaves the choice to us.
const Backend* asked_for(const Problem& problem, const List& list) {
  std::string_view name = problem.run.backend;
  const char* said_by = "backend";
  if (name.empty()) {
    const char* variable = std::getenv("FLASH_ATTENTION_BACKEND");
    if (variable == nullptr || *variable == '\0') return nullptr;
    name = variable, said_by = "FLASH_ATTENTION_BACKEND";
  }
  const auto found = find(list, name);
  if (found == list.end()) unknown_backend(name, list, said_by);
  return found->get();
}

/// Why a backend that is named for both passes will not serve the backward of a forward; empty if it will, as far as
/// the forward tells.
std::string refuses_backward(const Backend& backend, const Problem& problem) {
  const Serves* serves = backend.serves(Pass::backward);
  if (!serves) return "its backward is not served, and gradients will be asked for";
  Problem backward = problem;
  backward.features &= ~kForwardOnly;
  const std::string why_not = refusal(*serves, backward);
  return why_not.empty() ? why_not : why_not + " in the backward, and gradients will be asked for";
}

std::string answer(const Backend& backend, const Problem& problem, bool named, const std::vector<Veto>& vetoes) {
  for (const Veto& veto : vetoes)
    if (veto.backend == backend.name()) return veto.why_not;
  return answer(backend, problem, named);
}

bool names_device(const Backend& backend, Device device) {
  const std::span<const int32_t> types = backend.devices();
  return std::find(types.begin(), types.end(), device.type) != types.end();
}

/// The one that is asked first and serves; nullptr: nobody does.
const Backend* first_that_serves(const Problem& problem, const List& list, const Backend* named,
                                 const std::vector<Veto>& vetoes) {
  const auto serves = [&](const Backend& backend) {
    return answer(backend, problem, named != nullptr, vetoes).empty();
  };
  if (named) return serves(*named) ? named : nullptr;
  if (!problem.run.prefer.empty())
    if (const auto preferred = find(list, problem.run.prefer); preferred != list.end() && serves(**preferred))
      return preferred->get();
  for (const auto& backend : list)
    if (backend->automatic() && serves(*backend)) return backend.get();
  return nullptr;
}

[[noreturn]] void nobody_serves(const Problem& problem, const List& list, const Backend* named,
                                const std::vector<Veto>& vetoes) {
  std::string answers;
  std::vector<std::string_view> would;
  for (const auto& backend : list) {
    const std::string why_not = answer(*backend, problem, named == backend.get(), vetoes);
    if (why_not.empty())
      would.push_back(backend->name());
    else if (!named || named == backend.get())
      answers += "; " + std::string(backend->name()) + ": " + why_not;
  }
  std::string message = named ? "backend \"" + std::string(named->name()) + "\" does not serve this call"
                              : std::string("no backend serves this call by itself");
  message += " (" + describe(problem) + ")" + answers;
  if (!would.empty()) message += "; served, if asked for by name, by: " + join(would);
  const auto here = [&](const auto& backend) { return names_device(*backend, problem.device); };
  if (!named && std::none_of(list.begin(), list.end(), here))
    message += "; for tensors on " + device_text(problem.device) + " register a backend that names this device" +
               " (flash_attn.register_backend in Python), or move them to the CPU";
  throw Error(ErrorCode::not_supported, message);
}

}  // namespace

void register_backend(std::unique_ptr<Backend> backend, std::string_view before) {
  Registry::instance().add(std::move(backend), before, false);
}

void replace_backend(std::unique_ptr<Backend> backend, std::string_view before) {
  Registry::instance().add(std::move(backend), before, true);
}

void unregister_backend(std::string_view name) {
  if (!Registry::instance().remove(name)) unknown_backend(name, *Registry::instance().list(), "backend");
}

std::vector<const Backend*> registered_backends() {
  std::vector<const Backend*> backends;
  for (const auto& backend : *Registry::instance().list()) backends.push_back(backend.get());
  return backends;
}

uint64_t registry_generation() { return Registry::instance().generation(); }

std::string answer(const Backend& backend, const Problem& problem, bool named) {
  if (!names_device(backend, problem.device)) {
    std::vector<std::string> names;
    for (const int32_t type : backend.devices()) names.push_back(device_type_text(type));
    return "device: serves " + join(names) + " tensors, not those on " + device_text(problem.device);
  }
  if (std::string why_not = backend.unavailable(); !why_not.empty()) return why_not;
  const Serves* serves = backend.serves(problem.pass);
  if (!serves) return "its backward is not served";
  if (std::string why_not = refusal(*serves, problem); !why_not.empty()) return why_not;
  if (named && problem.run.differentiable && problem.pass == Pass::forward)
    if (std::string why_not = refuses_backward(backend, problem); !why_not.empty()) return why_not;
  return backend.refuses(problem);
}

Choice choose(const Problem& problem, const std::vector<Veto>& vetoes) {
  const auto list = Registry::instance().list();
  const Backend* named = asked_for(problem, *list);
  Choice choice;
  choice.backend = first_that_serves(problem, *list, named, vetoes);
  for (const auto& backend : *list)
    choice.candidates.push_back({std::string(backend->name()), choice.backend == backend.get(),
                                 answer(*backend, problem, named == backend.get(), vetoes)});
  return choice;
}

const Backend& choose_or_throw(const Problem& problem, const std::vector<Veto>& vetoes) {
  const auto list = Registry::instance().list();
  const Backend* named = asked_for(problem, *list);
  if (const Backend* backend = first_that_serves(problem, *list, named, vetoes)) return *backend;
  nobody_serves(problem, *list, named, vetoes);
}

}  // namespace flash_attn
