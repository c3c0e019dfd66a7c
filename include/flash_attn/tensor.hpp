// Tensor: a non-owning, strided view of memory. The only data type that crosses the API.
#pragma once

#include <cstddef>
#include <cstdint>
#include <initializer_list>

namespace flash_attn {

enum class DType : int32_t { f16 = 0, bf16 = 1, f32 = 2, f64 = 3, i32 = 4, i64 = 5 };

constexpr std::size_t size_of(DType t) {
  switch (t) {
    case DType::f16:
    case DType::bf16: return 2;
    case DType::f32:
    case DType::i32: return 4;
    case DType::f64:
    case DType::i64: return 8;
  }
  return 0;
}

constexpr const char* name_of(DType t) {
  switch (t) {
    case DType::f16: return "float16";
    case DType::bf16: return "bfloat16";
    case DType::f32: return "float32";
    case DType::f64: return "float64";
    case DType::i32: return "int32";
    case DType::i64: return "int64";
  }
  return "unknown";
}

/// Where the memory lives. The numbers of `type` are DLPack's (DLDeviceType): 1 CPU, 2 CUDA, 8 Metal, 10 ROCm, 14
/// oneAPI.
struct Device {
  int32_t type = 1;  // kDLCPU
  int32_t index = 0;
  bool operator==(const Device&) const = default;
  bool is_cpu() const { return type == 1; }
  /// Whether `Tensor::data` is an address. OpenCL (4), Vulkan (7), Metal (8) and WebGPU (15) give handles.
  bool has_addresses() const { return type != 4 && type != 7 && type != 8 && type != 15; }
};

/// A view: `shape` and `stride` (in elements, not bytes) of `ndim` dimensions over `data`.
/// A default-constructed Tensor is absent: optional arguments are left that way.
struct Tensor {
  static constexpr int kMaxDims = 5;

  void* data = nullptr;
  DType dtype = DType::f32;
  Device device{};
  int32_t ndim = -1;
  int64_t shape[kMaxDims]{};
  int64_t stride[kMaxDims]{};

  bool present() const { return ndim >= 0; }
  int64_t numel() const {
    int64_t n = 1;
    for (int i = 0; i < ndim; ++i) n *= shape[i];
    return n;
  }
};

/// A contiguous view of `data`, row-major, with an explicit dtype (fp16 and bf16 have no C++ type here).
inline Tensor view(const void* data, DType dtype, std::initializer_list<int64_t> shape) {
  Tensor t;
  t.data = const_cast<void*>(data);
  t.dtype = dtype;
  t.ndim = static_cast<int32_t>(shape.size() <= Tensor::kMaxDims ? shape.size() : Tensor::kMaxDims + 1);
  if (t.ndim > Tensor::kMaxDims) return t;  // refused by every entry point, by its rank
  int i = 0;
  for (int64_t n : shape) t.shape[i++] = n;
  uint64_t s = 1;  // unsigned: an absurd shape wraps, and is refused by the entry points
  for (i = t.ndim - 1; i >= 0; --i) {
    t.stride[i] = static_cast<int64_t>(s);
    s *= static_cast<uint64_t>(t.shape[i]);
  }
  return t;
}

inline Tensor view(const float* data, std::initializer_list<int64_t> shape) { return view(data, DType::f32, shape); }
inline Tensor view(const double* data, std::initializer_list<int64_t> shape) { return view(data, DType::f64, shape); }
inline Tensor view(const int32_t* data, std::initializer_list<int64_t> shape) { return view(data, DType::i32, shape); }

}  // namespace flash_attn
