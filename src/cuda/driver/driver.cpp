#include "cuda/driver/driver.hpp"

#include <dlfcn.h>

#include <array>
#include <string>

namespace flash_attn::cuda {
namespace {

template <class Function>
bool find(void* library, const char* name, Function& function) {
  function = reinterpret_cast<Function>(dlsym(library, name));
  return function != nullptr;
}

}  // namespace

Driver::Driver(const char* library) {
  void* const handle = dlopen(library, RTLD_LAZY | RTLD_LOCAL);
  if (!handle) return;
  decltype(launch_) launch = nullptr;
  if (find(handle, "cuCtxGetCurrent", current_) && find(handle, "cuGetErrorName", name_) &&
      find(handle, "cuGetErrorString", text_) && find(handle, "cuLaunchKernel", launch))
    launch_ = launch;
}

const void* Driver::context() const {
  void* context = nullptr;
  return loaded() && current_(&context) == 0 ? context : nullptr;
}

void Driver::launch(const Launch& kernel, uint64_t* values, void* stream) const {
  constexpr std::size_t kUsual = 192;
  std::array<void*, kUsual> usual;
  std::vector<void*> many;
  const std::size_t n = kernel.parameters.size();
  if (n > kUsual) many.resize(n);
  void** const pointers = n > kUsual ? many.data() : usual.data();
  for (std::size_t i = 0; i < n; ++i) pointers[i] = values + i;
  const Result result = launch_(reinterpret_cast<void*>(kernel.function), kernel.programs, 1, 1, kernel.threads, 1, 1,
                                kernel.shared_bytes, stream, pointers, nullptr);
  if (result != 0) throw Error(ErrorCode::device_failure, "CUDA: " + words_of(result));
}

std::string Driver::words_of(Result result) const {
  const char *name = nullptr, *text = nullptr;
  name_(result, &name), text_(result, &text);
  return std::string(name ? name : "error") + " (" + std::to_string(result) + ")" +
         (text ? std::string(", ") + text : "");
}

const Driver& driver() {
  static const Driver instance("libcuda.so.1");
  return instance;
}

}  // namespace flash_attn::cuda
