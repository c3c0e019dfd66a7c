// Each group is taken apart by a structured binding: a field that is added to one must be added here to compile.
#include "core/call_key.hpp"

#include <cstdlib>
#include <type_traits>

#include "core/backend.hpp"

namespace flash_attn {

// clang-format off
const std::array<std::string_view, kRoles> kRoleNames = {
    "q", "k", "v", "out", "lse", "dout", "dq", "dk", "dv", "dlse", "dbias", "dsink",
    "cu_seqlens_q", "cu_seqlens_k", "seqused_q", "seqused_k", "leftpad_k", "cache_batch_idx", "block_table",
    "alibi_slopes", "bias", "sink", "dropout_state",
    "new_k", "new_v", "cu_seqlens_new", "rotary_cos", "rotary_sin", "rotary_positions"};
// clang-format on

namespace {

class Writer {
 public:
  explicit Writer(CallKey& key) : key_(key) { key.bytes.reserve(1024); }

  template <class Number>
  requires std::is_arithmetic_v<Number>
  void add(Number x) { key_.bytes.append(reinterpret_cast<const char*>(&x), sizeof x); }
  void add(std::string_view text) {
    add(text.size());
    key_.bytes.append(text);
  }
  void add(Role role, const Tensor& t) {
    add(static_cast<int8_t>(t.ndim));  // -1: absent
    if (!t.present()) return;
    const auto address = reinterpret_cast<uintptr_t>(t.data);
    key_.addresses[static_cast<std::size_t>(role)] = t.data;
    add(static_cast<uint8_t>(static_cast<int>(t.dtype) << 1 | ((address & 15) == 0)));
    for (const int64_t* numbers : {t.shape, t.stride})
      key_.bytes.append(reinterpret_cast<const char*>(numbers), static_cast<std::size_t>(t.ndim) * sizeof *numbers);
  }

  void add(const Sequences& s) {
    const auto& [cu_q, cu_k, used_q, used_k, leftpad, batch_idx, pages, max_q, max_k, used] = s;
    add(Role::cu_seqlens_q, cu_q), add(Role::cu_seqlens_k, cu_k);
    add(Role::seqused_q, used_q), add(Role::seqused_k, used_k), add(Role::leftpad_k, leftpad);
    add(Role::cache_batch_idx, batch_idx), add(Role::block_table, pages);
    add(max_q), add(max_k), add(used);
  }
  void add(const Scores& s) {
    const auto& [scale, causal, left, right, chunk, softcap, alibi, bias, sink] = s;
    add(scale.has_value()), add(scale.value_or(0.0));
    add(causal), add(left), add(right), add(chunk), add(softcap);
    add(Role::alibi_slopes, alibi), add(Role::bias, bias), add(Role::sink, sink);
  }
  void add(const Dropout& d) {
    const auto& [p, seed, offset, state] = d;
    add(p), add(seed), add(offset), add(Role::dropout_state, state);
  }
  /// What decides who runs the call, too. Stream and allocator are the call's own, as its addresses are.
  void add(const Run& r) {
    const auto& [backend, positive_empty_lse, deterministic, stream, allocator, prefer, differentiable] = r;
    add(backend), add(prefer), add(positive_empty_lse), add(deterministic), add(differentiable);
    const char* variable = std::getenv("FLASH_ATTENTION_BACKEND");
    add(std::string_view(variable ? variable : ""));
    add(registry_generation());
  }
  void add(const NewKeys& n) {
    const auto& [k, v, cu] = n;
    add(Role::new_k, k), add(Role::new_v, v), add(Role::cu_seqlens_new, cu);
  }
  void add(const Rotary& r) {
    const auto& [cos, sin, interleaved, positions] = r;
    add(Role::rotary_cos, cos), add(Role::rotary_sin, sin), add(interleaved), add(Role::rotary_positions, positions);
  }
  /// make_problem has seen that all tensors are on q's device.
  void add(Device d) { add(d.type), add(d.index); }

 private:
  CallKey& key_;
};

}  // namespace

CallKey key_of(const Forward& call) {
  const auto& [q, k, v, out, lse, sequences, scores, dropout, run, new_keys, rotary] = call;
  CallKey key;
  Writer w(key);
  w.add('f'), w.add(q.device);
  w.add(Role::q, q), w.add(Role::k, k), w.add(Role::v, v), w.add(Role::out, out), w.add(Role::lse, lse);
  w.add(sequences), w.add(scores), w.add(dropout), w.add(run), w.add(new_keys), w.add(rotary);
  return key;
}

CallKey key_of(const Backward& call) {
  const auto& [dout, q, k, v, out, lse, dq, dk, dv, dlse, dbias, dsink, sequences, scores, dropout, run] = call;
  CallKey key;
  Writer w(key);
  w.add('b'), w.add(q.device);
  w.add(Role::dout, dout), w.add(Role::q, q), w.add(Role::k, k), w.add(Role::v, v), w.add(Role::out, out);
  w.add(Role::lse, lse), w.add(Role::dq, dq), w.add(Role::dk, dk), w.add(Role::dv, dv), w.add(Role::dlse, dlse);
  w.add(Role::dbias, dbias), w.add(Role::dsink, dsink);
  w.add(sequences), w.add(scores), w.add(dropout), w.add(run);
  return key;
}

}  // namespace flash_attn
