// What bounds the number of threads, and the number that follows.
#pragma once

namespace flash_attn::cpu {

struct ThreadLimits {
  int online = 0;     // logical CPUs of the machine
  int affinity = 0;   // those this process may run on
  double quota = 0;   // CPUs that the cgroup grants; 0: no limit
  int requested = 0;  // FLASH_ATTENTION_NUM_THREADS; 0: not set
  int omp = 0;        // OMP_NUM_THREADS; 0: not set, or nothing that OpenMP understands
};
/// Throws invalid_argument where FLASH_ATTENTION_NUM_THREADS is no number, or not one from 1 to most_threads().
ThreadLimits thread_limits();

/// More threads than this are refused: 1024, or the machine's CPUs if it has more. Beyond its CPUs threads only take
/// turns, and each has a stack and a workspace.
int most_threads();

/// What was requested, else the least of the other limits (a quota is rounded to whole CPUs); at least 1.
int default_threads(const ThreadLimits& limits);

}  // namespace flash_attn::cpu
