// Error: the one exception type of the library.
#pragma once

#include <stdexcept>
#include <string>

#include "flash_attn/export.h"

namespace flash_attn {

enum class ErrorCode : int {
  ok = 0,
  invalid_argument = 1,  // a shape, a value, a device, overlapping memory       -> Python ValueError
  type_mismatch = 2,     // a dtype                                              -> Python TypeError
  not_supported = 3,     // well-formed, but no backend (or not the chosen one)  -> Python NotImplementedError
  internal = 4,          // a defect of this library                             -> Python RuntimeError
  out_of_memory = 5,     //                                                      -> Python MemoryError
  device_failure = 6,    // a driver or a launch failed                          -> Python RuntimeError
};

/// Thrown before anything is written, unless the code is device_failure. The message names the argument, what was
/// expected and what came. A fault while a kernel runs on a device surfaces where the caller next synchronises.
class FLASH_ATTN_API Error : public std::runtime_error {
 public:
  Error(ErrorCode code, const std::string& message) : std::runtime_error(message), code_(code) {}
  ErrorCode code() const noexcept { return code_; }

 private:
  ErrorCode code_;
};

}  // namespace flash_attn
