// What the fake driver and its test share.
#pragma once

#include <cstdint>

struct FakeCuda {
  int result = 0;           // of every function
  void* context = nullptr;  // that is current
  int parameters = 0;       // of the kernel that will be launched, which the driver knows from its code

  // The last launch.
  void *function = nullptr, *stream = nullptr;
  void** extra = nullptr;
  unsigned sizes[7]{};  // grid, block, shared memory
  uint64_t values[512]{};
};
