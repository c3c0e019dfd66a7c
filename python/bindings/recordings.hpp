// What hosted engines launch on a device, recorded by them and launched again without them (core/recordings.hpp).
#pragma once

#include <nanobind/nanobind.h>

#include <string>

#include "core/problem.hpp"
#include "core/recordings.hpp"

namespace flash_attn::python {

/// A Problem that is handed to the engine of `backend`. Its launches can be recorded where there is a key.
struct HostedCall : Problem {
  std::string backend, key;
};

/// The class HostedCall, and the functions around recordings.
void add_recordings(nanobind::module_& m);

/// Whether calls on this device are recorded at all: NVIDIA's, where the driver is.
bool records(Device device);

/// Launches what was recorded of calls of this key. -> the backend that it was recorded by; nullptr: nothing was, or it
/// cannot be launched now.
std::shared_ptr<const Recording> launch_recorded(const CallKey& key, const Problem& problem);

}  // namespace flash_attn::python
