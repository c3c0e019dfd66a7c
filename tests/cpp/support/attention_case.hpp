// AttentionCase: an attention call that owns all its tensors. Set what the test is about, then take the calls.
#pragma once

#include "flash_attn/flash_attn.hpp"
#include "support/host_tensor.hpp"

namespace flash_attn::test {

struct Dims {
  int64_t batch = 2, seqlen_q = 5, seqlen_k = 7, nheads = 4, nheads_k = 2, headdim = 3, headdim_v = 3;
};

struct AttentionCase {
  HostTensor q, k, v, dout, dlse;                 // inputs, N(0, 1)
  HostTensor out, lse, dq, dk, dv, dbias, dsink;  // results, unwritten
  HostTensor alibi, bias, sink;                   // optional, as in Scores
  HostTensor cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, leftpad_k, cache_batch_idx, block_table;
  Scores scores{};  // the numbers; tensors are those above
  Dropout dropout{};
  Run run{};

  /// Fixed length: q is (batch, seqlen_q, nheads, headdim).
  static AttentionCase fixed(DType dtype, const Dims& d, uint64_t seed = 1, const Layout& layout = {}) {
    AttentionCase c;
    c.fill(dtype, {d.batch, d.seqlen_q, d.nheads}, {d.batch, d.seqlen_k, d.nheads_k}, {d.batch, d.nheads, d.seqlen_q},
           d, seed, layout);
    return c;
  }

  /// Packed: sequence b has lengths_q[b] queries and lengths_k[b] keys; `spare` rows belong to no sequence.
  static AttentionCase packed(DType dtype, const std::vector<int32_t>& lengths_q, const std::vector<int32_t>& lengths_k,
                              const Dims& d, uint64_t seed = 1, int64_t spare = 0) {
    const auto cumulate = [](const std::vector<int32_t>& lengths) {
      std::vector<int32_t> cu(1, 0);
      for (int32_t n : lengths) cu.push_back(cu.back() + n);
      return cu;
    };
    AttentionCase c;
    const std::vector<int32_t> cu_q = cumulate(lengths_q), cu_k = cumulate(lengths_k);
    c.cu_seqlens_q = HostTensor::ints(cu_q), c.cu_seqlens_k = HostTensor::ints(cu_k);
    const int64_t total_q = cu_q.back() + spare, total_k = cu_k.back() + spare;
    c.fill(dtype, {total_q, d.nheads}, {total_k, d.nheads_k}, {d.nheads, total_q}, d, seed, {});
    return c;
  }

  Sequences sequences() const {
    return {.cu_seqlens_q = cu_seqlens_q.tensor(),
            .cu_seqlens_k = cu_seqlens_k.tensor(),
            .seqused_q = seqused_q.tensor(),
            .seqused_k = seqused_k.tensor(),
            .leftpad_k = leftpad_k.tensor(),
            .cache_batch_idx = cache_batch_idx.tensor(),
            .block_table = block_table.tensor()};
  }
  Scores all_scores() const {
    Scores s = scores;
    s.alibi_slopes = alibi.tensor(), s.bias = bias.tensor(), s.sink = sink.tensor();
    return s;
  }
  Forward forward_call() const {
    return {.q = q.tensor(),
            .k = k.tensor(),
            .v = v.tensor(),
            .out = out.tensor(),
            .lse = lse.tensor(),
            .sequences = sequences(),
            .scores = all_scores(),
            .dropout = dropout,
            .run = run};
  }
  /// Gradients of bias and sink are asked for where these are given.
  Backward backward_call() {
    if (bias.present()) dbias = bias.like(DType::f32);
    if (sink.present()) dsink = sink.like(DType::f32);
    return {.dout = dout.tensor(),
            .q = q.tensor(),
            .k = k.tensor(),
            .v = v.tensor(),
            .out = out.tensor(),
            .lse = lse.tensor(),
            .dq = dq.tensor(),
            .dk = dk.tensor(),
            .dv = dv.tensor(),
            .dlse = dlse.tensor(),
            .dbias = dbias.tensor(),
            .dsink = dsink.tensor(),
            .sequences = sequences(),
            .scores = all_scores(),
            .dropout = dropout,
            .run = run};
  }

 private:
  void fill(DType dtype, Shape rows_q, Shape rows_k, const Shape& rows_lse, const Dims& d, uint64_t seed,
            const Layout& layout) {
    const auto with = [](Shape rows, int64_t cols) { return rows.push_back(cols), rows; };
    q = HostTensor::normal(dtype, with(rows_q, d.headdim), 10 * seed, 1.0, layout);
    k = HostTensor::normal(dtype, with(rows_k, d.headdim), 10 * seed + 1, 1.0, layout);
    v = HostTensor::normal(dtype, with(rows_k, d.headdim_v), 10 * seed + 2, 1.0, layout);
    dout = HostTensor::normal(dtype, with(rows_q, d.headdim_v), 10 * seed + 3, 1.0, layout);
    dlse = HostTensor::normal(DType::f32, rows_lse, 10 * seed + 4);
    out = dout.like(), lse = dlse.like();
    dq = q.like(), dk = k.like(), dv = v.like();
  }
};

}  // namespace flash_attn::test
