// The registry of backends, and the choice among them.
//
// Readers take a snapshot of the list: a call never waits for another, and a backend may itself call the registry.
// Whoever unregisters a backend sees to it that no call is using it.
#include <pthread.h>

#include <cstdlib>
#include <mutex>
#include <utility>

#include "core/backend.hpp"
#include "core/check.hpp"

namespace flash_attn {
namespace {

using List = std::vector<std::shared_ptr<const Backend>>;

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

  void add(std::shared_ptr<const Backend> backend) {
    if (!backend || backend->name().empty())
      throw Error(ErrorCode::invalid_argument, "backend: expected one with a name, got none");
    const std::lock_guard lock(mutex_);
    for (const auto& other : *list_)
      if (other->name() == backend->name())
        throw Error(ErrorCode::invalid_argument,
                    "backend \"" + std::string(backend->name()) + "\" is registered already");
    List list = *list_;
    list.push_back(std::move(backend));
    list_ = std::make_shared<const List>(std::move(list));
  }

  bool remove(std::string_view name) {
    const std::lock_guard lock(mutex_);
    List list = *list_;
    if (std::erase_if(list, [&](const auto& backend) { return backend->name() == name; }) == 0) return false;
    list_ = std::make_shared<const List>(std::move(list));
    return true;
  }

 private:
  Registry() {
    add(make_cpu_backend());
    add(make_reference_backend());
    // A child must not find the mutex held by a thread that it does not have.
    pthread_atfork([] { instance().mutex_.lock(); }, [] { instance().mutex_.unlock(); },
                   [] { instance().mutex_.unlock(); });
  }

  std::mutex mutex_;
  std::shared_ptr<const List> list_ = std::make_shared<const List>();
};

[[noreturn]] void unknown_backend(std::string_view name, const List& list, const char* said_by) {
  std::vector<std::string_view> names;
  for (const auto& backend : list) names.push_back(backend->name());
  throw Error(ErrorCode::invalid_argument,
              std::string(said_by) + ": expected one of " + join(names) + ", got \"" + std::string(name) + "\"");
}

/// The backend the call asks for by name; nullptr if it leaves the choice to us.
const Backend* asked_for(const Problem& problem, const List& list) {
  std::string_view name = problem.run.backend;
  const char* said_by = "backend";
  if (name.empty()) {
    const char* variable = std::getenv("FLASH_ATTENTION_BACKEND");
    if (variable == nullptr || *variable == '\0') return nullptr;
    name = variable, said_by = "FLASH_ATTENTION_BACKEND";
  }
  for (const auto& backend : list)
    if (backend->name() == name) return backend.get();
  unknown_backend(name, list, said_by);
}

std::string answer(const Backend& backend, const Problem& problem) {
  std::string why_not = backend.unavailable();
  return why_not.empty() ? backend.refuses(problem) : why_not;
}

[[noreturn]] void nobody_serves(const Problem& problem, const List& list, const Backend* named) {
  std::string answers;
  std::vector<std::string_view> would;
  for (const auto& backend : list) {
    const std::string why_not = answer(*backend, problem);
    if (why_not.empty())
      would.push_back(backend->name());
    else if (!named || named == backend.get())
      answers += "; " + std::string(backend->name()) + ": " + why_not;
  }
  std::string message = named ? "backend \"" + std::string(named->name()) + "\" does not serve this call"
                              : std::string("no backend serves this call by itself");
  message += " (" + describe(problem) + ")" + answers;
  if (!would.empty()) message += "; served, if asked for by name, by: " + join(would);
  throw Error(ErrorCode::not_supported, message);
}

}  // namespace

void register_backend(std::unique_ptr<Backend> backend) { Registry::instance().add(std::move(backend)); }

void unregister_backend(std::string_view name) {
  if (!Registry::instance().remove(name)) unknown_backend(name, *Registry::instance().list(), "backend");
}

std::vector<const Backend*> registered_backends() {
  std::vector<const Backend*> backends;
  for (const auto& backend : *Registry::instance().list()) backends.push_back(backend.get());
  return backends;
}

Choice choose(const Problem& problem) {
  const auto list = Registry::instance().list();
  const Backend* named = asked_for(problem, *list);
  Choice choice;
  for (const auto& backend : *list) {
    Candidate candidate{std::string(backend->name()), false, answer(*backend, problem)};
    const bool eligible = named ? named == backend.get() : backend->automatic();
    if (!choice.backend && eligible && candidate.why_not.empty()) {
      candidate.chosen = true;
      choice.backend = backend.get();
    }
    choice.candidates.push_back(std::move(candidate));
  }
  return choice;
}

const Backend& choose_or_throw(const Problem& problem) {
  const auto list = Registry::instance().list();
  const Backend* named = asked_for(problem, *list);
  for (const auto& backend : *list)
    if ((named ? named == backend.get() : backend->automatic()) && answer(*backend, problem).empty()) return *backend;
  nobody_serves(problem, *list, named);
}

}  // namespace flash_attn
