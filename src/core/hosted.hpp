// Hosted backends: engines written in the language of a binding (Python), in the same registry as those in C++.
//
// The core decides, the host runs: where one of these is chosen, the binding gets the checked Problem back and calls
// the engine on the caller's own tensors. No callback leads from here into the host, and no object of it is kept here.
#pragma once

#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "core/features.hpp"

namespace flash_attn {

struct Hosted {
  std::string name, description;
  std::vector<int32_t> devices;                 // DLPack's device types
  std::optional<Serves> forward{}, backward{};  // absent: nothing
  bool automatic = true;
  std::string unavailable{};  // why this machine cannot use it; empty if it can
};

/// As register_backend. Registering a name again that is hosted already replaces it, in its place unless `before` is
/// given.
void register_hosted(Hosted backend, std::string_view before = {});

}  // namespace flash_attn
