// What bounds the number of threads, and the number that follows.
#pragma once

namespace flash_attn::cpu {

struct ThreadLimits {
  int online = 0;     // logical CPUs of the machine
  int affinity = 0;   // those this process may run on
  double quota = 0;   // CPUs that the cgroup grants; 0: no limit
  int requested = 0;  // FLASH_ATTENTION_NUM_THREADS; 0: not set, or no positive number
  int omp = 0;        // OMP_NUM_THREADS; the same
};
ThreadLimits thread_limits();

/// What was requested, else the least of the other limits (a quota is rounded to whole CPUs); at least 1.
int default_threads(const ThreadLimits& limits);

}  // namespace flash_attn::cpu
