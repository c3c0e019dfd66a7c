// FlashAttention-Plus: exact attention on whatever hardware you have.
//
//   std::vector<float> q(B*S*H*D), k(B*S*H*D), v(B*S*H*D), out(B*S*H*D);
//   flash_attn::forward({
//       .q = view(q.data(), {B, S, H, D}), .k = view(k.data(), {B, S, H, D}), .v = view(v.data(), {B, S, H, D}),
//       .out = view(out.data(), {B, S, H, D}),
//       .scores = {.causal = true},
//   });
//
// out = softmax(scale * q k^T + ...) v, one struct per call, designated initialisers, absent = default.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "flash_attn/error.hpp"
#include "flash_attn/export.h"
#include "flash_attn/tensor.hpp"

namespace flash_attn {

/// Where the queries and keys of each sequence are. All absent: q, k, v are (batch, seqlen, nheads, headdim).
/// Integer tensors are int32. A negative `max_seqlen_*` means: as long as it takes.
struct Sequences {
  Tensor cu_seqlens_q{};     // (batch+1): q is (total_q, nheads, headdim), sequence b has rows [cu[b], cu[b+1])
  Tensor cu_seqlens_k{};     // (batch+1): the same for k and v
  Tensor seqused_q{};        // (batch): only that many queries of each sequence; the other rows of out are 0
  Tensor seqused_k{};        // (batch): only that many keys of each sequence (cache_seqlens of a KV cache)
  Tensor leftpad_k{};        // (batch): keys [0, leftpad) of each sequence do not exist; positions count from leftpad
  Tensor cache_batch_idx{};  // (batch): sequence b reads k, v of batch entry cache_batch_idx[b]
  Tensor block_table{};      // (batch, max_blocks): k, v are pages (num_blocks, page_size, nheads_k, headdim)
  int64_t max_seqlen_q = -1;
  int64_t max_seqlen_k = -1;
  int64_t used_k = -1;  // that many keys of every sequence, instead of seqused_k; -1: not given
};

/// Keys and values that join a cache before attention, which sees them too. Those of sequence b are written to its rows
/// [seqused_k[b], seqused_k[b] + new): k and v of the call are then outputs as well, and seqused_k (or used_k) is
/// required. It stays as it is: the caller counts.
struct NewKeys {
  Tensor k{};           // (batch, seqlen_new, nheads_k, headdim) | (total_new, nheads_k, headdim) with cu_seqlens
  Tensor v{};           // (batch, seqlen_new, nheads_k, headdim_v) | (total_new, nheads_k, headdim_v)
  Tensor cu_seqlens{};  // (batch+1): sequence b has rows [cu[b], cu[b+1])
};

/// Rotary position embedding (Su et al. 2021, eq. 34) of new keys and of q: a pair (x, y) of columns becomes
/// (x cos - y sin, x sin + y cos), with the row of cos and sin that is its position. A new key stands where it is
/// written in the cache; query i at seqused_k[b] + i under a mask, and at seqused_k[b] without one. Columns from
/// rotary_dim on stay. Computed in fp32 (fp64 in fp64) and rounded once; the caller's q is only read.
struct Rotary {
  Tensor cos{}, sin{};       // (seqlen_rotary, rotary_dim / 2), in the dtype of q or fp32
  bool interleaved = false;  // pairs are columns (2 i, 2 i + 1); else (i, i + rotary_dim / 2)
  Tensor positions{};        // (batch) int32: instead of seqused_k
};

/// s = scale * q.k -> softcap * tanh(s / softcap) -> + ALiBi -> + bias -> mask -> softmax (with sink) -> dropout.
/// Masks align bottom-right: query i stands at key position p = i + seqlen_k - seqlen_q.
struct Scores {
  std::optional<double> softmax_scale{};  // default headdim^-1/2
  bool causal = false;                    // sees keys <= p (a window_right > 0 is discarded)
  int64_t window_left = -1;               // sees keys >= p - window_left; -1: no limit
  int64_t window_right = -1;              // sees keys <= p + window_right; -1: no limit
  int64_t attention_chunk = 0;            // sees keys of its own chunk of that many positions; 0: off
  double softcap = 0.0;                   // 0: off
  Tensor alibi_slopes{};                  // fp32 (nheads) or (batch, nheads): adds -slope * |p - j|
  Tensor bias{};  // (batch|1, nheads|1, seqlen_q|1, seqlen_k), added as it is; any floating dtype
  Tensor sink{};  // (nheads): one more logit in the denominator; any floating dtype
};

/// Entry (b, h, i, j) is dropped as a function of (seed, offset; b, h, i, j) alone, on every backend.
struct Dropout {
  double p = 0.0;
  uint64_t seed = 0;
  uint64_t offset = 0;
  Tensor state{};  // int64 (2) on q's device: (seed, offset), instead of the two; a device's is read by its kernels
};

/// Memory of a device, ordered on a stream: `release` may hand it out again before the stream has passed. All absent:
/// the backend takes the device's own pool.
struct Allocator {
  // Returns nullptr if there is no memory.
  void* (*allocate)(void* context, int32_t device_type, int32_t device_index, int64_t bytes, void* stream) = nullptr;
  void (*release)(void* context, int32_t device_type, int32_t device_index, void* memory, void* stream) = nullptr;
  void* context = nullptr;
};

/// How to run, never what to compute. On a device a call returns once its work is queued on `stream`; memory of the
/// call must live until the stream has passed it.
struct Run {
  std::string backend{};            // empty: FLASH_ATTENTION_BACKEND, else the best that serves the call
  bool positive_empty_lse = false;  // lse of a row that sees nothing: -inf, or +inf as in FlashAttention-2
  bool deterministic = false;       // CPU backends always are
  void* stream = nullptr;           // of q's device (cudaStream_t, hipStream_t, ...); nullptr: its default stream
  Allocator allocator{};            // of workspace on q's device
  std::string prefer{};             // asked first where no backend is named: a backward's, whoever ran the forward
  bool differentiable = false;      // a backward will follow: a *named* backend must serve it too
};

/// Shapes: fixed length (batch, seqlen, nheads, headdim), or packed (total, nheads, headdim) with cu_seqlens.
/// nheads must be a multiple of nheads_k; v and out may have their own headdim_v. Strides are free.
struct Forward {
  Tensor q;      // (batch, seqlen_q, nheads, headdim) | (total_q, nheads, headdim)
  Tensor k;      // (batch, seqlen_k, nheads_k, headdim) | (total_k, nheads_k, headdim) | pages
  Tensor v;      // (batch, seqlen_k, nheads_k, headdim_v) | (total_k, nheads_k, headdim_v) | pages
  Tensor out;    // (batch, seqlen_q, nheads, headdim_v) | (total_q, nheads, headdim_v): written whole
  Tensor lse{};  // optional, fp32 (batch, nheads, seqlen_q) | (nheads, total_q): natural log, before dropout
  Sequences sequences{};
  Scores scores{};
  Dropout dropout{};
  Run run{};
  NewKeys new_keys{};  // needs seqused_k, and k, v of one entry per sequence or pages
  Rotary rotary{};     // needs new_keys
};

/// Gradients of `out` (and of lse, where dlse is given). `out` and `lse` are the forward's results.
struct Backward {
  Tensor dout;        // as out
  Tensor q, k, v;     // as in Forward (pages are not differentiable)
  Tensor out, lse;    // as in Forward; lse is required
  Tensor dq, dk, dv;  // as q, k, v: written whole
  Tensor dlse{};      // optional, fp32, as lse
  Tensor dbias{};     // optional, fp32, as scores.bias: written whole
  Tensor dsink{};     // optional, fp32 (nheads): written whole
  Sequences sequences{};
  Scores scores{};
  Dropout dropout{};
  Run run{};
};

/// Computes attention. Throws Error, with nothing written, if the call is malformed or nobody serves it.
FLASH_ATTN_API void forward(const Forward& call);
FLASH_ATTN_API void backward(const Backward& call);

/// What a call would do, without doing it: every backend's answer, the choice, its plan in words.
struct Candidate {
  std::string backend;
  bool chosen = false;
  std::string why_not;  // empty: it serves the call
};
struct Explanation {
  std::string problem;
  std::vector<Candidate> candidates;
  std::string plan;  // of the chosen backend; empty if nobody serves the call
  std::string work;  // operations and bytes that the call needs on any machine: "2.15 GFLOP, 8.39 MB: 256 FLOP a byte"
};
FLASH_ATTN_API Explanation explain(const Forward& call);
FLASH_ATTN_API Explanation explain(const Backward& call);

struct BackendInfo {
  std::string name;
  std::string description;
  std::string unavailable;            // empty: usable on this machine
  std::string forward{}, backward{};  // what it serves, in words: "float32, bfloat16 and float16; all but chunk"
};
FLASH_ATTN_API std::vector<BackendInfo> backends();

/// The CPU backend's instruction set in use ("avx512", "avx2", "baseline", ...), and all that this machine can run.
/// FLASH_ATTENTION_CPU_ISA overrides the choice.
FLASH_ATTN_API std::string cpu_isa();
FLASH_ATTN_API std::vector<std::string> cpu_isas();

/// Threads of the CPU backends: affinity mask, cgroup quota, FLASH_ATTENTION_NUM_THREADS, OMP_NUM_THREADS decide
/// the default. Results do not depend on their number. n <= 0 restores the default.
FLASH_ATTN_API int num_threads();
FLASH_ATTN_API void set_num_threads(int n);

/// Runs task(i) for i in [0, n) on the host's own threads; must return after the last. An empty function restores ours.
using ParallelFor = std::function<void(int64_t n, const std::function<void(int64_t)>& task)>;
FLASH_ATTN_API void set_parallel_for(ParallelFor host);

FLASH_ATTN_API const char* version();

}  // namespace flash_attn
