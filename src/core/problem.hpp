// Problem: the one normalised description of an attention call that all backends read.
//
// Built and checked in one place (problem.cpp) from any entry point. After it exists nobody asks "is this varlen?":
// it is operands (memory), sequences (who attends to whom), and the score pipeline (what a score is).
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>
#include <string>

#include "core/features.hpp"
#include "core/mask.hpp"
#include "flash_attn/flash_attn.hpp"

namespace flash_attn {

/// A tensor in the one layout (batch, row, head, col). Packed tensors have one batch entry; pages are batch entries.
struct Operand {
  char* data = nullptr;
  DType dtype = DType::f32;
  int64_t stride_batch = 0, stride_row = 0, stride_head = 0, stride_col = 0;  // in elements

  bool present() const { return data != nullptr; }
  /// Address of (batch, row, head, 0).
  char* at(int64_t batch, int64_t row, int64_t head) const {
    return data + (batch * stride_batch + row * stride_row + head * stride_head) * static_cast<int64_t>(size_of(dtype));
  }
};

/// Row `row` of batch entry or page `batch` of k; it and those behind it, `run` rows in all, lie there one after the
/// other.
struct KeyRun {
  int64_t batch, row, run;
};

/// One batch entry: rows [q_row, q_row + seqlen_q) of q's batch entry q_batch attend to keys
/// [k_row, k_row + seqlen_k) of k's batch entry k_batch, or, with pages, of the logical run that `pages` maps.
struct Sequence {
  int64_t q_batch, q_row, seqlen_q;
  int64_t k_batch, k_row, seqlen_k;
  const int32_t* pages;  // nullptr: strided. Else key t is row t % page_size of page pages[t / page_size], t from k_row

  bool empty() const { return seqlen_q <= 0 || seqlen_k <= 0; }
  /// Where key t is, counted from the first row of its batch entry or first page.
  KeyRun key_run(int64_t t, int64_t page_size) const {
    if (!pages) return {k_batch, t, std::numeric_limits<int64_t>::max()};
    return {pages[t / page_size], t % page_size, page_size - t % page_size};
  }
};

/// All ways to say where sequences are. Read through at(b) only. The pointers live where q lives: on the CPU their
/// contents have been checked; on a device nobody has read them, and kernels follow `clamped` (core/sequences.hpp).
struct SequenceTable {
  int64_t batch = 0;
  int64_t seqlen_q = 0, seqlen_k = 0;  // fixed length (also the capacity of a paged or fixed key source)
  const int32_t *cu_seqlens_q = nullptr, *cu_seqlens_k = nullptr;
  const int32_t *seqused_q = nullptr, *seqused_k = nullptr;
  int64_t used_k = -1;  // of every sequence, instead of seqused_k; -1: not given
  const int32_t *leftpad_k = nullptr, *cache_batch_idx = nullptr;
  const int32_t* block_table = nullptr;
  int64_t block_table_stride = 0, page_size = 0;
  int64_t seqlen_new = 0;                   // keys that join each sequence behind its seqused_k, or
  const int32_t* cu_seqlens_new = nullptr;  // how many join each

  int64_t new_keys(int64_t b) const {
    return cu_seqlens_new ? int64_t{cu_seqlens_new[b + 1]} - cu_seqlens_new[b] : seqlen_new;
  }
  bool packed_q() const { return cu_seqlens_q != nullptr; }
  /// Whether it is told how many keys of each sequence are in use, and how many are, before new keys join.
  bool counts_keys() const { return seqused_k != nullptr || used_k >= 0; }
  int64_t used(int64_t b) const { return seqused_k ? seqused_k[b] : used_k; }

  Sequence at(int64_t b) const {
    Sequence s{b, 0, seqlen_q, b, 0, seqlen_k, nullptr};
    if (cu_seqlens_q)
      s = {0, cu_seqlens_q[b], cu_seqlens_q[b + 1] - cu_seqlens_q[b], s.k_batch, 0, s.seqlen_k, nullptr};
    if (cu_seqlens_k) {
      s.seqlen_k = int64_t{cu_seqlens_k[b + 1]} - cu_seqlens_k[b];
      if (!block_table) s.k_batch = 0, s.k_row = cu_seqlens_k[b];  // with pages, cu_seqlens_k gives lengths only
    }
    if (cache_batch_idx) s.k_batch = cache_batch_idx[b];
    if (seqused_q) s.seqlen_q = seqused_q[b];
    if (counts_keys()) s.seqlen_k = used(b) + new_keys(b);
    if (leftpad_k) s.k_row += leftpad_k[b], s.seqlen_k -= leftpad_k[b];
    if (s.seqlen_k < 0) s.seqlen_k = 0;
    if (block_table) s.pages = block_table + b * block_table_stride;
    return s;
  }
};

/// What happens before attention (append.hpp): new keys join the cache, and are rotated, as the queries are.
struct Append {
  Operand k, v;            // (batch, row, head, col); absent if nothing joins
  int64_t max_rows = 0;    // that join one sequence
  int64_t rows = 0;        // of the memory, per batch entry
  Operand cos, sin;        // (row: position, col); absent if nothing is rotated
  int64_t rotary_dim = 0;  // even
  bool interleaved = false;
  const int32_t* positions = nullptr;  // of a sequence's first query and first new key; nullptr: its used keys

  bool rotates() const { return cos.present(); }
  bool present() const { return rows > 0 || rotates(); }
};

/// The score pipeline, in its order. Gradients run through the same list backwards.
struct ScorePipeline {
  double scale = 1.0;
  double softcap = 0.0;  // 0: off
  const float* alibi = nullptr;
  int64_t alibi_stride_batch = 0, alibi_stride_head = 0;
  Operand bias{};           // indexed (b, i, h, j); broadcast dimensions have stride 0
  int64_t bias_shape[4]{};  // (batch|1, nheads|1, rows|1, keys) of bias and dbias; no sequence is longer
  Mask mask{};
  Operand sink{};     // stride_head only
  Dropout dropout{};  // `state` is present on a device only, for its kernels; else seed and offset are right

  float alibi_slope(int64_t b, int64_t h) const {
    return alibi ? alibi[b * alibi_stride_batch + h * alibi_stride_head] : 0.0f;
  }
};

enum class Pass { forward, backward };

struct Problem {
  Pass pass = Pass::forward;
  DType dtype = DType::f32;  // of q, k, v, out and of dout, dq, dk, dv
  Device device{};

  int64_t batch = 0;
  int64_t nheads = 0, nheads_k = 0;  // nheads = group() * nheads_k; query head h reads key head h / group()
  int64_t headdim = 0, headdim_v = 0;
  int64_t max_seqlen_q = 0, max_seqlen_k = 0;  // exact on the CPU; bounds where the lengths live on a device
  int64_t rows_q = 0, rows_k = 0;              // rows per batch entry of the memory: seqlen, total or page_size
  int64_t batch_q = 0, batch_k = 0;            // batch entries of the memory: batch, 1 or num_blocks

  Operand q, k, v, out;
  Operand lse;                 // fp32, (batch, row, head); stride_col unused; absent if not wanted
  Operand dout, dq, dk, dv;    // backward only
  Operand dlse, dbias, dsink;  // backward only, optional

  SequenceTable sequences;
  Append append;  // forward only
  ScorePipeline scores;
  Run run;
  Features features = 0;

  int64_t group() const { return nheads_k ? nheads / nheads_k : 1; }
  /// Whether no result has an element. A batch of sequences without rows may be of any size: nobody should loop over
  /// it.
  bool writes_nothing() const {
    const bool no_queries = batch_q == 0 || rows_q == 0, no_keys = batch_k == 0 || rows_k == 0;
    if (pass == Pass::forward) return no_queries && append.rows == 0;
    return no_queries && no_keys && !dbias.present() && !dsink.present();
  }
  float empty_lse() const {
    return run.positive_empty_lse ? std::numeric_limits<float>::infinity() : -std::numeric_limits<float>::infinity();
  }
};

/// (batch, row, head, col), or packed (row, head, col) as the only batch entry.
Operand operand(const Tensor& t);

/// Checks everything about the call (shapes, dtypes, devices, ranges, overlaps) and returns its normal form.
/// Throws Error naming the argument, what was expected and what came. Reads integer tensors on the CPU only.
Problem make_problem(const Forward& call);
Problem make_problem(const Backward& call);

/// One line for people: "forward bfloat16 batch 2, 16 heads (4 of keys), headdim 128, seqlen 4096 x 4096, causal".
std::string describe(const Problem& problem);

}  // namespace flash_attn
