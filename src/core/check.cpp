// The words of the checks.
#include "core/check.hpp"

#include <cstdio>

namespace flash_attn {

std::string shape_text(const Tensor& t) {
  if (t.ndim > Tensor::kMaxDims) return "more than " + std::to_string(Tensor::kMaxDims) + " dimensions";
  std::string text = "(";
  for (int i = 0; i < t.ndim; ++i) text.append(i ? ", " : "").append(std::to_string(t.shape[i]));
  return text + (t.ndim == 1 ? ",)" : ")");
}

std::string number_text(double x) {
  char text[32];
  std::snprintf(text, sizeof text, "%.6g", x);
  return text;
}

std::string device_type_text(int32_t type) {
  switch (type) {
    case 1: return "cpu";
    case 2: return "cuda";
    case 3: return "cuda_host";
    case 4: return "opencl";
    case 7: return "vulkan";
    case 8: return "mps";
    case 10: return "rocm";
    case 11: return "rocm_host";
    case 12: return "npu";
    case 13: return "cuda_managed";
    case 14: return "xpu";
    case 15: return "webgpu";
    default: return "device type " + std::to_string(type);
  }
}

std::string device_text(Device d) {
  return d.is_cpu() ? "the CPU" : device_type_text(d.type) + ":" + std::to_string(d.index);
}

void fail(ErrorCode code, const char* argument, const std::string& message) {
  throw Error(code, std::string(argument) + ": " + message);
}

void invalid(const char* argument, const std::string& message) { fail(ErrorCode::invalid_argument, argument, message); }

void fail_rank(const char* argument, const Tensor& t, int rank, const char* layout) {
  invalid(argument, "expected " + std::to_string(rank) + (rank == 1 ? " dimension " : " dimensions ") + layout +
                        ", got " + shape_text(t));
}

void fail_dim(const char* argument, const Tensor& t, int dim, const char* meaning, int64_t expected) {
  invalid(argument, "expected " + std::string(meaning) + " = " + std::to_string(expected) + " in dimension " +
                        std::to_string(dim) + ", got " + shape_text(t));
}

void fail_dtype(const char* argument, DType expected, DType got) {
  fail(ErrorCode::type_mismatch, argument, std::string("expected ") + name_of(expected) + ", got " + name_of(got));
}

void fail_entry(const char* argument, int64_t index, const std::string& expected, int64_t value) {
  throw Error(ErrorCode::invalid_argument, std::string(argument) + "[" + std::to_string(index) + "]: expected " +
                                               expected + ", got " + std::to_string(value));
}

void check_floating(const char* argument, const Tensor& t) {
  if (is_floating(t.dtype)) return;
  fail(ErrorCode::type_mismatch, argument,
       std::string("expected float16, bfloat16, float32 or float64, got ") + name_of(t.dtype));
}

void check_int32(const char* argument, const Tensor& t) {
  check_dtype(argument, t, DType::i32);
  const int last = t.ndim - 1;
  if (last >= 0 && t.shape[last] > 1 && t.stride[last] != 1)
    invalid(argument, "expected a contiguous last dimension, got stride " + std::to_string(t.stride[last]));
}

}  // namespace flash_attn
