// What the operating system says of this machine.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace flash_attn::cli {

struct Cache {
  std::string name;  // "L1d", "L2", "L3"
  int64_t bytes = 0;
  int shared_by = 0;  // logical CPUs; 0: not known
};

/// "AMD EPYC 9654", or the architecture's name where the system gives no model.
std::string cpu_model();
/// Data and unified caches of the first CPU; empty if the system does not say.
std::vector<Cache> caches();

struct Gpus {
  std::vector<std::string> found;  // one line each
  bool driver = false;             // the CUDA driver's library loads
};
Gpus gpus();

}  // namespace flash_attn::cli
