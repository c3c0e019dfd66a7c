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

struct ThreadLimits {
  int online = 0;     // logical CPUs of the machine
  int affinity = 0;   // those this process may run on
  double quota = 0;   // CPUs that the cgroup grants; 0: no limit
  int requested = 0;  // FLASH_ATTENTION_NUM_THREADS; 0: not set, or no positive number
  int omp = 0;        // OMP_NUM_THREADS; the same
};
ThreadLimits thread_limits();

struct Gpus {
  std::vector<std::string> found;  // one line each
  bool driver = false;             // the CUDA driver's library loads
};
Gpus gpus();

}  // namespace flash_attn::cli
