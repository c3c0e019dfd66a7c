// flash_attn._C: the C++ API for Python. Arguments are positional and complete; the defaults live in the Python
// package.
//
// A call costs about as much as its arguments: tensors are borrowed through DLPack (from_python.hpp), nothing is
// allocated on the way, and the interpreter is free while the kernels run.
#include <nanobind/nanobind.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <exception>
#include <span>
#include <string>
#include <string_view>
#include <utility>

#include "flash_attn/flash_attn.hpp"
#include "from_python.hpp"
#include "host_threads.hpp"

namespace flash_attn::python {
namespace {

/// What forward, backward and their explanations have in common: one tuple, in this order (flash_attn/_options.py).
struct Options {
  enum Slot {
    kSoftmaxScale,
    kCausal,
    kWindowLeft,
    kWindowRight,
    kSoftcap,
    kAlibiSlopes,
    kBias,
    kSink,
    kCuSeqlensQ,
    kCuSeqlensK,
    kMaxSeqlenQ,
    kMaxSeqlenK,
    kSequsedK,
    kLeftpadK,
    kBlockTable,
    kDropoutP,
    kSeed,
    kOffset,
    kBackend,
    kDeterministic,
    kSlots
  };

  nb::tuple values;

  template <class Call>
  void fill(Call& call, Owners& owners) const {
    if (values.size() != kSlots)
      throw Error(ErrorCode::internal, "options: expected " + std::to_string(kSlots) + " values");

    Scores& scores = call.scores;
    if (!at(kSoftmaxScale).is_none()) scores.softmax_scale = number(at(kSoftmaxScale), "softmax_scale");
    scores.causal = truth(at(kCausal));
    scores.window_left = integer(at(kWindowLeft), "window_size[0]");
    scores.window_right = integer(at(kWindowRight), "window_size[1]");
    scores.softcap = number(at(kSoftcap), "softcap");
    scores.alibi_slopes = tensor(at(kAlibiSlopes), "alibi_slopes", owners);
    scores.bias = tensor(at(kBias), "attn_bias", owners);
    scores.sink = tensor(at(kSink), "learnable_sink", owners);

    Sequences& sequences = call.sequences;
    sequences.cu_seqlens_q = tensor(at(kCuSeqlensQ), "cu_seqlens_q", owners);
    sequences.cu_seqlens_k = tensor(at(kCuSeqlensK), "cu_seqlens_k", owners);
    if (!at(kMaxSeqlenQ).is_none()) sequences.max_seqlen_q = length(at(kMaxSeqlenQ), "max_seqlen_q");
    if (!at(kMaxSeqlenK).is_none()) sequences.max_seqlen_k = length(at(kMaxSeqlenK), "max_seqlen_k");
    sequences.seqused_k = tensor(at(kSequsedK), "seqused_k", owners);
    sequences.leftpad_k = tensor(at(kLeftpadK), "leftpad_k", owners);
    sequences.block_table = tensor(at(kBlockTable), "block_table", owners);

    call.dropout.p = number(at(kDropoutP), "dropout_p");
    call.dropout.seed = static_cast<uint64_t>(integer(at(kSeed), "seed"));
    call.dropout.offset = static_cast<uint64_t>(integer(at(kOffset), "offset"));

    if (!at(kBackend).is_none()) call.run.backend = nb::cast<std::string>(at(kBackend));
    call.run.positive_empty_lse = true;  // as the functions of FlashAttention-2 return it
    call.run.deterministic = truth(at(kDeterministic));
  }

 private:
  nb::handle at(Slot slot) const { return PyTuple_GetItem(values.ptr(), slot); }
  static bool truth(nb::handle object) {
    const int value = PyObject_IsTrue(object.ptr());
    if (value < 0) nb::raise_python_error();
    return value != 0;
  }
};

Forward make_forward(nb::handle q, nb::handle k, nb::handle v, nb::handle out, nb::handle lse, const nb::tuple& options,
                     Owners& owners) {
  Forward call{.q = tensor(q, "q", owners),
               .k = tensor(k, "k", owners),
               .v = tensor(v, "v", owners),
               .out = tensor(out, "out", owners),
               .lse = tensor(lse, "softmax_lse", owners)};
  Options{options}.fill(call, owners);
  return call;
}

Backward make_backward(nb::handle dout, nb::handle q, nb::handle k, nb::handle v, nb::handle out, nb::handle lse,
                       nb::handle dq, nb::handle dk, nb::handle dv, nb::handle dlse, nb::handle dbias, nb::handle dsink,
                       const nb::tuple& options, Owners& owners) {
  Backward call{.dout = tensor(dout, "dout", owners),
                .q = tensor(q, "q", owners),
                .k = tensor(k, "k", owners),
                .v = tensor(v, "v", owners),
                .out = tensor(out, "out", owners),
                .lse = tensor(lse, "softmax_lse", owners),
                .dq = tensor(dq, "dq", owners),
                .dk = tensor(dk, "dk", owners),
                .dv = tensor(dv, "dv", owners),
                .dlse = tensor(dlse, "dlse", owners),
                .dbias = tensor(dbias, "dbias", owners),
                .dsink = tensor(dsink, "dsink", owners)};
  Options{options}.fill(call, owners);
  return call;
}

void py_forward(nb::handle q, nb::handle k, nb::handle v, nb::handle out, nb::handle lse, const nb::tuple& options) {
  Owners owners;
  const Forward call = make_forward(q, k, v, out, lse, options, owners);
  nb::gil_scoped_release free_interpreter;
  follow_host_threads();
  forward(call);
}

void py_backward(nb::handle dout, nb::handle q, nb::handle k, nb::handle v, nb::handle out, nb::handle lse,
                 nb::handle dq, nb::handle dk, nb::handle dv, nb::handle dlse, nb::handle dbias, nb::handle dsink,
                 const nb::tuple& options) {
  Owners owners;
  const Backward call = make_backward(dout, q, k, v, out, lse, dq, dk, dv, dlse, dbias, dsink, options, owners);
  nb::gil_scoped_release free_interpreter;
  follow_host_threads();
  backward(call);
}

using Names = std::span<const std::pair<std::string_view, std::string_view>>;  // the core's, Python's

/// The core names arguments as C++ does; where Python's name is another, its users read theirs.
constexpr std::pair<std::string_view, std::string_view> kPythonNames[] = {
    {"window_left", "window_size[0]"},
    {"window_right", "window_size[1]"},
    {"bias", "attn_bias"},
    {"sink", "learnable_sink"},
};
/// And those of flash_attn_with_kvcache.
constexpr std::pair<std::string_view, std::string_view> kCacheNames[] = {
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
    {"leftpad_k", "cache_leftpad"},
};

/// `message` with every word that has another name replaced by it.
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

void py_forward_with_cache(nb::handle q, nb::handle k_cache, nb::handle v_cache, nb::handle out, nb::handle lse,
                           nb::handle k, nb::handle v, nb::handle cu_seqlens_k_new, nb::handle cache_batch_idx,
                           nb::handle rotary_cos, nb::handle rotary_sin, bool rotary_interleaved,
                           nb::handle rotary_positions, const nb::tuple& options) {
  Owners owners;
  Forward call{.q = tensor(q, "q", owners),
               .k = tensor(k_cache, "k_cache", owners),
               .v = tensor(v_cache, "v_cache", owners),
               .out = tensor(out, "out", owners),
               .lse = tensor(lse, "softmax_lse", owners),
               .new_keys = {.k = tensor(k, "k", owners),
                            .v = tensor(v, "v", owners),
                            .cu_seqlens = tensor(cu_seqlens_k_new, "cu_seqlens_k_new", owners)},
               .rotary = {.cos = tensor(rotary_cos, "rotary_cos", owners),
                          .sin = tensor(rotary_sin, "rotary_sin", owners),
                          .interleaved = rotary_interleaved,
                          .positions = tensor(rotary_positions, "rotary_positions", owners)}};
  call.sequences.cache_batch_idx = tensor(cache_batch_idx, "cache_batch_idx", owners);
  try {
    Options{options}.fill(call, owners);
    nb::gil_scoped_release free_interpreter;
    follow_host_threads();
    forward(call);
  } catch (const Error& e) {
    throw Error(e.code(), renamed(e.what(), kCacheNames));
  }
}

/// (problem, [(backend, chosen, why_not)], plan)
nb::tuple to_python(const Explanation& e) {
  nb::list candidates;
  for (const Candidate& c : e.candidates) candidates.append(nb::make_tuple(c.backend, c.chosen, c.why_not));
  return nb::make_tuple(e.problem, candidates, e.plan);
}

nb::tuple py_explain_forward(nb::handle q, nb::handle k, nb::handle v, nb::handle out, nb::handle lse,
                             const nb::tuple& options) {
  Owners owners;
  return to_python(explain(make_forward(q, k, v, out, lse, options, owners)));
}

nb::tuple py_explain_backward(nb::handle dout, nb::handle q, nb::handle k, nb::handle v, nb::handle out, nb::handle lse,
                              nb::handle dq, nb::handle dk, nb::handle dv, nb::handle dlse, nb::handle dbias,
                              nb::handle dsink, const nb::tuple& options) {
  Owners owners;
  return to_python(explain(make_backward(dout, q, k, v, out, lse, dq, dk, dv, dlse, dbias, dsink, options, owners)));
}

nb::list py_backends() {
  nb::list all;
  for (const BackendInfo& b : backends()) all.append(nb::make_tuple(b.name, b.description, b.unavailable));
  return all;
}

PyObject* exception_type(ErrorCode code) {
  switch (code) {
    case ErrorCode::invalid_argument: return PyExc_ValueError;
    case ErrorCode::type_mismatch: return PyExc_TypeError;
    case ErrorCode::not_supported: return PyExc_NotImplementedError;
    case ErrorCode::out_of_memory: return PyExc_MemoryError;
    case ErrorCode::ok:
    case ErrorCode::internal: break;
  }
  return PyExc_RuntimeError;
}

void translate(const std::exception_ptr& thrown, void*) {
  try {
    std::rethrow_exception(thrown);
  } catch (const Error& e) {
    PyErr_SetString(exception_type(e.code()), renamed(e.what(), kPythonNames).c_str());
  }
}

}  // namespace

// None is a value of every argument here (absent), so each is declared to accept it.
#define FA_ARG(name) nb::arg(name).none()
#define FA_FORWARD_ARGS FA_ARG("q"), FA_ARG("k"), FA_ARG("v"), FA_ARG("out"), FA_ARG("softmax_lse"), nb::arg("options")
#define FA_BACKWARD_ARGS                                                                                     \
  FA_ARG("dout"), FA_ARG("q"), FA_ARG("k"), FA_ARG("v"), FA_ARG("out"), FA_ARG("softmax_lse"), FA_ARG("dq"), \
      FA_ARG("dk"), FA_ARG("dv"), FA_ARG("dlse"), FA_ARG("dbias"), FA_ARG("dsink"), nb::arg("options")

NB_MODULE(_C, m) {
  m.doc() = "The compiled core of flash_attn.";
  nb::register_exception_translator(translate);
  m.def("forward", &py_forward, FA_FORWARD_ARGS);
  m.def("backward", &py_backward, FA_BACKWARD_ARGS);
  m.def("forward_with_cache", &py_forward_with_cache, FA_ARG("q"), FA_ARG("k_cache"), FA_ARG("v_cache"), FA_ARG("out"),
        FA_ARG("softmax_lse"), FA_ARG("k"), FA_ARG("v"), FA_ARG("cu_seqlens_k_new"), FA_ARG("cache_batch_idx"),
        FA_ARG("rotary_cos"), FA_ARG("rotary_sin"), nb::arg("rotary_interleaved"), FA_ARG("rotary_positions"),
        nb::arg("options"));
  m.def("explain_forward", &py_explain_forward, FA_FORWARD_ARGS);
  m.def("explain_backward", &py_explain_backward, FA_BACKWARD_ARGS);
  m.def("backends", &py_backends);
  m.def("version", &version);
  m.def("cpu_isa", &cpu_isa);
  m.def("cpu_isas", &cpu_isas);
  m.def("num_threads", [] {
    follow_host_threads();
    return num_threads();
  });
  m.def("set_num_threads", &choose_num_threads, nb::arg("n"));
  adopt_host_threads();
}

}  // namespace flash_attn::python
