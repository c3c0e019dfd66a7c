// XLA's foreign function interface, the binary layout only: what the runtime hands to a handler, and how one answers.
//
// XLA promises that fields keep their places within major version 0 (xla/ffi/api/c_api.h, which jaxlib ships). Members
// that this library never reads are declared only as far as they move the ones it does.
#pragma once

#include <cstddef>
#include <cstdint>

namespace flash_attn::xla {

struct Extension {
  std::size_t struct_size;
  int32_t type;
  Extension* next;
};
inline constexpr int32_t kMetadataExtension = 1;

struct Version {
  std::size_t struct_size;
  Extension* extensions;
  int32_t major, minor;
};

/// Asked for once, when a handler is registered: the version of the interface that it was written for.
struct Metadata {
  std::size_t struct_size;
  Version version;
};
struct MetadataExtension {
  Extension base;
  Metadata* metadata;
};

enum DataType : int32_t { kBool = 1, kS32 = 4, kS64 = 5, kF16 = 10, kF32 = 11, kF64 = 12, kBf16 = 16 };

/// Row-major, compact.
struct Buffer {
  std::size_t struct_size;
  Extension* extensions;
  DataType dtype;
  void* data;
  int64_t rank;
  int64_t* dims;
};

struct Text {
  const char* data;
  std::size_t size;
};
struct Scalar {
  DataType dtype;
  void* value;
};
enum AttributeType : int32_t { kScalar = 3, kString = 4 };

struct Buffers {  // operands or results
  std::size_t struct_size;
  Extension* extensions;
  int64_t size;
  int32_t* types;
  Buffer** buffers;
};
struct Attributes {
  std::size_t struct_size;
  Extension* extensions;
  int64_t size;
  AttributeType* types;
  Text** names;
  void** values;  // Scalar or Text
};

struct CallError;  // XLA's
enum ErrorCode : int32_t { kInvalidArgument = 3, kResourceExhausted = 8, kUnimplemented = 12, kInternal = 13 };
struct NewError {
  std::size_t struct_size;
  Extension* extensions;
  const char* message;
  ErrorCode code;
};

struct Api {
  std::size_t struct_size;
  Extension* extensions;
  Version version;
  const void* internal;
  CallError* (*create_error)(NewError*);
};

struct CallFrame {
  std::size_t struct_size;
  Extension* extensions;
  const Api* api;
  void* context;
  int32_t stage;
  Buffers operands, results;
  Attributes attributes;
};

/// nullptr: done.
using Handler = CallError*(CallFrame*);

}  // namespace flash_attn::xla
