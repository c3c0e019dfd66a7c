// DLPack 1.x, the binary layout only: what a producer hands over, and the C exchange table of its tensor type.
//
// The specification is https://dmlc.github.io/dlpack; layouts are fixed within a major version. Fields that this
// library never reads are declared only as far as they move the ones it does.
#pragma once

#include <cstdint>

namespace flash_attn::dlpack {

struct Version {
  uint32_t major, minor;
};

struct Device {
  int32_t type, id;
};

enum TypeCode : uint8_t { kInt = 0, kUInt = 1, kFloat = 2, kBfloat = 4, kComplex = 5, kBool = 6 };

struct DataType {
  uint8_t code, bits;
  uint16_t lanes;
};

struct Tensor {
  void* data;
  Device device;
  int32_t ndim;
  DataType dtype;
  int64_t* shape;
  int64_t* strides;  // in elements; nullptr: row-major (before 1.2)
  uint64_t byte_offset;
};

/// Capsule "dltensor".
struct Managed {
  Tensor tensor;
  void* context;
  void (*deleter)(Managed*);
};

/// Capsule "dltensor_versioned".
struct ManagedVersioned {
  Version version;
  void* context;
  void (*deleter)(ManagedVersioned*);
  uint64_t flags;
  Tensor tensor;
};

/// Capsule "dlpack_exchange_api", the attribute `__dlpack_c_exchange_api__` of a tensor type. Functions return 0, or
/// -1.
struct ExchangeApi {
  Version version;
  ExchangeApi* previous;
  /// Memory of the prototype's shape, dtype and device from the framework's own allocator, on its current stream.
  int (*allocate)(Tensor* prototype, ManagedVersioned** out, void* error_context,
                  void (*set_error)(void* error_context, const char* kind, const char* message));
  void* managed_from_object;
  void* managed_to_object;
  int (*tensor_from_object)(void* object, Tensor* out);  // borrowed: valid while the object lives; may be nullptr
  int (*current_work_stream)(int32_t device_type, int32_t device_id, void** out);
};

}  // namespace flash_attn::dlpack
