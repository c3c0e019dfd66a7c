// The C ABI: each function turns plain structs into the C++ call, and exceptions into a code and words.
#include "flash_attn/flash_attn.h"

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <exception>
#include <new>
#include <string>

#include "flash_attn/flash_attn.hpp"

namespace {

using namespace flash_attn;

static_assert(FLASH_ATTN_MAX_DIMS == Tensor::kMaxDims);
static_assert(FLASH_ATTN_OK == static_cast<int>(ErrorCode::ok));
static_assert(FLASH_ATTN_INVALID_ARGUMENT == static_cast<int>(ErrorCode::invalid_argument));
static_assert(FLASH_ATTN_TYPE_MISMATCH == static_cast<int>(ErrorCode::type_mismatch));
static_assert(FLASH_ATTN_NOT_SUPPORTED == static_cast<int>(ErrorCode::not_supported));
static_assert(FLASH_ATTN_INTERNAL == static_cast<int>(ErrorCode::internal));
static_assert(FLASH_ATTN_OUT_OF_MEMORY == static_cast<int>(ErrorCode::out_of_memory));
static_assert(FLASH_ATTN_DEVICE_FAILURE == static_cast<int>(ErrorCode::device_failure));
static_assert(FLASH_ATTN_F16 == static_cast<int>(DType::f16) && FLASH_ATTN_BF16 == static_cast<int>(DType::bf16) &&
              FLASH_ATTN_F32 == static_cast<int>(DType::f32) && FLASH_ATTN_F64 == static_cast<int>(DType::f64) &&
              FLASH_ATTN_I32 == static_cast<int>(DType::i32) && FLASH_ATTN_I64 == static_cast<int>(DType::i64));

// ---- Errors ---------------------------------------------------------------------------------------------------------

thread_local std::string last_error;

int failed(ErrorCode code, const char* message) noexcept {
  try {
    last_error = message;
  } catch (...) {
    last_error.clear();  // no memory for the words; the code still says it
  }
  return static_cast<int>(code);
}

/// Runs `body`; no exception passes.
template <class Body>
int guarded(Body body) noexcept {
  try {
    body();
    last_error.clear();
    return FLASH_ATTN_OK;
  } catch (const Error& e) {
    return failed(e.code(), e.what());
  } catch (const std::bad_alloc&) {
    return failed(ErrorCode::out_of_memory, "out of memory");
  } catch (const std::exception& e) {
    return failed(ErrorCode::internal, e.what());
  } catch (...) {
    return failed(ErrorCode::internal, "unknown exception");
  }
}

[[noreturn]] void invalid(const std::string& message) { throw Error(ErrorCode::invalid_argument, message); }

// ---- Structs of any age ---------------------------------------------------------------------------------------------

// The structs of the first release ended with these fields: nobody has smaller ones.
constexpr std::size_t kFirstOptions = offsetof(flash_attn_options, deterministic) + sizeof(int32_t);
constexpr std::size_t kFirstForward = offsetof(flash_attn_forward_args, options) + sizeof(void*);
constexpr std::size_t kFirstBackward = offsetof(flash_attn_backward_args, options) + sizeof(void*);

/// Every field at its default, `struct_size` included.
template <class T>
T defaults() {
  T t{};
  t.struct_size = sizeof(T);
  return t;
}
template <>
flash_attn_options defaults() {
  flash_attn_options o{};
  o.struct_size = sizeof o;
  o.max_seqlen_q = o.max_seqlen_k = o.window_left = o.window_right = o.used_k = -1;
  return o;
}

/// Fills the caller's struct, which may be older (shorter) or newer (longer: what we don't know becomes 0).
template <class T>
void init(T* target, std::size_t size, std::size_t first, const char* name) {
  if (!target) invalid(std::string(name) + ": null pointer");
  if (size < first || size > UINT32_MAX)
    invalid(std::string(name) + ": expected size = sizeof the struct, at least " + std::to_string(first) + ", got " +
            std::to_string(size));
  T t = defaults<T>();
  t.struct_size = static_cast<uint32_t>(size);
  std::memset(static_cast<void*>(target), 0, size);
  std::memcpy(static_cast<void*>(target), &t, std::min(size, sizeof t));
}

/// The caller's struct as ours: fields that it lacks at their defaults; fields that we lack must be 0.
template <class T>
T read(const T* source, std::size_t first, const char* name) {
  if (!source) invalid(std::string(name) + ": null pointer");
  const std::size_t size = source->struct_size;
  if (size < first)
    invalid(std::string(name) + ".struct_size: expected at least " + std::to_string(first) + " (as " + name +
            "_init sets it), got " + std::to_string(size));
  const char* bytes = reinterpret_cast<const char*>(source);
  for (std::size_t i = sizeof(T); i < size; ++i)
    if (bytes[i] != 0)
      throw Error(ErrorCode::not_supported, std::string(name) + ": uses a field that this version of the library, " +
                                                version() + ", does not know");
  T t = defaults<T>();
  std::memcpy(static_cast<void*>(&t), bytes, std::min(size, sizeof t));
  return t;
}

// ---- Calls ----------------------------------------------------------------------------------------------------------

Tensor tensor(const char* name, const flash_attn_tensor* t) {
  Tensor result;
  if (!t) return result;
  if (t->ndim < 0 || t->ndim > Tensor::kMaxDims)
    invalid(std::string(name) + ": expected 0 to 5 dimensions, got " + std::to_string(t->ndim));
  result.data = t->data;
  result.dtype = static_cast<DType>(t->dtype);
  result.device = {t->device_type, t->device_index};
  result.ndim = t->ndim;
  std::copy(t->shape, t->shape + t->ndim, result.shape);
  std::copy(t->stride, t->stride + t->ndim, result.stride);
  return result;
}

/// Fills what Forward and Backward share.
template <class Call>
void read_options(const flash_attn_options* given, Call& call) {
  if (!given) return;
  const flash_attn_options o = read(given, kFirstOptions, "flash_attn_options");
  call.sequences = {.cu_seqlens_q = tensor("cu_seqlens_q", o.cu_seqlens_q),
                    .cu_seqlens_k = tensor("cu_seqlens_k", o.cu_seqlens_k),
                    .seqused_q = tensor("seqused_q", o.seqused_q),
                    .seqused_k = tensor("seqused_k", o.seqused_k),
                    .leftpad_k = tensor("leftpad_k", o.leftpad_k),
                    .cache_batch_idx = tensor("cache_batch_idx", o.cache_batch_idx),
                    .block_table = tensor("block_table", o.block_table),
                    .max_seqlen_q = o.max_seqlen_q,
                    .max_seqlen_k = o.max_seqlen_k,
                    .used_k = o.used_k};
  call.scores = {.causal = o.causal != 0,
                 .window_left = o.window_left,
                 .window_right = o.window_right,
                 .attention_chunk = o.attention_chunk,
                 .softcap = o.softcap,
                 .alibi_slopes = tensor("alibi_slopes", o.alibi_slopes),
                 .bias = tensor("bias", o.bias),
                 .sink = tensor("sink", o.sink)};
  if (o.has_softmax_scale) call.scores.softmax_scale = o.softmax_scale;
  call.dropout = {.p = o.dropout_p,
                  .seed = o.dropout_seed,
                  .offset = o.dropout_offset,
                  .state = tensor("dropout_state", o.dropout_state)};
  call.run = {.backend = o.backend ? o.backend : "",
              .positive_empty_lse = o.positive_empty_lse != 0,
              .deterministic = o.deterministic != 0,
              .stream = o.stream,
              .allocator = {o.allocator.allocate, o.allocator.release, o.allocator.context}};
}

Forward forward_call(const flash_attn_forward_args* given) {
  const flash_attn_forward_args a = read(given, kFirstForward, "flash_attn_forward_args");
  Forward call{.q = tensor("q", a.q),
               .k = tensor("k", a.k),
               .v = tensor("v", a.v),
               .out = tensor("out", a.out),
               .lse = tensor("lse", a.lse)};
  read_options(a.options, call);
  call.new_keys = {.k = tensor("new_k", a.new_k),
                   .v = tensor("new_v", a.new_v),
                   .cu_seqlens = tensor("cu_seqlens_new", a.cu_seqlens_new)};
  call.rotary = {.cos = tensor("rotary_cos", a.rotary_cos),
                 .sin = tensor("rotary_sin", a.rotary_sin),
                 .interleaved = a.rotary_interleaved != 0,
                 .positions = tensor("rotary_positions", a.rotary_positions)};
  return call;
}

Backward backward_call(const flash_attn_backward_args* given) {
  const flash_attn_backward_args a = read(given, kFirstBackward, "flash_attn_backward_args");
  Backward call{.dout = tensor("dout", a.dout),
                .q = tensor("q", a.q),
                .k = tensor("k", a.k),
                .v = tensor("v", a.v),
                .out = tensor("out", a.out),
                .lse = tensor("lse", a.lse),
                .dq = tensor("dq", a.dq),
                .dk = tensor("dk", a.dk),
                .dv = tensor("dv", a.dv),
                .dlse = tensor("dlse", a.dlse),
                .dbias = tensor("dbias", a.dbias),
                .dsink = tensor("dsink", a.dsink)};
  read_options(a.options, call);
  return call;
}

void write_explanation(const Explanation& e, char* text, std::size_t capacity, std::size_t* needed) {
  if (!text && capacity > 0) invalid("text: null pointer with capacity " + std::to_string(capacity));
  std::string words = e.problem + "\n";
  for (const Candidate& c : e.candidates)
    words += (c.chosen ? "* " : "  ") + c.backend + (c.why_not.empty() ? "" : ": " + c.why_not) + "\n";
  if (!e.plan.empty()) words += "plan: " + e.plan + "\n";
  words += "work: " + e.work + "\n";
  if (needed) *needed = words.size() + 1;
  if (capacity == 0) return;
  const std::size_t n = std::min(capacity - 1, words.size());
  std::memcpy(text, words.data(), n);
  text[n] = '\0';
}

}  // namespace

extern "C" {

flash_attn_tensor flash_attn_view(const void* data, int32_t dtype, int32_t ndim, const int64_t* shape) {
  flash_attn_tensor t{};
  t.data = const_cast<void*>(data);
  t.dtype = dtype;
  t.device_type = 1;
  t.ndim = shape || ndim == 0 ? ndim : -1;
  if (t.ndim < 0 || t.ndim > FLASH_ATTN_MAX_DIMS) return t;
  uint64_t stride = 1;  // unsigned: a shape too large wraps here and is refused where it is used
  for (int i = ndim - 1; i >= 0; --i) {
    t.shape[i] = shape[i];
    t.stride[i] = static_cast<int64_t>(stride);
    stride *= static_cast<uint64_t>(shape[i]);
  }
  return t;
}

int flash_attn_options_init(flash_attn_options* options, size_t size) {
  return guarded([&] { init(options, size, kFirstOptions, "options"); });
}
int flash_attn_forward_args_init(flash_attn_forward_args* args, size_t size) {
  return guarded([&] { init(args, size, kFirstForward, "args"); });
}
int flash_attn_backward_args_init(flash_attn_backward_args* args, size_t size) {
  return guarded([&] { init(args, size, kFirstBackward, "args"); });
}

int flash_attn_forward(const flash_attn_forward_args* args) {
  return guarded([&] { forward(forward_call(args)); });
}
int flash_attn_backward(const flash_attn_backward_args* args) {
  return guarded([&] { backward(backward_call(args)); });
}

int flash_attn_explain_forward(const flash_attn_forward_args* args, char* text, size_t capacity, size_t* needed) {
  return guarded([&] { write_explanation(explain(forward_call(args)), text, capacity, needed); });
}
int flash_attn_explain_backward(const flash_attn_backward_args* args, char* text, size_t capacity, size_t* needed) {
  return guarded([&] { write_explanation(explain(backward_call(args)), text, capacity, needed); });
}

const char* flash_attn_last_error(void) { return last_error.c_str(); }
const char* flash_attn_version(void) { return version(); }

int flash_attn_num_threads(void) {
  int n = 0;
  guarded([&] { n = num_threads(); });
  return n;
}
int flash_attn_set_num_threads(int n) {
  return guarded([&] { set_num_threads(n); });
}

int flash_attn_set_parallel_for(flash_attn_parallel_for run, void* host) {
  return guarded([&] {
    if (!run) return set_parallel_for({});
    set_parallel_for([run, host](int64_t n, const std::function<void(int64_t)>& task) {
      const auto call_task = [](void* context, int64_t i) {
        (*static_cast<const std::function<void(int64_t)>*>(context))(i);
      };
      run(host, n, call_task, const_cast<std::function<void(int64_t)>*>(&task));
    });
  });
}

}  // extern "C"
