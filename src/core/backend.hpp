// Backend: the one interface through which the core knows an engine; and the registry that chooses among them.
#pragma once

#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "core/problem.hpp"

namespace flash_attn {

/// The device types of backends that compute in the CPU's memory.
inline constexpr int32_t kHostMemory[] = {1};

class Backend {
 public:
  virtual ~Backend() = default;
  virtual std::string_view name() const = 0;
  virtual std::string_view description() const = 0;
  /// DLPack's device types whose tensors it takes. It is never asked about a Problem of another device.
  virtual std::span<const int32_t> devices() const = 0;
  /// What it serves of a pass, as data; nullptr: nothing. The same pointer as long as the backend is registered.
  virtual const Serves* serves(Pass) const = 0;
  /// Why this machine cannot use it; empty if it can.
  virtual std::string unavailable() const { return {}; }
  /// What data cannot say: why it will not serve this Problem, in words that name the argument; empty if it will.
  virtual std::string refuses(const Problem&) const { return {}; }
  /// Whether it may be chosen without being asked for by name (the oracle may not: it is slow).
  virtual bool automatic() const { return true; }
  /// Whether it runs in Python (core/hosted.hpp): forward and backward are not for the core to call.
  virtual bool hosted() const { return false; }
  /// The plan in words, for `explain`.
  virtual std::string plan(const Problem&) const { return {}; }
  /// First, if problem.append is present, new keys join the cache and queries are rotated (core/append.hpp). Then every
  /// row of out (and lse) is written; rows of no sequence become 0 (lse: problem.empty_lse()).
  virtual void forward(const Problem&) const = 0;
  /// Writes every row of dq, dk, dv, and of dbias and dsink where present; rows of no sequence become 0.
  virtual void backward(const Problem&) const = 0;
};

/// Adds a backend, in front of the one called `before`, or behind all: those in front are preferred. Throws
/// invalid_argument if the name is taken, nobody is called `before`, or what it serves has limits that are none.
void register_backend(std::unique_ptr<Backend> backend, std::string_view before = {});
/// The same, but takes the place of a hosted backend of that name, if there is one.
void replace_backend(std::unique_ptr<Backend> backend, std::string_view before = {});
void unregister_backend(std::string_view name);
std::vector<const Backend*> registered_backends();
/// Grows whenever a backend comes or goes: what was chosen before may be chosen no more.
uint64_t registry_generation();

/// Why `backend` will not serve `problem`, empty if it will: by device, then availability, capability data, and its own
/// word. With run.differentiable a backend that is `named` must also serve the backward, as far as that can be known.
std::string answer(const Backend& backend, const Problem& problem, bool named);

/// Words of backends that refused this very problem after they had been chosen.
struct Veto {
  std::string backend, why_not;
};

struct Choice {
  const Backend* backend = nullptr;  // nullptr: nobody serves the problem
  std::vector<Candidate> candidates;
};
/// By Problem.run.backend, else FLASH_ATTENTION_BACKEND, else run.prefer if it serves, else the first that serves.
/// Never throws for "nobody".
Choice choose(const Problem& problem, const std::vector<Veto>& vetoes = {});
/// The same, but throws not_supported naming what is unsupported, by whom, and what would work.
const Backend& choose_or_throw(const Problem& problem, const std::vector<Veto>& vetoes = {});

// The built-in backends, in order of preference. Each lives in its own folder and includes nothing of the others.
std::unique_ptr<Backend> make_cpu_backend();
std::unique_ptr<Backend> make_reference_backend();

}  // namespace flash_attn
