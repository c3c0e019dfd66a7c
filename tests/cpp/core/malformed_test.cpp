// Every malformed call: the code, the words, and nothing written.
#include <gtest/gtest.h>

#include <cmath>
#include <functional>
#include <limits>
#include <ostream>

#include "core/calls.hpp"

namespace flash_attn::test {
namespace {

constexpr ErrorCode kInvalid = ErrorCode::invalid_argument;
constexpr ErrorCode kType = ErrorCode::type_mismatch;

template <class Call>
struct Row {
  const char* name;
  Call (*make)(Store&);
  std::function<void(Call&, Store&)> spoil;
  ErrorCode code;
  std::vector<const char*> words;  // the message starts with the first and has the others
};

template <class Call>
std::ostream& operator<<(std::ostream& out, const Row<Call>& row) {
  return out << row.name;
}

using F = Forward;
using S = Store;

// clang-format off
const std::vector<Row<Forward>> kForward = {
  {"q_absent", fixed_call, [](F& c, S&) { c.q = {}; }, kInvalid, {"q: required"}},
  {"k_absent", fixed_call, [](F& c, S&) { c.k = {}; }, kInvalid, {"k: required"}},
  {"out_absent", fixed_call, [](F& c, S&) { c.out = {}; }, kInvalid, {"out: required"}},
  {"q_rank_3", fixed_call, [](F& c, S& s) { c.q = s.floats({2, 5, 32}); }, kInvalid, {"q: expected 4 dimensions (batch, seqlen_q, nheads, headdim)", "(2, 5, 32)"}},
  {"k_rank_3", fixed_call, [](F& c, S& s) { c.k = s.floats({2, 7, 16}); }, kInvalid, {"k: expected 4 dimensions (batch, seqlen_k, nheads_k, headdim)", "(2, 7, 16)"}},
  {"v_rank_3", fixed_call, [](F& c, S& s) { c.v = s.floats({2, 7, 12}); }, kInvalid, {"v: expected 4 dimensions"}},
  {"out_rank_3", fixed_call, [](F& c, S& s) { c.out = s.floats({2, 5, 24}); }, kInvalid, {"out: expected 4 dimensions"}},
  {"rank_6", fixed_call, [](F& c, S&) { c.q = view(c.q.data, DType::f32, {1, 1, 1, 1, 1, 1}); }, kInvalid, {"q: expected at most 5 dimensions"}},
  {"rank_huge", fixed_call, [](F& c, S&) { c.q.ndim = 1 << 30; }, kInvalid, {"q: expected at most 5 dimensions"}},
  {"q_packed_without_cu", fixed_call, [](F& c, S& s) { c.q = s.floats({10, 4, 8}); }, kInvalid, {"q: expected 4 dimensions"}},
  {"negative_dimension", fixed_call, [](F& c, S&) { c.q.shape[1] = -5; }, kInvalid, {"q: expected dimensions >= 0", "(2, -5, 4, 8)"}},
  {"headdim_0", fixed_call, [](F& c, S&) { c.q.shape[3] = c.k.shape[3] = 0; }, kInvalid, {"q: expected headdim >= 1"}},
  {"headdim_v_0", fixed_call, [](F& c, S&) { c.v.shape[3] = c.out.shape[3] = 0; }, kInvalid, {"v: expected headdim_v >= 1"}},
  {"nheads_0", fixed_call, [](F& c, S&) { c.q.shape[2] = c.out.shape[2] = 0; }, kInvalid, {"q: expected nheads >= 1"}},
  {"nheads_k_0", fixed_call, [](F& c, S&) { c.k.shape[2] = c.v.shape[2] = 0; }, kInvalid, {"k: expected nheads_k >= 1"}},
  {"headdim_differs", fixed_call, [](F& c, S& s) { c.k = s.floats({2, 7, 2, 9}); }, kInvalid, {"k: expected headdim = 8", "(2, 7, 2, 9)"}},
  {"heads_do_not_divide", fixed_call, [](F& c, S& s) { c.k = s.floats({2, 7, 3, 8}); c.v = s.floats({2, 7, 3, 6}); }, kInvalid, {"k: expected nheads_k to divide nheads = 4", "nheads_k = 3"}},
  {"batch_differs", fixed_call, [](F& c, S& s) { c.k = s.floats({3, 7, 2, 8}); c.v = s.floats({3, 7, 2, 6}); }, kInvalid, {"k: expected batch = 2", "(3, 7, 2, 8)"}},
  {"v_rows_differ", fixed_call, [](F& c, S& s) { c.v = s.floats({2, 6, 2, 6}); }, kInvalid, {"v: expected the shape of k", "(2, 6, 2, 6)"}},
  {"out_rows_differ", fixed_call, [](F& c, S& s) { c.out = s.floats({2, 4, 4, 6}); }, kInvalid, {"out: expected the shape of q"}},
  {"out_headdim_is_not_v", fixed_call, [](F& c, S& s) { c.out = s.floats({2, 5, 4, 8}); }, kInvalid, {"out: expected headdim_v = 6"}},
  {"q_int32", fixed_call, [](F& c, S& s) { c.q = s.floats({2, 5, 4, 8}, DType::i32); }, kType, {"q: expected float16, bfloat16, float32 or float64", "int32"}},
  {"k_dtype_differs", fixed_call, [](F& c, S& s) { c.k = s.floats({2, 7, 2, 8}, DType::bf16); }, kType, {"k: expected float32, got bfloat16"}},
  {"v_dtype_differs", fixed_call, [](F& c, S& s) { c.v = s.floats({2, 7, 2, 6}, DType::f16); }, kType, {"v: expected float32, got float16"}},
  {"out_dtype_differs", fixed_call, [](F& c, S& s) { c.out = s.floats({2, 5, 4, 6}, DType::f64); }, kType, {"out: expected float32, got float64"}},
  {"dtype_unknown", fixed_call, [](F& c, S&) { c.v.dtype = static_cast<DType>(77); }, kType, {"v: unknown dtype"}},
  {"lse_dtype", fixed_call, [](F& c, S& s) { c.lse = s.floats({2, 4, 5}, DType::f64); }, kType, {"lse: expected float32, got float64"}},
  {"lse_shape", fixed_call, [](F& c, S& s) { c.lse = s.floats({2, 5, 4}); }, kInvalid, {"lse: expected nheads = 4", "(2, 5, 4)"}},
  {"lse_rank", packed_call, [](F& c, S& s) { c.lse = s.floats({2, 4, 3}); }, kInvalid, {"lse: expected 2 dimensions (nheads, total_q)"}},
  {"null_data", fixed_call, [](F& c, S&) { c.k.data = nullptr; }, kInvalid, {"k: no data"}},
  {"misaligned", fixed_call, [](F& c, S&) { c.v.data = static_cast<char*>(c.v.data) + 1; }, kInvalid, {"v: expected data aligned"}},
  {"exceeds_memory", fixed_call, [](F& c, S&) { c.q.stride[0] = std::numeric_limits<int64_t>::max(); }, kInvalid, {"q: shape", "exceeds the address space"}},
  {"exceeds_memory_down", fixed_call, [](F& c, S&) { c.q.stride[1] = std::numeric_limits<int64_t>::min(); }, kInvalid, {"q: shape", "exceeds the address space"}},
  {"too_many_elements", fixed_call, [](F& c, S&) { c.k.shape[0] = c.k.shape[1] = int64_t{1} << 40; c.k.stride[0] = c.k.stride[1] = 0; }, kInvalid, {"k: shape", "exceeds the address space"}},
  {"k_on_another_device", fixed_call, [](F& c, S&) { c.k.device = {2, 0}; }, kInvalid, {"k: expected a tensor on the CPU", "cuda:0"}},
  {"out_on_another_device", fixed_call, [](F& c, S&) { c.out.device = {2, 1}; }, kInvalid, {"out: expected a tensor on the CPU", "cuda:1"}},

  {"window_left_minus_2", fixed_call, [](F& c, S&) { c.scores.window_left = -2; }, kInvalid, {"window_left: expected >= 0, or -1", "-2"}},
  {"window_right_minus_9", fixed_call, [](F& c, S&) { c.scores.window_right = -9; }, kInvalid, {"window_right: expected >= 0, or -1", "-9"}},
  {"chunk_negative", fixed_call, [](F& c, S&) { c.scores.attention_chunk = -1; }, kInvalid, {"attention_chunk: expected >= 0"}},
  {"softcap_negative", fixed_call, [](F& c, S&) { c.scores.softcap = -1.0; }, kInvalid, {"softcap: expected a finite number >= 0"}},
  {"softcap_nan", fixed_call, [](F& c, S&) { c.scores.softcap = NAN; }, kInvalid, {"softcap: expected a finite number", "nan"}},
  {"softcap_beyond_fp32", fixed_call, [](F& c, S&) { c.scores.softcap = 3.5e38; }, kInvalid, {"softcap: expected a finite number >= 0 that float32 holds", "3.5e+38"}},
  {"scale_beyond_fp32", fixed_call, [](F& c, S&) { c.scores.softmax_scale = -1e39; }, kInvalid, {"softmax_scale: expected a finite number that float32 holds", "-1e+39"}},
  {"scale_inf", fixed_call, [](F& c, S&) { c.scores.softmax_scale = INFINITY; }, kInvalid, {"softmax_scale: expected a finite number", "inf"}},
  {"scale_nan", fixed_call, [](F& c, S&) { c.scores.softmax_scale = NAN; }, kInvalid, {"softmax_scale: expected a finite number", "nan"}},
  {"dropout_1", fixed_call, [](F& c, S&) { c.dropout.p = 1.0; }, kInvalid, {"dropout_p: expected 0 <= p < 1"}},
  {"dropout_negative", fixed_call, [](F& c, S&) { c.dropout.p = -0.1; }, kInvalid, {"dropout_p: expected 0 <= p < 1"}},
  {"dropout_state_dtype", fixed_call, [](F& c, S& s) { c.dropout.state = s.ints({1, 2}); }, ErrorCode::type_mismatch, {"dropout.state: expected int64, got int32"}},
  {"dropout_state_shape", fixed_call, [](F& c, S& s) { c.dropout.state = s.floats({3}, DType::i64); }, kInvalid, {"dropout.state: expected 2 entries, seed and offset,", "got (3,)"}},
  {"dropout_state_device", fixed_call, [](F& c, S& s) { c.dropout.state = s.floats({2}, DType::i64); c.dropout.state.device = {10, 1}; }, kInvalid, {"dropout.state: expected a tensor on the CPU", "rocm:1"}},
  {"dropout_nan", fixed_call, [](F& c, S&) { c.dropout.p = NAN; }, kInvalid, {"dropout_p: expected 0 <= p < 1", "nan"}},
  {"alibi_dtype", fixed_call, [](F& c, S& s) { c.scores.alibi_slopes = s.floats({4}, DType::bf16); }, kType, {"alibi_slopes: expected float32, got bfloat16"}},
  {"alibi_heads", fixed_call, [](F& c, S& s) { c.scores.alibi_slopes = s.floats({2}); }, kInvalid, {"alibi_slopes: expected nheads = 4", "(2,)"}},
  {"alibi_batch", fixed_call, [](F& c, S& s) { c.scores.alibi_slopes = s.floats({3, 4}); }, kInvalid, {"alibi_slopes: expected batch = 2"}},
  {"alibi_rank", fixed_call, [](F& c, S& s) { c.scores.alibi_slopes = s.floats({2, 4, 1}); }, kInvalid, {"alibi_slopes: expected (nheads) or (batch, nheads)"}},
  {"bias_rank", fixed_call, [](F& c, S& s) { c.scores.bias = s.floats({5, 7}); }, kInvalid, {"bias: expected 4 dimensions"}},
  {"bias_rows", fixed_call, [](F& c, S& s) { c.scores.bias = s.floats({1, 1, 4, 7}); }, kInvalid, {"bias: expected seqlen_q (or 1) = 5"}},
  {"bias_keys", fixed_call, [](F& c, S& s) { c.scores.bias = s.floats({1, 1, 5, 1}); }, kInvalid, {"bias: expected seqlen_k = 7"}},
  {"bias_dtype", fixed_call, [](F& c, S& s) { c.scores.bias = s.floats({1, 1, 5, 7}, DType::i32); }, kType, {"bias: expected float16"}},
  {"sink_heads", fixed_call, [](F& c, S& s) { c.scores.sink = s.floats({2}); }, kInvalid, {"sink: expected nheads = 4"}},
  {"sink_dtype", fixed_call, [](F& c, S& s) { c.scores.sink = s.floats({4}, DType::i64); }, kType, {"sink: expected float16"}},

  {"cu_q_int64", packed_call, [](F& c, S&) { c.sequences.cu_seqlens_q.dtype = DType::i64; }, kType, {"cu_seqlens_q: expected int32, got int64"}},
  {"cu_q_rank", packed_call, [](F& c, S&) { c.sequences.cu_seqlens_q.ndim = 0; }, kInvalid, {"cu_seqlens_q: expected 1 dimension (batch + 1)"}},
  {"cu_q_empty", packed_call, [](F& c, S&) { c.sequences.cu_seqlens_q.shape[0] = 0; }, kInvalid, {"cu_seqlens_q: expected batch + 1 entries"}},
  {"cu_q_strided", packed_call, [](F& c, S& s) { c.sequences.cu_seqlens_q = s.ints({0, 0, 3, 0, 5}); c.sequences.cu_seqlens_q.shape[0] = 3; c.sequences.cu_seqlens_q.stride[0] = 2; }, kInvalid, {"cu_seqlens_q: expected a contiguous"}},
  {"cu_q_first", packed_call, [](F& c, S&) { set(c.sequences.cu_seqlens_q, 0, 1); }, kInvalid, {"cu_seqlens_q[0]: expected 0, got 1"}},
  {"cu_k_first", packed_call, [](F& c, S&) { set(c.sequences.cu_seqlens_k, 0, -1); }, kInvalid, {"cu_seqlens_k[0]: expected 0, got -1"}},
  {"cu_q_decreasing", packed_call, [](F& c, S&) { set(c.sequences.cu_seqlens_q, 2, 2); }, kInvalid, {"cu_seqlens_q[2]: expected at least the entry before, 3, got 2"}},
  {"cu_q_beyond", packed_call, [](F& c, S&) { set(c.sequences.cu_seqlens_q, 2, 7); }, kInvalid, {"cu_seqlens_q[2]: expected at most the rows there are, 6, got 7"}},
  {"cu_k_beyond", packed_call, [](F& c, S&) { set(c.sequences.cu_seqlens_k, 2, 9); }, kInvalid, {"cu_seqlens_k[2]: expected at most the rows there are, 8, got 9"}},
  {"cu_k_other_batch", packed_call, [](F& c, S& s) { c.sequences.cu_seqlens_k = s.ints({0, 4}); }, kInvalid, {"cu_seqlens_k: expected batch + 1 = 3"}},
  {"cu_q_other_device", packed_call, [](F& c, S&) { c.sequences.cu_seqlens_q.device = {2, 0}; }, kInvalid, {"cu_seqlens_q: expected a tensor on the CPU"}},
  {"cu_q_null", packed_call, [](F& c, S&) { c.sequences.cu_seqlens_q.data = nullptr; }, kInvalid, {"cu_seqlens_q: no data"}},
  {"max_q_too_small", packed_call, [](F& c, S&) { c.sequences.max_seqlen_q = 2; }, kInvalid, {"max_seqlen_q: expected at least the longest sequence, 3, got 2"}},
  {"max_k_too_small", packed_call, [](F& c, S&) { c.sequences.max_seqlen_k = 0; }, kInvalid, {"max_seqlen_k: expected at least the longest sequence, 4, got 0"}},
  {"max_q_too_small_fixed", fixed_call, [](F& c, S&) { c.sequences.max_seqlen_q = 4; }, kInvalid, {"max_seqlen_q: expected at least the longest sequence, 5, got 4"}},
  {"seqused_q_beyond", packed_call, [](F& c, S& s) { c.sequences.seqused_q = s.ints({3, 3}); }, kInvalid, {"seqused_q[1]: expected 0 <= entry", "= 2, got 3"}},
  {"seqused_k_beyond", cached_call, [](F& c, S&) { set(c.sequences.seqused_k, 0, 8); }, kInvalid, {"seqused_k[0]: expected 0 <= entry", "= 7, got 8"}},
  {"seqused_k_negative", cached_call, [](F& c, S&) { set(c.sequences.seqused_k, 1, -1); }, kInvalid, {"seqused_k[1]: expected 0 <= entry", "got -1"}},
  {"used_k_beyond", fixed_call, [](F& c, S&) { c.sequences.used_k = 8; }, kInvalid, {"seqused_k: expected at most the rows of the sequence = 7, got 8"}},
  {"used_k_negative", fixed_call, [](F& c, S&) { c.sequences.used_k = -2; }, kInvalid, {"used_k: expected >= 0, or -1", "got -2"}},
  {"used_k_and_seqused_k", cached_call, [](F& c, S&) { c.sequences.used_k = 1; }, kInvalid, {"used_k: given with seqused_k"}},
  {"used_k_and_new_keys", joining_call, [](F& c, S&) { c.sequences.seqused_k = {}; c.sequences.used_k = 7; }, kInvalid, {"seqused_k: expected at most the rows of the sequence less its new keys = 6, got 7"}},
  {"used_k_packed", packed_call, [](F& c, S&) { c.sequences.used_k = 4; }, kInvalid, {"seqused_k: expected at most the rows of the sequence = 3, got 4"}},
  {"seqused_k_batch", cached_call, [](F& c, S& s) { c.sequences.seqused_k = s.ints({1, 1, 1}); }, kInvalid, {"seqused_k: expected batch = 2"}},
  {"leftpad_beyond_used", cached_call, [](F& c, S&) { set(c.sequences.leftpad_k, 1, 5); }, kInvalid, {"leftpad_k[1]: expected 0 <= entry", "= 4, got 5"}},
  {"leftpad_negative", cached_call, [](F& c, S&) { set(c.sequences.leftpad_k, 0, -3); }, kInvalid, {"leftpad_k[0]: expected 0 <= entry", "got -3"}},
  {"cache_idx_beyond", cached_call, [](F& c, S&) { set(c.sequences.cache_batch_idx, 1, 3); }, kInvalid, {"cache_batch_idx[1]: expected 0 <= entry", "= 2, got 3"}},
  {"cache_idx_negative", cached_call, [](F& c, S&) { set(c.sequences.cache_batch_idx, 0, -1); }, kInvalid, {"cache_batch_idx[0]: expected 0 <= entry", "got -1"}},
  {"cache_idx_on_packed", packed_call, [](F& c, S& s) { c.sequences.cache_batch_idx = s.ints({0, 0}); }, kInvalid, {"cache_batch_idx: expected k to be (batch,", "cu_seqlens_k"}},
  {"cache_idx_on_pages", paged_call, [](F& c, S& s) { c.sequences.cache_batch_idx = s.ints({0, 0}); }, kInvalid, {"cache_batch_idx: expected k to be (batch,", "block_table"}},
  {"page_beyond", paged_call, [](F& c, S&) { set(c.sequences.block_table, 1, 5); }, kInvalid, {"block_table[0, 1]: expected 0 <= entry < num_blocks = 5, got 5"}},
  {"page_negative", paged_call, [](F& c, S&) { set(c.sequences.block_table, 2, -1); }, kInvalid, {"block_table[1, 0]: expected 0 <= entry", "got -1"}},
  {"pages_too_few", paged_call, [](F& c, S&) { set(c.sequences.seqused_k, 0, 9); }, kInvalid, {"seqused_k[0]: expected 0 <= entry", "= 8, got 9"}},
  {"page_lengths_beyond", paged_call, [](F& c, S& s) { c.sequences.seqused_k = {}; c.sequences.cu_seqlens_k = s.ints({0, 4, 13}); }, kInvalid, {"cu_seqlens_k[2]: expected a length within the pages, max_blocks * page_size = 8, got 9"}},
  {"block_table_rank", paged_call, [](F& c, S& s) { c.sequences.block_table = s.ints({0, 1}); }, kInvalid, {"block_table: expected 2 dimensions (batch, max_blocks)"}},
  {"block_table_batch", paged_call, [](F& c, S&) { c.sequences.block_table.shape[0] = 1; }, kInvalid, {"block_table: expected batch = 2"}},
  {"block_table_int64", paged_call, [](F& c, S& s) { c.sequences.block_table = s.floats({2, 2}, DType::i64); }, kType, {"block_table: expected int32, got int64"}},
  {"page_size_0", paged_call, [](F& c, S&) { c.k.shape[1] = c.v.shape[1] = 0; }, kInvalid, {"k: expected page_size >= 1"}},

  {"new_v_absent", joining_call, [](F& c, S&) { c.new_keys.v = {}; }, kInvalid, {"new_keys.v: required where new_keys.k is given"}},
  {"new_k_absent", joining_call, [](F& c, S&) { c.new_keys.k = {}; }, kInvalid, {"new_keys.k: required where new_keys.v is given"}},
  {"new_without_seqused", joining_call, [](F& c, S&) { c.sequences.seqused_k = {}; }, kInvalid, {"seqused_k: required where new_keys are given"}},
  {"new_with_cu_seqlens_k", joining_call, [](F& c, S& s) { c.sequences.cu_seqlens_k = s.ints({0, 4, 8}); }, kInvalid, {"cu_seqlens_k: given with new_keys"}},
  {"new_k_rank", joining_call, [](F& c, S& s) { c.new_keys.k = s.floats({4, 2, 8}); }, kInvalid, {"new_keys.k: expected 4 dimensions (batch, seqlen_new, nheads_k, headdim)", "(4, 2, 8)"}},
  {"new_k_packed_rank", joining_call, [](F& c, S& s) { c.new_keys.cu_seqlens = s.ints({0, 1, 2}); }, kInvalid, {"new_keys.k: expected 3 dimensions (total_new, nheads_k, headdim)"}},
  {"new_k_dtype", joining_call, [](F& c, S& s) { c.new_keys.k = s.floats({2, 2, 2, 8}, DType::f16); }, kType, {"new_keys.k: expected float32, got float16"}},
  {"new_k_batch", joining_call, [](F& c, S& s) { c.new_keys.k = s.floats({3, 2, 2, 8}); }, kInvalid, {"new_keys.k: expected batch = 2"}},
  {"new_k_heads", joining_call, [](F& c, S& s) { c.new_keys.k = s.floats({2, 2, 4, 8}); }, kInvalid, {"new_keys.k: expected nheads_k = 2"}},
  {"new_k_headdim", joining_call, [](F& c, S& s) { c.new_keys.k = s.floats({2, 2, 2, 6}); }, kInvalid, {"new_keys.k: expected headdim = 8"}},
  {"new_v_headdim", joining_call, [](F& c, S& s) { c.new_keys.v = s.floats({2, 2, 2, 8}); }, kInvalid, {"new_keys.v: expected headdim_v = 6"}},
  {"new_v_rows", joining_call, [](F& c, S& s) { c.new_keys.v = s.floats({2, 3, 2, 6}); }, kInvalid, {"new_keys.v: expected the shape of new_keys.k, (2, 2, 2, 8)", "(2, 3, 2, 6)"}},
  {"new_cu_alone", joining_call, [](F& c, S& s) { c.new_keys = {.cu_seqlens = s.ints({0, 1, 2})}; }, kInvalid, {"new_keys.cu_seqlens: given without new_keys.k"}},
  {"new_cu_beyond", joining_call, [](F& c, S& s) { c.new_keys = {.k = s.floats({3, 2, 8}), .v = s.floats({3, 2, 6}), .cu_seqlens = s.ints({0, 1, 4})}; }, kInvalid, {"new_keys.cu_seqlens[2]: expected at most the rows there are, 3, got 4"}},
  {"new_cu_decreases", joining_call, [](F& c, S& s) { c.new_keys = {.k = s.floats({3, 2, 8}), .v = s.floats({3, 2, 6}), .cu_seqlens = s.ints({0, 2, 1})}; }, kInvalid, {"new_keys.cu_seqlens[2]: expected at least the entry before, 2, got 1"}},
  {"new_cu_int64", joining_call, [](F& c, S& s) { c.new_keys = {.k = s.floats({3, 2, 8}), .v = s.floats({3, 2, 6}), .cu_seqlens = s.floats({3}, DType::i64)}; }, kType, {"new_keys.cu_seqlens: expected int32, got int64"}},
  {"new_beyond_cache", joining_call, [](F& c, S&) { set(c.sequences.seqused_k, 0, 7); }, kInvalid, {"seqused_k[0]: expected 0 <= entry <= the rows of the sequence less its new keys = 6, got 7"}},
  {"new_page_beyond", joining_call, [](F& c, S&) { set(c.sequences.seqused_k, 1, 3), set(c.sequences.block_table, 3, 5); }, kInvalid, {"block_table[1, 1]: expected 0 <= entry < num_blocks = 5, got 5"}},
  {"new_on_one_page", joining_call, [](F& c, S&) { set(c.sequences.seqused_k, 1, 2), set(c.sequences.block_table, 2, 1); }, kInvalid, {"block_table: sequences 0 and 1 would write the same row 2 of page 1"}},
  {"new_on_one_entry", cached_call, [](F& c, S& s) { c.sequences.seqused_k = s.ints({3, 4}), c.sequences.cache_batch_idx = s.ints({1, 1}); c.new_keys = {.k = s.floats({2, 2, 2, 8}), .v = s.floats({2, 2, 2, 6})}; c.sequences.leftpad_k = {}; }, kInvalid, {"cache_batch_idx: sequences 0 and 1 would write the same row 4 of entry 1"}},
  {"new_leftpad_hides", joining_call, [](F& c, S& s) { c.sequences.leftpad_k = s.ints({6, 0}); }, kInvalid, {"leftpad_k[0]: expected 0 <= entry", "= 5, got 6"}},
  {"new_k_is_cache", joining_call, [](F& c, S&) { c.new_keys.k.data = c.k.data; }, kInvalid, {"k: an output must not overlap", "new_keys.k"}},
  {"cache_is_q", joining_call, [](F& c, S&) { c.q.data = c.k.data; }, kInvalid, {"k: an output must not overlap", "q"}},
  {"cache_expanded", joining_call, [](F& c, S&) { c.v.stride[2] = 0; }, kInvalid, {"v: an output needs every element in a place of its own"}},
  {"rotary_without_new", paged_call, [](F& c, S& s) { c.rotary = {.cos = s.floats({12, 2}), .sin = s.floats({12, 2})}; }, kInvalid, {"rotary.cos: given without new_keys"}},
  {"rotary_sin_absent", joining_call, [](F& c, S&) { c.rotary.sin = {}; }, kInvalid, {"rotary.sin: required"}},
  {"rotary_sin_alone", joining_call, [](F& c, S&) { c.rotary.cos = {}; }, kInvalid, {"rotary.sin: given without rotary.cos"}},
  {"rotary_positions_alone", joining_call, [](F& c, S& s) { c.rotary = {.positions = s.ints({0, 0})}; }, kInvalid, {"rotary.positions: given without rotary.cos"}},
  {"rotary_rank", joining_call, [](F& c, S& s) { c.rotary.cos = s.floats({12, 2, 1}); }, kInvalid, {"rotary.cos: expected 2 dimensions (seqlen_rotary, rotary_dim / 2)"}},
  {"rotary_sin_shape", joining_call, [](F& c, S& s) { c.rotary.sin = s.floats({12, 3}); }, kInvalid, {"rotary.sin: expected the shape of rotary.cos, (12, 2), got (12, 3)"}},
  {"rotary_dtype", joining_call, [](F& c, S& s) { c.rotary.cos = s.floats({12, 2}, DType::f16); }, kType, {"rotary.cos: expected float32, got float16"}},
  {"rotary_too_wide", joining_call, [](F& c, S& s) { c.rotary.cos = c.rotary.sin = s.floats({12, 5}); }, kInvalid, {"rotary.cos: expected 1 to headdim / 2 = 4 columns, got (12, 5)"}},
  {"rotary_no_columns", joining_call, [](F& c, S& s) { c.rotary.cos = c.rotary.sin = s.floats({12, 0}); }, kInvalid, {"rotary.cos: expected 1 to headdim / 2"}},
  {"rotary_too_short", joining_call, [](F& c, S& s) { c.rotary.cos = c.rotary.sin = s.floats({6, 2}); }, kInvalid, {"rotary.cos: expected at least 7 rows, the positions that sequence 0 reaches, got 6"}},
  {"rotary_too_short_for_q", joining_call, [](F& c, S& s) { c.scores.causal = true, c.rotary.cos = c.rotary.sin = s.floats({9, 2}); }, kInvalid, {"rotary.cos: expected at least 10 rows"}},
  {"rotary_position_negative", joining_call, [](F& c, S& s) { c.rotary.positions = s.ints({0, -1}); }, kInvalid, {"rotary.positions[1]: expected at least 0, got -1"}},
  {"rotary_position_beyond", joining_call, [](F& c, S& s) { c.rotary.positions = s.ints({0, 11}); }, kInvalid, {"rotary.cos: expected at least 13 rows, the positions that sequence 1 reaches"}},
  {"rotary_positions_int64", joining_call, [](F& c, S& s) { c.rotary.positions = s.floats({2}, DType::i64); }, kType, {"rotary.positions: expected int32, got int64"}},

  {"out_is_q", fixed_call, [](F& c, S& s) { c.v = s.floats({2, 7, 2, 8}); c.out = c.q; }, kInvalid, {"out: an output must not overlap", "q"}},
  {"out_shares_with_lse", fixed_call, [](F& c, S&) { c.lse.data = static_cast<float*>(c.out.data) + 8; }, kInvalid, {"out: an output must not overlap", "lse"}},
  {"out_expanded", fixed_call, [](F& c, S&) { c.out.stride[0] = 0; }, kInvalid, {"out: an output needs every element in a place of its own"}},
  {"lse_expanded", fixed_call, [](F& c, S&) { c.lse.stride[1] = 0; }, kInvalid, {"lse: an output needs every element in a place of its own"}},
  {"out_over_cu_seqlens", packed_call, [](F& c, S&) { c.sequences.cu_seqlens_q.data = c.out.data; set(c.out, 0, 0); set(c.out, 1, 3); set(c.out, 2, 5); }, kInvalid, {"out: an output must not overlap", "cu_seqlens_q"}},
  {"unknown_backend", fixed_call, [](F& c, S&) { c.run.backend = "nope"; }, kInvalid, {"backend: expected one of cpu, reference", "\"nope\""}},
};

using B = Backward;
const std::vector<Row<Backward>> kBackward = {
  {"dout_absent", backward_call, [](B& c, S&) { c.dout = {}; }, kInvalid, {"dout: required"}},
  {"lse_absent", backward_call, [](B& c, S&) { c.lse = {}; }, kInvalid, {"lse: required"}},
  {"dq_absent", backward_call, [](B& c, S&) { c.dq = {}; }, kInvalid, {"dq: required"}},
  {"dout_shape", backward_call, [](B& c, S& s) { c.dout = s.floats({2, 5, 2, 6}); }, kInvalid, {"dout: expected the shape of q"}},
  {"dout_dtype", backward_call, [](B& c, S& s) { c.dout = s.floats({2, 5, 4, 6}, DType::f64); }, kType, {"dout: expected float32, got float64"}},
  {"lse_shape", backward_call, [](B& c, S& s) { c.lse = s.floats({2, 4, 6}); }, kInvalid, {"lse: expected seqlen_q = 5"}},
  {"dq_shape", backward_call, [](B& c, S& s) { c.dq = s.floats({2, 5, 8, 4}); }, kInvalid, {"dq: expected the shape of q, (2, 5, 4, 8)", "(2, 5, 8, 4)"}},
  {"dk_shape", backward_call, [](B& c, S& s) { c.dk = s.floats({2, 7, 4, 8}); }, kInvalid, {"dk: expected the shape of k"}},
  {"dv_dtype", backward_call, [](B& c, S& s) { c.dv = s.floats({2, 7, 2, 6}, DType::bf16); }, kType, {"dv: expected float32, got bfloat16"}},
  {"dq_is_dk", backward_call, [](B& c, S&) { c.dk.data = c.dq.data; }, kInvalid, {"dq: an output must not overlap", "dk"}},
  {"dv_is_v", backward_call, [](B& c, S&) { c.dv = c.v; }, kInvalid, {"dv: an output must not overlap", "v"}},
  {"dk_expanded", backward_call, [](B& c, S&) { c.dk.stride[2] = 0; }, kInvalid, {"dk: an output needs every element in a place of its own"}},
  {"dlse_shape", backward_call, [](B& c, S& s) { c.dlse = s.floats({2, 5, 4}); }, kInvalid, {"dlse: expected nheads = 4"}},
  {"dlse_dtype", backward_call, [](B& c, S& s) { c.dlse = s.floats({2, 4, 5}, DType::f16); }, kType, {"dlse: expected float32"}},
  {"dbias_without_bias", backward_call, [](B& c, S& s) { c.dbias = s.floats({1, 1, 5, 7}); }, kInvalid, {"dbias: given without bias"}},
  {"dbias_shape", backward_call, [](B& c, S& s) { c.scores.bias = s.floats({1, 1, 5, 7}); c.dbias = s.floats({1, 4, 5, 7}); }, kInvalid, {"dbias: expected the shape of bias"}},
  {"dsink_without_sink", backward_call, [](B& c, S& s) { c.dsink = s.floats({4}); }, kInvalid, {"dsink: given without sink"}},
  {"heads_do_not_divide", backward_call, [](B& c, S& s) { c.k = s.floats({2, 7, 3, 8}); c.v = s.floats({2, 7, 3, 6}); }, kInvalid, {"k: expected nheads_k to divide"}},
  {"window", backward_call, [](B& c, S&) { c.scores.window_left = -5; }, kInvalid, {"window_left: expected >= 0, or -1"}},
  {"cache_batch_idx", backward_call, [](B& c, S& s) { c.sequences.cache_batch_idx = s.ints({0, 1}); }, ErrorCode::not_supported, {"cache_batch_idx: a KV cache has no gradient"}},
};
// clang-format on

template <class Call>
void expect_refused(const Row<Call>& row, void (*run)(const Call&)) {
  Store store;
  Call call = row.make(store);
  row.spoil(call, store);
  store.remember();
  try {
    run(call);
    FAIL() << "no error";
  } catch (const Error& e) {
    const std::string message = e.what();
    EXPECT_EQ(e.code(), row.code) << message;
    EXPECT_EQ(message.rfind(row.words[0], 0), 0u) << message;
    for (const char* word : row.words)
      EXPECT_NE(message.find(word), std::string::npos) << message << "\nlacks " << word;
  }
  EXPECT_TRUE(store.untouched());
}

class MalformedForward : public testing::TestWithParam<Row<Forward>> {};
TEST_P(MalformedForward, IsRefused) { expect_refused<Forward>(GetParam(), forward); }
INSTANTIATE_TEST_SUITE_P(Table, MalformedForward, testing::ValuesIn(kForward),
                         [](const auto& info) { return info.param.name; });

class MalformedBackward : public testing::TestWithParam<Row<Backward>> {};
TEST_P(MalformedBackward, IsRefused) { expect_refused<Backward>(GetParam(), backward); }
INSTANTIATE_TEST_SUITE_P(Table, MalformedBackward, testing::ValuesIn(kBackward),
                         [](const auto& info) { return info.param.name; });

TEST(Malformed, TheUnspoiltCallsAreServed) {
  for (const auto make : {fixed_call, packed_call, paged_call, cached_call, joining_call}) {
    Store store;
    Forward call = make(store);
    call.run.backend = "reference";
    EXPECT_NO_THROW(forward(call));
  }
  Store store;
  EXPECT_NO_THROW(backward(backward_call(store)));
}

}  // namespace
}  // namespace flash_attn::test
