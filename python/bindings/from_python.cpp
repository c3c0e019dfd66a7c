#include "from_python.hpp"

#include <algorithm>
#include <optional>
#include <string>
#include <string_view>

namespace flash_attn::python {
namespace {

std::string text(nb::handle object) { return nb::cast<std::string>(nb::steal<nb::str>(PyObject_Str(object.ptr()))); }

std::string class_name(nb::handle object) { return nb::cast<std::string>(nb::handle(object.type()).attr("__name__")); }

std::optional<DType> dtype_of(dlpack::DataType t) {
  if (t.lanes != 1) return {};
  if (t.code == dlpack::kFloat && t.bits == 32) return DType::f32;
  if (t.code == dlpack::kBfloat && t.bits == 16) return DType::bf16;
  if (t.code == dlpack::kFloat && t.bits == 16) return DType::f16;
  if (t.code == dlpack::kFloat && t.bits == 64) return DType::f64;
  if (t.code == dlpack::kInt && t.bits == 32) return DType::i32;
  if (t.code == dlpack::kInt && t.bits == 64) return DType::i64;
  return {};
}

std::string dtype_name(nb::handle object) {
  if (!nb::hasattr(object, "dtype")) return "another";
  const nb::object dtype = object.attr("dtype");
  const std::string name = text(dtype);
  return name.starts_with("torch.") ? name.substr(6) : name;
}

const char* words_of(Holds holds) {
  switch (holds) {
    case Holds::table: return "int32";
    case Holds::state: return "int64";
    default: return "float16, bfloat16, float32 or float64";
  }
}

[[noreturn]] void refuse_dtype(nb::handle object, const char* name, Holds holds) {
  const std::string dtype = dtype_name(object);
  const bool boolean_bias = dtype == "bool" && std::string_view(name) == "attn_bias";
  throw Error(ErrorCode::type_mismatch,
              std::string(name) + ": expected " + words_of(holds) + ", got " + dtype +
                  (boolean_bias ? "; torch.where(mask, 0.0, -inf) is the bias of a mask" : ""));
}

Tensor convert(const dlpack::Tensor& from, nb::handle object, const char* name, Holds holds) {
  const std::optional<DType> dtype = dtype_of(from.dtype);
  if (!dtype) refuse_dtype(object, name, holds);
  Tensor to;
  to.dtype = *dtype;
  to.device = {from.device.type, from.device.id};
  to.data = to.device.has_addresses() ? static_cast<char*>(from.data) + from.byte_offset : from.data;
  to.ndim = from.ndim;
  if (from.ndim > Tensor::kMaxDims) {
    to.ndim = Tensor::kMaxDims + 1;  // refused by every entry point, by its rank
    return to;
  }
  int64_t compact = 1;
  for (int i = from.ndim - 1; i >= 0; --i) {
    to.shape[i] = from.shape[i];
    to.stride[i] = from.strides ? from.strides[i] : compact;
    compact *= from.shape[i];
  }
  return to;
}

/// The exchange table of a type, or nullptr. Types that have one are few and live for ever: remembered, never
/// forgotten.
const dlpack::ExchangeApi* exchange_api_of(PyTypeObject* type) {
  struct Entry {
    PyTypeObject* type;
    const dlpack::ExchangeApi* api;
  };
  static std::vector<Entry> known;
  constexpr std::size_t kMostKnown = 16;
  for (const Entry& e : known) {
    if (e.type == type) return e.api;
  }
  PyObject* capsule = PyObject_GetAttrString(reinterpret_cast<PyObject*>(type), "__dlpack_c_exchange_api__");
  if (!capsule) {
    PyErr_Clear();
    return nullptr;
  }
  nb::object owner = nb::steal(capsule);
  const auto* api = static_cast<const dlpack::ExchangeApi*>(PyCapsule_GetPointer(capsule, "dlpack_exchange_api"));
  if (!api) PyErr_Clear();
  while (api && api->version.major != 1) api = api->previous;
  if (!api || !api->tensor_from_object) return nullptr;
  if (known.size() < kMostKnown) {
    Py_INCREF(reinterpret_cast<PyObject*>(type));
    known.push_back({type, api});
  }
  return api;
}

/// torch's lazily negated views (the imaginary part of a conjugate) export the memory without the sign. They are read
/// by a copy, which is no place for results.
nb::object with_sign(nb::handle object, const char* name, Holds holds) {
  if (!nb::hasattr(object, "is_neg") || !nb::cast<bool>(object.attr("is_neg")())) return nb::borrow(object);
  if (holds == Holds::results)
    throw Error(ErrorCode::invalid_argument,
                std::string(name) + ": expected memory to write to, got a view that torch negates when it is read");
  return object.attr("resolve_neg")();
}

/// The producer's own reason, without the trace that it may carry.
[[noreturn]] void refuse_export(nb::handle object, const char* name, Holds holds) {
  nb::python_error reason;
  const std::string dtype = dtype_name(object);
  constexpr std::string_view kKnown[] = {"float16", "bfloat16", "float32", "float64", "int32", "int64", "another"};
  if (std::find(std::begin(kKnown), std::end(kKnown), dtype) == std::end(kKnown)) refuse_dtype(object, name, holds);
  const std::string message = text(reason.value());
  throw Error(ErrorCode::invalid_argument, std::string(name) + ": expected a dense tensor with memory, got one that " +
                                               "cannot be exported: " + message.substr(0, message.find('\n')));
}

/// A capsule of the object's memory. Of a torch tensor on a device the consumer's stream is named (-1: the producer
/// need not wait for anything), since the call is queued on torch's own current stream; by default torch before 2.10
/// would make the default stream wait, which a capture does not survive.
nb::object export_of(const nb::object& source) {
  const bool is_torch = nb::hasattr(source, "is_meta") && nb::hasattr(source, "device");
  if (!is_torch) return nb::steal(PyObject_CallMethod(source.ptr(), "__dlpack__", nullptr));
  const nb::object method = source.attr("__dlpack__");
  nb::dict keywords;
  keywords["stream"] = -1;
  return nb::steal(PyObject_Call(method.ptr(), nb::tuple().ptr(), keywords.ptr()));
}

Tensor from_capsule(nb::handle object, const char* name, Owners& owners, Holds holds) {
  nb::object source = with_sign(object, name, holds);
  if (nb::hasattr(source, "detach")) source = source.attr("detach")();
  nb::object capsule = export_of(source);
  if (!capsule
           .is_valid()) {  // what torch says of a tensor that has no dense memory; anything else is the caller's affair
    if (PyErr_ExceptionMatches(PyExc_RuntimeError) || PyErr_ExceptionMatches(PyExc_BufferError))
      refuse_export(object, name, holds);
    throw nb::python_error();
  }
  owners.push_back(capsule);  // unconsumed: it frees what it owns when it goes
  if (PyCapsule_IsValid(capsule.ptr(), "dltensor")) {
    return convert(static_cast<dlpack::Managed*>(PyCapsule_GetPointer(capsule.ptr(), "dltensor"))->tensor, object, name,
                   holds);
  }
  if (PyCapsule_IsValid(capsule.ptr(), "dltensor_versioned")) {
    const auto* managed =
        static_cast<dlpack::ManagedVersioned*>(PyCapsule_GetPointer(capsule.ptr(), "dltensor_versioned"));
    if (managed->version.major == 1) return convert(managed->tensor, object, name, holds);
  }
  throw Error(ErrorCode::type_mismatch, std::string(name) + ": its __dlpack__() gave no capsule of DLPack 1.x");
}

}  // namespace

const dlpack::ExchangeApi* exchange_api(nb::handle object) { return exchange_api_of(Py_TYPE(object.ptr())); }

Tensor tensor(nb::handle object, const char* name, Owners& owners, Holds holds) {
  if (object.is_none()) return {};
  if (const dlpack::ExchangeApi* api = exchange_api(object)) {
    const nb::object source = with_sign(object, name, holds);
    if (!source.is(object)) owners.push_back(source);
    dlpack::Tensor borrowed;
    if (api->tensor_from_object(source.ptr(), &borrowed) != 0) refuse_export(object, name, holds);
    return convert(borrowed, object, name, holds);
  }
  if (!nb::hasattr(object, "__dlpack__")) {
    throw Error(ErrorCode::type_mismatch, std::string(name) + ": expected a tensor, got " + class_name(object));
  }
  return from_capsule(object, name, owners, holds);
}

double number(nb::handle object, const char* name) {
  const double value = PyFloat_AsDouble(object.ptr());
  if (value == -1.0 && PyErr_Occurred()) {
    PyErr_Clear();
    throw Error(ErrorCode::type_mismatch, std::string(name) + ": expected a number, got " + class_name(object));
  }
  return value;
}

int64_t integer(nb::handle object, const char* name) {
  if (PyLong_CheckExact(object.ptr())) {
    int overflow = 0;
    const int64_t value = PyLong_AsLongLongAndOverflow(object.ptr(), &overflow);
    if (!overflow) return value;
    throw Error(ErrorCode::invalid_argument,
                std::string(name) + ": expected an integer of 64 bits, got " + text(object));
  }
  PyObject* index = PyNumber_Index(object.ptr());
  if (!index) {
    PyErr_Clear();
    throw Error(ErrorCode::type_mismatch, std::string(name) + ": expected an integer, got " + class_name(object));
  }
  return integer(nb::steal(index), name);
}

int64_t length(nb::handle object, const char* name) {
  const int64_t n = integer(object, name);
  if (n < 0)
    throw Error(ErrorCode::invalid_argument, std::string(name) + ": expected at least 0, got " + std::to_string(n));
  return n;
}

}  // namespace flash_attn::python
