#include "errors.hpp"

#include <algorithm>
#include <array>
#include <exception>

#include "flash_attn/flash_attn.hpp"

namespace flash_attn::python {
namespace {

namespace nb = nanobind;

/// The core names arguments as C++ does; where Python's name is another, its users read theirs.
constexpr std::pair<std::string_view, std::string_view> kPythonNames[] = {
    {"window_left", "window_size[0]"},
    {"window_right", "window_size[1]"},
    {"bias", "attn_bias"},
    {"sink", "learnable_sink"},
};
constexpr std::pair<std::string_view, std::string_view> kNamesOfCache[] = {
    {"k", "k_cache"},
    {"v", "v_cache"},
    {"new_keys", "k and v"},
    {"new_keys.k", "k"},
    {"new_keys.v", "v"},
    {"new_keys.cu_seqlens", "cu_seqlens_k_new"},
    {"rotary.cos", "rotary_cos"},
    {"rotary.sin", "rotary_sin"},
    {"rotary.positions", "rotary_positions"},
    {"seqused_k", "cache_seqlens"},
    {"used_k", "cache_seqlens"},
    {"leftpad_k", "cache_leftpad"},
};

struct ExceptionClass {
  ErrorCode code;
  const char* name;
  PyObject** bases[2];  // the second may be absent
  const char* doc;
};

// The original raises RuntimeError for everything, and code written for it catches that: so do these classes.
const ExceptionClass kClasses[] = {
    {ErrorCode::invalid_argument,
     "InvalidArgument",
     {&PyExc_ValueError, &PyExc_RuntimeError},
     "A shape, a value, a device, or overlapping memory. Nothing was written."},
    {ErrorCode::type_mismatch,
     "InvalidType",
     {&PyExc_TypeError, &PyExc_RuntimeError},
     "A dtype, or an object that is no tensor or number. Nothing was written."},
    {ErrorCode::not_supported,
     "NotServed",
     {&PyExc_NotImplementedError, nullptr},
     "A well-formed call that no backend, or not the one asked for, serves. Nothing was written."},
    {ErrorCode::out_of_memory, "OutOfMemory", {&PyExc_MemoryError, &PyExc_RuntimeError}, "There is no memory."},
    {ErrorCode::device_failure,
     "DeviceFailure",
     {&PyExc_RuntimeError, nullptr},
     "A driver or a launch failed; outputs may be half written."},
    {ErrorCode::internal, "InternalError", {&PyExc_RuntimeError, nullptr}, "A defect of this library."},
};
constexpr std::size_t kCodes = 7;
std::array<PyObject*, kCodes> exceptions{};  // by code; they live as long as the process

void translate(const std::exception_ptr& thrown, void*) {
  try {
    std::rethrow_exception(thrown);
  } catch (const Error& e) {
    const auto code = static_cast<std::size_t>(e.code());
    PyObject* type = code < kCodes && exceptions[code] ? exceptions[code] : PyExc_RuntimeError;
    PyErr_SetString(type, renamed(e.what(), kPythonNames).c_str());
  }
}

}  // namespace

const Names kCacheNames = kNamesOfCache;

std::string renamed(const std::string& message, Names names) {
  constexpr std::string_view kLetters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_.";
  std::string text;
  for (std::size_t at = 0; at < message.size();) {
    const std::size_t end = std::min(message.find_first_not_of(kLetters, at), message.size());
    const std::string_view word = std::string_view(message).substr(at, end - at);
    const auto found = std::find_if(names.begin(), names.end(), [&](const auto& name) { return name.first == word; });
    text.append(found != names.end() ? found->second : word);
    at = std::min(message.find_first_of(kLetters, end), message.size());
    text.append(message, end, at - end);
  }
  return text;
}

void add_errors(nb::module_& m) {
  for (const ExceptionClass& c : kClasses) {
    nb::object bases = c.bases[1] ? nb::object(nb::make_tuple(nb::handle(*c.bases[0]), nb::handle(*c.bases[1])))
                                  : nb::borrow(*c.bases[0]);
    const std::string name = std::string("flash_attn.") + c.name;
    PyObject* type = PyErr_NewExceptionWithDoc(name.c_str(), c.doc, bases.ptr(), nullptr);
    if (!type) nb::raise_python_error();
    m.attr(c.name) = nb::handle(type);
    exceptions[static_cast<std::size_t>(c.code)] = type;
  }
  nb::register_exception_translator(translate);
}

}  // namespace flash_attn::python
