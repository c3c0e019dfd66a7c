// A device call's stream and workspace, from the exchange table of the caller's tensors: no libtorch, no Python.
#pragma once

#include <vector>

#include "from_python.hpp"

namespace flash_attn::python {

class DeviceServices {
 public:
  /// Of the type of `q`. On the CPU there is nothing to offer.
  DeviceServices(nb::handle q, Device device);
  DeviceServices(const DeviceServices&) = delete;
  DeviceServices& operator=(const DeviceServices&) = delete;
  ~DeviceServices();

  /// The framework's current stream on the device, and its allocator (torch >= 2.10), which is ordered on that stream.
  /// They serve as long as this object lives.
  void offer(Run& run);

 private:
  static void* allocate(void* self, int32_t device_type, int32_t device_index, int64_t bytes, void* stream);
  static void release(void* self, int32_t device_type, int32_t device_index, void* memory, void* stream);

  const dlpack::ExchangeApi* api_ = nullptr;
  bool asks_torch_ = false;  // a tensor of a torch without exchange table
  Device device_{};
  std::vector<dlpack::ManagedVersioned*> live_;
};

/// Whether workspace of so many bytes can be had, written to and given back as backends do: for tests.
bool workspace_works(nb::handle q, int64_t bytes);

}  // namespace flash_attn::python
