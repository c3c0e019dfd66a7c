#include "device.hpp"

#include <algorithm>

namespace flash_attn::python {
namespace {

/// torch before 2.10 has no exchange table: its current stream, asked for in Python. XPU: a sycl::queue*.
void* torch_stream(Device device) {
  const char* function = device.type == 14 ? "_xpu_getCurrentRawStream" : "_cuda_getCurrentRawStream";
  const nb::object torch = nb::module_::import_("torch._C");
  if (!nb::hasattr(torch, function)) return nullptr;
  return reinterpret_cast<void*>(nb::cast<uintptr_t>(torch.attr(function)(device.index)));
}

bool has_torch_streams(Device device) { return device.type == 2 || device.type == 10 || device.type == 14; }

}  // namespace

DeviceServices::DeviceServices(nb::handle q, Device device) : device_(device) {
  if (device.is_cpu()) return;
  api_ = exchange_api(q);
  asks_torch_ = !api_ && has_torch_streams(device) && nb::hasattr(q, "is_meta");
}

DeviceServices::~DeviceServices() {
  for (dlpack::ManagedVersioned* m : live_) m->deleter(m);
}

void DeviceServices::offer(Run& run) {
  if (!api_) {
    if (asks_torch_) run.stream = torch_stream(device_);
    return;
  }
  if (api_->current_work_stream && api_->current_work_stream(device_.type, device_.index, &run.stream) != 0)
    throw Error(ErrorCode::device_failure, "stream: the framework cannot tell the current one of q's device");
  if (api_->allocate) run.allocator = {allocate, release, this};
}

void* DeviceServices::allocate(void* self, int32_t device_type, int32_t device_index, int64_t bytes, void*) {
  auto& services = *static_cast<DeviceServices*>(self);
  int64_t shape[1] = {bytes}, strides[1] = {1};
  dlpack::Tensor prototype{nullptr, {device_type, device_index}, 1, {dlpack::kUInt, 8, 1}, shape, strides, 0};
  dlpack::ManagedVersioned* memory = nullptr;
  const auto ignore_words = [](void*, const char*, const char*) {};
  services.live_.reserve(services.live_.size() + 1);
  if (services.api_->allocate(&prototype, &memory, nullptr, ignore_words) != 0 || !memory) return nullptr;
  services.live_.push_back(memory);
  return static_cast<char*>(memory->tensor.data) + memory->tensor.byte_offset;
}

void DeviceServices::release(void* self, int32_t, int32_t, void* memory, void*) {
  auto& live = static_cast<DeviceServices*>(self)->live_;
  const auto found = std::find_if(live.begin(), live.end(), [&](const dlpack::ManagedVersioned* m) {
    return static_cast<char*>(m->tensor.data) + m->tensor.byte_offset == memory;
  });
  if (found == live.end()) return;
  (*found)->deleter(*found);
  live.erase(found);
}

bool workspace_works(nb::handle q, int64_t bytes) {
  Owners owners;
  const Tensor t = tensor(q, "q", owners);
  DeviceServices services(q, t.device);
  Run run;
  services.offer(run);
  if (!run.allocator.allocate) return false;
  void* const a = run.allocator.allocate(run.allocator.context, t.device.type, t.device.index, bytes, run.stream);
  void* const b = run.allocator.allocate(run.allocator.context, t.device.type, t.device.index, bytes, run.stream);
  if (a) run.allocator.release(run.allocator.context, t.device.type, t.device.index, a, run.stream);
  return a && b && a != b;
}

}  // namespace flash_attn::python
