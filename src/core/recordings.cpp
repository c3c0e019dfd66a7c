#include "core/recordings.hpp"

#include <algorithm>
#include <utility>

namespace flash_attn {
namespace {

/// Memory of the call's allocator, given back in the order of the stream.
class Workspace {
 public:
  Workspace(const Run& run, Device device, int64_t bytes) : run_(run), device_(device) {
    if (!bytes) return;
    const Allocator& a = run.allocator;
    memory_ = a.allocate(a.context, device.type, device.index, bytes, run.stream);
    is_missing_ = !memory_;
  }
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  ~Workspace() {
    const Allocator& a = run_.allocator;
    if (memory_ && a.release) a.release(a.context, device_.type, device_.index, memory_, run_.stream);
  }
  bool is_missing() const { return is_missing_; }
  uint64_t address() const { return reinterpret_cast<uintptr_t>(memory_); }

 private:
  const Run& run_;
  Device device_;
  void* memory_ = nullptr;
  bool is_missing_ = false;
};

}  // namespace

bool replay(const Recording& recording, const Launcher& launcher, const CallKey& key, Device device, const Run& run) {
  if (recording.workspace_bytes && !run.allocator.allocate) return false;
  const void* context = launcher.context();
  if (!context || context != recording.context) return false;
  std::size_t most = 0;
  for (const Launch& launch : recording.launches) most = std::max(most, launch.parameters.size());
  std::vector<uint64_t> values(most);
  const Workspace workspace(run, device, recording.workspace_bytes);
  if (workspace.is_missing()) return false;
  for (const Launch& launch : recording.launches) {
    for (std::size_t i = 0; i < launch.parameters.size(); ++i) {
      const Parameter& p = launch.parameters[i];
      switch (p.kind) {
        case Parameter::Kind::number: values[i] = p.value; break;
        case Parameter::Kind::tensor: values[i] = reinterpret_cast<uintptr_t>(key.addresses[p.value]); break;
        case Parameter::Kind::workspace: values[i] = workspace.address() + p.value; break;
      }
    }
    launcher.launch(launch, values.data(), run.stream);
  }
  return true;
}

std::shared_ptr<const Recording> Recordings::find(const std::string& key) const {
  const std::lock_guard lock(mutex_);
  const auto found = table_.find(key);
  return found == table_.end() ? nullptr : found->second;
}

void Recordings::add(const std::string& key, Recording recording) {
  auto shared = std::make_shared<const Recording>(std::move(recording));
  const std::lock_guard lock(mutex_);
  if (table_.size() >= most_) table_.clear();
  table_[key] = std::move(shared);
}

void Recordings::clear() {
  const std::lock_guard lock(mutex_);
  table_.clear();
}

std::size_t Recordings::size() const {
  const std::lock_guard lock(mutex_);
  return table_.size();
}

}  // namespace flash_attn
