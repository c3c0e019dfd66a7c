// A call from a compiled XLA program of the CPU: buffers are where XLA has them, nothing is copied, and no Python runs.
//
// Two attributes say what the buffers are: operands = "q k v sink", results = "out lse", by the names of the C++ API.
#include "xla_handlers.hpp"

#include <algorithm>
#include <exception>
#include <new>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "core/backend.hpp"
#include "core/problem.hpp"
#include "flash_attn/flash_attn.hpp"
#include "host_threads.hpp"
#include "xla.hpp"

namespace flash_attn::python {
namespace {

std::optional<DType> dtype_of(xla::DataType t) {
  switch (t) {
    case xla::kF16: return DType::f16;
    case xla::kBf16: return DType::bf16;
    case xla::kF32: return DType::f32;
    case xla::kF64: return DType::f64;
    case xla::kS32: return DType::i32;
    case xla::kS64: return DType::i64;
    default: return {};
  }
}

Tensor tensor_of(const xla::Buffer& buffer, std::string_view name) {
  const std::optional<DType> dtype = dtype_of(buffer.dtype);
  if (!dtype) throw Error(ErrorCode::type_mismatch, std::string(name) + ": expected a dtype that attention knows");
  Tensor t;
  t.data = buffer.data;
  t.dtype = *dtype;
  t.ndim = static_cast<int32_t>(buffer.rank);
  if (buffer.rank > Tensor::kMaxDims) {
    t.ndim = Tensor::kMaxDims + 1;  // refused by its rank
    return t;
  }
  int64_t compact = 1;
  for (int i = t.ndim - 1; i >= 0; --i) {
    t.shape[i] = buffer.dims[i];
    t.stride[i] = compact;
    compact *= buffer.dims[i];
  }
  return t;
}

template <class Call>
Tensor* common_member(Call& call, std::string_view name) {
  if (name == "q") return &call.q;
  if (name == "k") return &call.k;
  if (name == "v") return &call.v;
  if (name == "out") return &call.out;
  if (name == "lse") return &call.lse;
  if (name == "cu_seqlens_q") return &call.sequences.cu_seqlens_q;
  if (name == "cu_seqlens_k") return &call.sequences.cu_seqlens_k;
  if (name == "seqused_q") return &call.sequences.seqused_q;
  if (name == "seqused_k") return &call.sequences.seqused_k;
  if (name == "block_table") return &call.sequences.block_table;
  if (name == "alibi_slopes") return &call.scores.alibi_slopes;
  if (name == "bias") return &call.scores.bias;
  if (name == "sink") return &call.scores.sink;
  return nullptr;
}
Tensor* member(Forward& call, std::string_view name) { return common_member(call, name); }
Tensor* member(Backward& call, std::string_view name) {
  if (name == "dout") return &call.dout;
  if (name == "dlse") return &call.dlse;
  if (name == "dq") return &call.dq;
  if (name == "dk") return &call.dk;
  if (name == "dv") return &call.dv;
  if (name == "dbias") return &call.dbias;
  if (name == "dsink") return &call.dsink;
  return common_member(call, name);
}

[[noreturn]] void disagree(std::string_view about) {
  throw Error(ErrorCode::internal, "flash_attn.jax and the compiled module disagree about " + std::string(about));
}

template <class T>
T value(const xla::Scalar& scalar, xla::DataType dtype, std::string_view name) {
  if (scalar.dtype != dtype) disagree(name);
  return *static_cast<const T*>(scalar.value);
}

struct Names {
  std::string_view operands, results;
};

template <class Call>
Names read_attributes(const xla::Attributes& attributes, Call& call) {
  Names names;
  for (int64_t i = 0; i < attributes.size; ++i) {
    const std::string_view name(attributes.names[i]->data, attributes.names[i]->size);
    if (attributes.types[i] == xla::kString) {
      const auto& text = *static_cast<const xla::Text*>(attributes.values[i]);
      const std::string_view words(text.data, text.size);
      if (name == "operands")
        names.operands = words;
      else if (name == "results")
        names.results = words;
      else if (name == "backend")
        call.run.backend = words;
      else
        disagree(name);
      continue;
    }
    if (attributes.types[i] != xla::kScalar) disagree(name);
    const auto& scalar = *static_cast<const xla::Scalar*>(attributes.values[i]);
    if (name == "causal")
      call.scores.causal = value<bool>(scalar, xla::kBool, name);
    else if (name == "softmax_scale")
      call.scores.softmax_scale = value<double>(scalar, xla::kF64, name);
    else if (name == "softcap")
      call.scores.softcap = value<double>(scalar, xla::kF64, name);
    else if (name == "window_left")
      call.scores.window_left = value<int64_t>(scalar, xla::kS64, name);
    else if (name == "window_right")
      call.scores.window_right = value<int64_t>(scalar, xla::kS64, name);
    else if (name == "attention_chunk")
      call.scores.attention_chunk = value<int64_t>(scalar, xla::kS64, name);
    else if (name == "max_seqlen_q")
      call.sequences.max_seqlen_q = value<int64_t>(scalar, xla::kS64, name);
    else if (name == "max_seqlen_k")
      call.sequences.max_seqlen_k = value<int64_t>(scalar, xla::kS64, name);
    else
      disagree(name);
  }
  return names;
}

template <class Call>
void read_buffers(const xla::Buffers& buffers, std::string_view names, Call& call) {
  for (int64_t i = 0; i < buffers.size; ++i) {
    const std::string_view name = names.substr(0, names.find(' '));
    names.remove_prefix(std::min(names.size(), name.size() + 1));
    Tensor* const place = member(call, name);
    if (!place) disagree(name.empty() ? "the number of buffers" : name);
    *place = tensor_of(*buffers.buffers[i], name);
  }
  if (!names.empty()) disagree("the number of buffers");
}

/// The first backend that serves the call and needs no Python.
const Backend& choose_native(const Problem& problem) {
  std::vector<Veto> vetoes;
  for (;;) {
    const Backend& backend = choose_or_throw(problem, vetoes);
    if (!backend.hosted()) return backend;
    vetoes.push_back({std::string(backend.name()), "runs in Python, not within a program of XLA"});
  }
}

template <class Call>
void run(const xla::CallFrame& frame) {
  Call call;
  const Names names = read_attributes(frame.attributes, call);
  read_buffers(frame.operands, names.operands, call);
  read_buffers(frame.results, names.results, call);
  const Problem problem = make_problem(call);
  const Backend& backend = choose_native(problem);
  if (problem.writes_nothing()) return;
  follow_host_threads();
  problem.pass == Pass::forward ? backend.forward(problem) : backend.backward(problem);
}

xla::CallError* error(const xla::CallFrame& frame, xla::ErrorCode code, const char* message) {
  xla::NewError fields{sizeof(xla::NewError), nullptr, message, code};
  return frame.api->create_error(&fields);
}

xla::ErrorCode code_of(const Error& e) {
  switch (e.code()) {
    case ErrorCode::invalid_argument:
    case ErrorCode::type_mismatch: return xla::kInvalidArgument;
    case ErrorCode::not_supported: return xla::kUnimplemented;
    case ErrorCode::out_of_memory: return xla::kResourceExhausted;
    default: return xla::kInternal;
  }
}

/// Registration: the handler is of the runtime's own minor version, whose fields are where those of every other are.
/// Runtimes that do not tell it are of minor version 1.
bool tells_version(const xla::CallFrame& frame) {
  if (!frame.extensions || frame.extensions->type != xla::kMetadataExtension) return false;
  xla::Version& version = reinterpret_cast<xla::MetadataExtension*>(frame.extensions)->metadata->version;
  version.major = 0;
  version.minor = frame.api ? frame.api->version.minor : 1;
  return true;
}

template <class Call>
xla::CallError* handle(xla::CallFrame* frame) {
  if (tells_version(*frame)) return nullptr;
  if (frame->api->version.major != 0)
    return error(*frame, xla::kUnimplemented, "flash_attn: this jaxlib has another foreign function interface");
  try {
    run<Call>(*frame);
    return nullptr;
  } catch (const Error& e) {
    return error(*frame, code_of(e), e.what());
  } catch (const std::bad_alloc&) {
    return error(*frame, xla::kResourceExhausted, "out of memory");
  } catch (const std::exception& e) {
    return error(*frame, xla::kInternal, e.what());
  }
}

nanobind::capsule capsule_of(xla::Handler* handler) {
  return nanobind::capsule(reinterpret_cast<const void*>(handler), nullptr, nullptr);
}

}  // namespace

nanobind::dict xla_handlers() {
  nanobind::dict handlers;
  handlers["flash_attn_forward"] = capsule_of(&handle<Forward>);
  handlers["flash_attn_backward"] = capsule_of(&handle<Backward>);
  return handlers;
}

}  // namespace flash_attn::python
