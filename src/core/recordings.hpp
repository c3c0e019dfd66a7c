// Recordings: the launches of a call that a hosted engine has made once, for the core to make again by itself.
//
// An engine written in Python takes longer to find its kernels' arguments than a short kernel runs. What it found is a
// function of the call's key (call_key.hpp): it may hand its launches over, and the next call of that key is launched
// from here, with the tensors, the stream and the workspace of that call.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "core/call_key.hpp"

namespace flash_attn {

/// An argument of a kernel. A number stands in the first bytes of `value`, however many the kernel reads.
struct Parameter {
  enum class Kind : uint8_t { number, tensor, workspace } kind = Kind::number;
  uint64_t value = 0;  // the number, a Role, or an offset in bytes
};

struct Launch {
  uint64_t function = 0;  // the driver's handle
  uint32_t programs = 1, threads = 1, shared_bytes = 0;
  std::vector<Parameter> parameters{};
};

struct Recording {
  std::string backend;
  int64_t workspace_bytes = 0;
  std::vector<Launch> launches{};  // in their order, on one stream
  const void* context = nullptr;   // that was current when it was made: its functions belong to it
};

/// A device's driver.
class Launcher {
 public:
  virtual ~Launcher() = default;
  /// The context that is current in this thread; nullptr: none.
  virtual const void* context() const = 0;
  /// Queues a kernel on `stream`. `values`: one of 8 bytes per parameter. Throws device_failure.
  virtual void launch(const Launch& kernel, uint64_t* values, void* stream) const = 0;
};

/// Launches a recording on the tensors, stream and workspace of a call of its key. False, with nothing done, where it
/// cannot: another context is current, or it needs workspace and the call has no allocator or gets no memory from it.
/// The engine is asked then, and where memory has run out, its framework says so with its own error.
bool replay(const Recording& recording, const Launcher& launcher, const CallKey& key, Device device, const Run& run);

/// Recordings by key. Forgets all when there are many, as a length in the keys may grow step by step.
class Recordings {
 public:
  explicit Recordings(std::size_t most = 2048) : most_(most) {}
  /// nullptr: there is none.
  std::shared_ptr<const Recording> find(const std::string& key) const;
  void add(const std::string& key, Recording recording);
  void clear();
  std::size_t size() const;

 private:
  const std::size_t most_;
  mutable std::mutex mutex_;
  std::unordered_map<std::string, std::shared_ptr<const Recording>> table_;
};

}  // namespace flash_attn
