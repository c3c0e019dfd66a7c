// A driver that launches nothing and notes what it was asked for: tests load it in the place of libcuda.so.1.
#include "cuda/fake_libcuda.hpp"

#include <cstring>

#define EXPORTED extern "C" __attribute__((visibility("default")))

namespace {
FakeCuda state;
}

EXPORTED FakeCuda* fake_cuda() { return &state; }

EXPORTED int cuCtxGetCurrent(void** context) {
  *context = state.context;
  return state.result;
}
EXPORTED int cuGetErrorName(int, const char** name) {
  *name = "CUDA_ERROR_TOY";
  return 0;
}
EXPORTED int cuGetErrorString(int, const char** text) {
  *text = "a toy broke";
  return 0;
}
EXPORTED int cuLaunchKernel(void* function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by,
                            unsigned bz, unsigned shared_bytes, void* stream, void** parameters, void** extra) {
  if (state.result != 0) return state.result;
  state.function = function, state.stream = stream, state.extra = extra;
  const unsigned sizes[] = {gx, gy, gz, bx, by, bz, shared_bytes};
  std::memcpy(state.sizes, sizes, sizeof sizes);
  for (int i = 0; i < state.parameters; ++i) std::memcpy(&state.values[i], parameters[i], sizeof state.values[i]);
  return 0;
}
