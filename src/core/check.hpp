// Checks: small helpers that compare one property of one tensor and throw an Error in the words of the API.
//
// The comparisons are inline and allocate nothing; the messages are built out of line, only when a check fails.
#pragma once

#include <cstdint>
#include <string>

#include "flash_attn/flash_attn.hpp"

namespace flash_attn {

/// "(2, 128, 64)"
std::string shape_text(const Tensor& t);
/// "3e+38", "0.125"
std::string number_text(double x);
/// "cpu", "cuda", "xpu": torch's names of DLPack's device types, but for 10, which torch calls cuda and we rocm.
std::string device_type_text(int32_t type);
/// "the CPU", "cuda:0"
std::string device_text(Device d);
/// "cpu, reference"
template <class Names>
std::string join(const Names& names, const char* separator = ", ") {
  std::string text;
  for (const auto& name : names) text.append(text.empty() ? "" : separator).append(name);
  return text;
}

/// Throws "<argument>: <message>".
[[noreturn]] void fail(ErrorCode code, const char* argument, const std::string& message);
[[noreturn]] void invalid(const char* argument, const std::string& message);
[[noreturn]] void fail_rank(const char* argument, const Tensor& t, int rank, const char* layout);
[[noreturn]] void fail_dim(const char* argument, const Tensor& t, int dim, const char* meaning, int64_t expected);
[[noreturn]] void fail_dtype(const char* argument, DType expected, DType got);
/// "<argument>[<index>]: expected <expected>, got <value>"
[[noreturn]] void fail_entry(const char* argument, int64_t index, const std::string& expected, int64_t value);

constexpr bool is_floating(DType t) {
  return t == DType::f16 || t == DType::bf16 || t == DType::f32 || t == DType::f64;
}

/// `layout` names the dimensions: "(batch, seqlen_q, nheads, headdim)".
inline void check_rank(const char* argument, const Tensor& t, int rank, const char* layout) {
  if (t.ndim != rank) fail_rank(argument, t, rank, layout);
}
/// Dimension `dim` of `t`, which is called `meaning`, must be `expected`.
inline void check_dim(const char* argument, const Tensor& t, int dim, const char* meaning, int64_t expected) {
  if (t.shape[dim] != expected) fail_dim(argument, t, dim, meaning, expected);
}
inline void check_dtype(const char* argument, const Tensor& t, DType expected) {
  if (t.dtype != expected) fail_dtype(argument, expected, t.dtype);
}
/// Any of the four floating dtypes.
void check_floating(const char* argument, const Tensor& t);
/// int32, and the last dimension contiguous, since kernels read these tables by plain pointers.
void check_int32(const char* argument, const Tensor& t);

}  // namespace flash_attn
