// Problem: everything about a call is checked here, once, before anything is written.
#include "core/problem.hpp"

#include <algorithm>
#include <limits>
#include <string>

#include "core/append.hpp"
#include "core/check.hpp"
#include "core/overlap.hpp"
#include "core/sequences.hpp"

namespace flash_attn {
namespace {

/// Windows and chunks longer than any sequence, so that positions plus windows never overflow.
constexpr int64_t kLongest = int64_t{1} << 40;

/// (batch, nheads, seqlen_q), or packed (nheads, total_q).
Operand lse_operand(const Tensor& t) {
  Operand o;
  if (!t.present()) return o;
  o.data = static_cast<char*>(t.data);
  o.dtype = t.dtype;
  if (t.ndim == 3) o.stride_batch = t.stride[0];
  o.stride_head = t.stride[t.ndim - 2], o.stride_row = t.stride[t.ndim - 1];
  return o;
}

/// (batch|1, nheads|1, seqlen_q|1, seqlen_k), indexed (b, i, h, j).
Operand bias_operand(const Tensor& t) {
  Operand o;
  if (!t.present()) return o;
  o.data = static_cast<char*>(t.data);
  o.dtype = t.dtype;
  o.stride_batch = t.shape[0] == 1 ? 0 : t.stride[0];
  o.stride_head = t.shape[1] == 1 ? 0 : t.stride[1];
  o.stride_row = t.shape[2] == 1 ? 0 : t.stride[2];
  o.stride_col = t.stride[3];
  return o;
}

Operand sink_operand(const Tensor& t) {
  Operand o;
  if (!t.present()) return o;
  o.data = static_cast<char*>(t.data);
  o.dtype = t.dtype;
  o.stride_head = t.stride[0];
  return o;
}

void require(const char* argument, const Tensor& t) {
  if (!t.present()) invalid(argument, "required, but absent");
}

/// `t` has the dtype of q and exactly the shape of `like`.
void check_like(const char* argument, const Tensor& t, const char* like_name, const Tensor& like, DType dtype) {
  check_dtype(argument, t, dtype);
  if (t.ndim != like.ndim || !std::equal(t.shape, t.shape + t.ndim, like.shape))
    invalid(argument,
            std::string("expected the shape of ") + like_name + ", " + shape_text(like) + ", got " + shape_text(t));
}

/// out, dout: the shape of q, but for headdim_v.
void check_out(const char* argument, const Tensor& t, const Tensor& q, const Problem& p) {
  check_dtype(argument, t, p.dtype);
  check_rank(argument, t, q.ndim,
             q.ndim == 3 ? "(total_q, nheads, headdim_v)" : "(batch, seqlen_q, nheads, headdim_v)");
  if (!std::equal(t.shape, t.shape + t.ndim - 1, q.shape))
    invalid(argument, "expected the shape of q, " + shape_text(q) + ", but for headdim_v, got " + shape_text(t));
  check_dim(argument, t, t.ndim - 1, "headdim_v", p.headdim_v);
}

/// lse, dlse: float32 whatever the dtype of q.
void check_lse(const char* argument, const Tensor& t, const Problem& p) {
  check_dtype(argument, t, DType::f32);
  if (p.sequences.packed_q()) {
    check_rank(argument, t, 2, "(nheads, total_q)");
  } else {
    check_rank(argument, t, 3, "(batch, nheads, seqlen_q)");
    check_dim(argument, t, 0, "batch", p.batch);
  }
  check_dim(argument, t, t.ndim - 2, "nheads", p.nheads);
  check_dim(argument, t, t.ndim - 1, p.sequences.packed_q() ? "total_q" : "seqlen_q", p.rows_q);
}

void read_mask(const Scores& s, Mask& mask) {
  const auto check_window = [](const char* argument, int64_t window) {
    if (window < -1) invalid(argument, "expected >= 0, or -1 for no limit, got " + std::to_string(window));
    return std::min(window, kLongest);
  };
  mask.window_left = check_window("window_left", s.window_left);
  mask.window_right = check_window("window_right", s.window_right);
  if (s.causal) mask.window_right = 0;
  if (s.attention_chunk < 0)
    invalid("attention_chunk", "expected >= 0, 0 for off, got " + std::to_string(s.attention_chunk));
  mask.chunk = std::min(s.attention_chunk, kLongest);
}

void read_alibi(const Tensor& t, Problem& p, Memory& memory) {
  if (!t.present()) return;
  memory.add_input("alibi_slopes", t);
  check_dtype("alibi_slopes", t, DType::f32);
  if (t.ndim != 1 && t.ndim != 2) invalid("alibi_slopes", "expected (nheads) or (batch, nheads), got " + shape_text(t));
  if (t.ndim == 2) check_dim("alibi_slopes", t, 0, "batch", p.batch);
  check_dim("alibi_slopes", t, t.ndim - 1, "nheads", p.nheads);
  p.scores.alibi = static_cast<const float*>(t.data);
  p.scores.alibi_stride_batch = t.ndim == 2 ? t.stride[0] : 0;
  p.scores.alibi_stride_head = t.stride[t.ndim - 1];
}

/// The rows and keys of a bias are the capacity of a sequence: seqlen_q and seqlen_k of the tensors, or where these are
/// packed, max_seqlen_q and max_seqlen_k as given (by default the longest sequence's).
void read_bias(const Tensor& t, const Sequences& s, Problem& p, Memory& memory) {
  if (!t.present()) return;
  memory.add_input("bias", t);
  check_floating("bias", t);
  check_rank("bias", t, 4, "(batch | 1, nheads | 1, seqlen_q | 1, seqlen_k)");
  const int64_t rows = !s.cu_seqlens_q.present() ? p.rows_q : s.max_seqlen_q >= 0 ? s.max_seqlen_q : p.max_seqlen_q;
  const int64_t keys = !s.cu_seqlens_k.present() ? p.sequences.seqlen_k
                       : s.max_seqlen_k >= 0     ? s.max_seqlen_k
                                                 : p.max_seqlen_k;
  if (t.shape[0] != 1) check_dim("bias", t, 0, "batch (or 1)", p.batch);
  if (t.shape[1] != 1) check_dim("bias", t, 1, "nheads (or 1)", p.nheads);
  if (t.shape[2] != 1) check_dim("bias", t, 2, "seqlen_q (or 1)", rows);
  check_dim("bias", t, 3, "seqlen_k", keys);
  p.scores.bias = bias_operand(t);
  std::copy(t.shape, t.shape + 4, p.scores.bias_shape);
}

void read_sink(const Tensor& t, Problem& p, Memory& memory) {
  if (!t.present()) return;
  memory.add_input("sink", t);
  check_floating("sink", t);
  check_rank("sink", t, 1, "(nheads)");
  check_dim("sink", t, 0, "nheads", p.nheads);
  p.scores.sink = sink_operand(t);
}

/// (seed, offset) in memory: read on the CPU, left to the kernels on a device.
void read_dropout_state(const Dropout& dropout, Problem& p, Memory& memory) {
  const Tensor& state = dropout.state;
  if (!state.present()) return;
  memory.add_input("dropout.state", state);
  check_dtype("dropout.state", state, DType::i64);
  check_rank("dropout.state", state, 1, "(2)");
  check_dim("dropout.state", state, 0, "2 entries, seed and offset,", 2);
  if (!p.device.is_cpu()) return;
  const auto* values = static_cast<const int64_t*>(state.data);
  p.scores.dropout.seed = static_cast<uint64_t>(values[0]);
  p.scores.dropout.offset = static_cast<uint64_t>(values[state.stride[0]]);
  p.scores.dropout.state = {};
}

std::string accumulation(DType t) { return t == DType::f64 ? "float64" : "float32"; }

void read_scores(const Scores& s, const Sequences& sequences, const Dropout& dropout, Problem& p, Memory& memory) {
  ScorePipeline& scores = p.scores;
  scores.scale = s.softmax_scale.value_or(1.0 / std::sqrt(static_cast<double>(p.headdim)));
  // Kernels compute in fp32, but for those of fp64.
  const double most = p.dtype == DType::f64 ? std::numeric_limits<double>::max() : std::numeric_limits<float>::max();
  if (!(std::abs(scores.scale) <= most))
    invalid("softmax_scale",
            "expected a finite number that " + accumulation(p.dtype) + " holds, got " + number_text(scores.scale));
  scores.softcap = s.softcap;
  if (!(s.softcap >= 0.0 && s.softcap <= most))
    invalid("softcap", "expected a finite number >= 0 that " + accumulation(p.dtype) + " holds, 0 for off, got " +
                           number_text(s.softcap));
  read_mask(s, scores.mask);
  read_alibi(s.alibi_slopes, p, memory);
  read_bias(s.bias, sequences, p, memory);
  read_sink(s.sink, p, memory);
  if (!(dropout.p >= 0.0 && dropout.p < 1.0))
    invalid("dropout_p", "expected 0 <= p < 1, got " + std::to_string(dropout.p));
  scores.dropout = dropout;
  read_dropout_state(dropout, p, memory);
}

/// What forward and backward share: q, k, v, the sequences and the score pipeline. New keys make k and v outputs.
template <class Call>
void read_common(const Call& call, const NewKeys& new_keys, Problem& p, Memory& memory) {
  const bool writes = new_keys.k.present();
  memory.add_input("q", call.q);
  writes ? memory.add_output("k", call.k) : memory.add_input("k", call.k);
  writes ? memory.add_output("v", call.v) : memory.add_input("v", call.v);
  check_floating("q", call.q);
  p.dtype = call.q.dtype;
  p.device = call.q.device;
  check_dtype("k", call.k, p.dtype);
  check_dtype("v", call.v, p.dtype);
  read_sequences(call.q, call.k, call.v, call.sequences, new_keys, memory, p);
  p.q = operand(call.q), p.k = operand(call.k), p.v = operand(call.v);
  read_scores(call.scores, call.sequences, call.dropout, p, memory);
  p.run = call.run;
}

}  // namespace

Operand operand(const Tensor& t) {
  Operand o;
  o.data = static_cast<char*>(t.data);
  o.dtype = t.dtype;
  const int64_t* stride = t.stride + t.ndim - 3;
  if (t.ndim == 4) o.stride_batch = t.stride[0];
  o.stride_row = stride[0], o.stride_head = stride[1], o.stride_col = stride[2];
  return o;
}

Problem make_problem(const Forward& call) {
  require("q", call.q), require("k", call.k), require("v", call.v), require("out", call.out);
  Problem p;
  Memory memory(call.q.device);
  read_common(call, call.new_keys, p, memory);
  read_rotary(call.rotary, call.new_keys, memory, p);
  memory.add_output("out", call.out);
  check_out("out", call.out, call.q, p);
  p.out = operand(call.out);
  if (call.lse.present()) {
    memory.add_output("lse", call.lse);
    check_lse("lse", call.lse, p);
    p.lse = lse_operand(call.lse);
  }
  memory.check_outputs();
  p.features = features_of(p);
  return p;
}

Problem make_problem(const Backward& call) {
  require("dout", call.dout), require("q", call.q), require("k", call.k), require("v", call.v);
  require("out", call.out), require("lse", call.lse);
  require("dq", call.dq), require("dk", call.dk), require("dv", call.dv);
  Problem p;
  p.pass = Pass::backward;
  Memory memory(call.q.device);
  read_common(call, {}, p, memory);
  if (call.sequences.block_table.present() || call.sequences.cache_batch_idx.present())
    fail(ErrorCode::not_supported, call.sequences.block_table.present() ? "block_table" : "cache_batch_idx",
         "a KV cache has no gradient; backward takes k and v as (batch, seqlen_k, ...) or packed");

  memory.add_input("dout", call.dout);
  memory.add_input("out", call.out);
  memory.add_input("lse", call.lse);
  check_out("dout", call.dout, call.q, p);
  check_out("out", call.out, call.q, p);
  check_lse("lse", call.lse, p);
  p.dout = operand(call.dout), p.out = operand(call.out), p.lse = lse_operand(call.lse);
  if (call.dlse.present()) {
    memory.add_input("dlse", call.dlse);
    check_lse("dlse", call.dlse, p);
    p.dlse = lse_operand(call.dlse);
  }

  memory.add_output("dq", call.dq);
  memory.add_output("dk", call.dk);
  memory.add_output("dv", call.dv);
  check_like("dq", call.dq, "q", call.q, p.dtype);
  check_like("dk", call.dk, "k", call.k, p.dtype);
  check_like("dv", call.dv, "v", call.v, p.dtype);
  p.dq = operand(call.dq), p.dk = operand(call.dk), p.dv = operand(call.dv);
  if (call.dbias.present()) {
    if (!call.scores.bias.present()) invalid("dbias", "given without bias");
    memory.add_output("dbias", call.dbias);
    check_like("dbias", call.dbias, "bias", call.scores.bias, DType::f32);
    p.dbias = bias_operand(call.dbias);
  }
  if (call.dsink.present()) {
    if (!call.scores.sink.present()) invalid("dsink", "given without sink");
    memory.add_output("dsink", call.dsink);
    check_like("dsink", call.dsink, "sink", call.scores.sink, DType::f32);
    p.dsink = sink_operand(call.dsink);
  }
  memory.check_outputs();
  p.features = features_of(p);
  return p;
}

}  // namespace flash_attn
