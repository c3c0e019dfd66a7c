// Backend: the one interface through which the core knows an engine; and the registry that chooses among them.
#pragma once

#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "core/problem.hpp"

namespace flash_attn {

class Backend {
 public:
  virtual ~Backend() = default;
  virtual std::string_view name() const = 0;
  virtual std::string_view description() const = 0;
  /// Why this machine cannot use it; empty if it can.
  virtual std::string unavailable() const { return {}; }
  /// Why it will not serve this Problem, in words that name the argument; empty if it will.
  virtual std::string refuses(const Problem&) const = 0;
  /// Whether it may be chosen without being asked for by name (the oracle may not: it is slow).
  virtual bool automatic() const { return true; }
  /// The plan in words, for `explain`.
  virtual std::string plan(const Problem&) const { return {}; }
  /// What comes before attention (core/append.hpp): new keys join the cache, rotated queries are written to `q`. A
  /// backend with threads or memory of its own overrides it; forward then finds the keys in place and q rotated.
  virtual void append(const Problem&, const Operand& q) const;
  /// Writes every row of out (and lse), or of dq, dk, dv (and dlse's fellows); rows of no sequence become 0
  /// (lse: problem.empty_lse()). Called only if it does not refuse.
  virtual void forward(const Problem&) const = 0;
  virtual void backward(const Problem&) const = 0;
};

/// Adds a backend; those added earlier are preferred. Throws invalid_argument if the name is taken.
void register_backend(std::unique_ptr<Backend> backend);
void unregister_backend(std::string_view name);
std::vector<const Backend*> registered_backends();

struct Choice {
  const Backend* backend = nullptr;  // nullptr: nobody serves the problem
  std::vector<Candidate> candidates;
};
/// By Problem.run.backend, else FLASH_ATTENTION_BACKEND, else the first that serves. Never throws for "nobody".
Choice choose(const Problem& problem);
/// The same, but throws not_supported naming what is unsupported, by whom, and what would work.
const Backend& choose_or_throw(const Problem& problem);

// The built-in backends, in order of preference. Each lives in its own folder and includes nothing of the others.
std::unique_ptr<Backend> make_cpu_backend();
std::unique_ptr<Backend> make_reference_backend();

}  // namespace flash_attn
