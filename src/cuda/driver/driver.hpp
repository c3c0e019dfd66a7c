// NVIDIA's driver, found at run time: nothing is linked, and a machine without it is none the worse.
#pragma once

#include "core/recordings.hpp"

namespace flash_attn::cuda {

class Driver final : public Launcher {
 public:
  /// Of a library that is loaded, or can be; it stays for the life of the process.
  explicit Driver(const char* library);

  /// Whether it is there, with all that is needed of it. If not, there is no context and nothing can be launched.
  bool loaded() const { return launch_ != nullptr; }
  const void* context() const override;
  void launch(const Launch& kernel, uint64_t* values, void* stream) const override;

 private:
  using Result = int;  // CUresult, 0: success
  std::string words_of(Result result) const;

  Result (*current_)(void** context) = nullptr;
  Result (*name_)(Result result, const char** name) = nullptr;
  Result (*text_)(Result result, const char** text) = nullptr;
  Result (*launch_)(void* function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                    unsigned block_y, unsigned block_z, unsigned shared_bytes, void* stream, void** parameters,
                    void** extra) = nullptr;
};

/// The process's own, loaded when this is called first.
const Driver& driver();

}  // namespace flash_attn::cuda
