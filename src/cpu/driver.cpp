#include "cpu/driver.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "core/dropout.hpp"
#include "core/half.hpp"

namespace flash_attn::cpu {

void key_rows(const Problem& p, const Operand& x, const Sequence& s, int64_t head, int64_t first, int64_t n,
              const char** rows) {
  const int64_t step = x.stride_row * static_cast<int64_t>(size_of(x.dtype));
  for (int64_t done = 0; done < n;) {
    const KeyRun at = s.key_run(s.k_row + first + done, p.sequences.page_size);
    const int64_t run = std::min(n - done, at.run);
    const char* row = x.at(at.batch, at.row, head);
    for (int64_t i = 0; i < run; ++i, row += step) rows[done + i] = row;
    done += run;
  }
}

ScoreScale score_scale(const ScorePipeline& s) {
  const double scale = std::abs(s.scale) * (s.softcap > 0 ? 1 / s.softcap : kLog2e);
  const auto softcap_log2 = static_cast<float>(s.softcap * kLog2e);
  if (!(static_cast<float>(scale) > 0.0f)) return {0.0f, 1.0f, softcap_log2};
  return {s.scale < 0 ? -1.0f : 1.0f, static_cast<float>(scale), softcap_log2};
}

DropoutTask dropout_task(const Dropout& dropout, const DropoutRow* rows, int64_t first_key) {
  const DropoutRule rule(dropout);
  return {.threshold = static_cast<int32_t>(rule.threshold),
          .scale = rule.scale,
          .key = {rule.key()[0], rule.key()[1]},
          .offset = static_cast<uint32_t>(rule.offset),
          .first_key = first_key,
          .rows = rows};
}

RowList bias_rows(const ScorePipeline& s, const char* const* rows, int64_t n, int64_t first_key) {
  if (!s.bias.present()) return {};
  return {rows, n, s.bias_shape[3] - first_key, s.bias.stride_col, s.bias.dtype};
}

void move_origin(const ScorePipeline& scores, int64_t step, int64_t n, int64_t* lo, int64_t* hi, int64_t* position,
                 const char** bias) {
  const int64_t bias_step = step * scores.bias.stride_col * static_cast<int64_t>(size_of(scores.bias.dtype));
  for (int64_t r = 0; step != 0 && r < n; ++r) {
    lo[r] -= step, hi[r] -= step, position[r] -= step;
    if (scores.bias.present()) bias[r] += bias_step;
  }
}

const AttendKernel& attend_kernel(const Kernels& k, const Problem& p) {
  const bool few_rows = p.max_seqlen_q * p.group() <= kInPlaceRows && p.max_seqlen_k >= kInPlaceKeys;
  const bool whole_pairs = p.headdim % (2 * k.width) == 0 && p.headdim_v % (2 * k.width) == 0;
  if (few_rows && whole_pairs && p.k.stride_col == 1 && p.v.stride_col == 1) return *k.attend_in_place;
  const DType dtype = p.dtype;
  return *(dtype == DType::f32 ? k.attend_f32 : dtype == DType::bf16 ? k.attend_bf16 : k.attend_f16);
}

const BackwardKernel& backward_kernel(const Kernels& k, DType dtype) {
  return *(dtype == DType::f32 ? k.backward_f32 : dtype == DType::bf16 ? k.backward_bf16 : k.backward_f16);
}

double sink_logit(const ScorePipeline& s, int64_t head) {
  const char* at = s.sink.at(0, 0, head);
  switch (s.sink.dtype) {
    case DType::f16: return f16_to_float(*reinterpret_cast<const uint16_t*>(at));
    case DType::bf16: return bf16_to_float(*reinterpret_cast<const uint16_t*>(at));
    case DType::f64: return *reinterpret_cast<const double*>(at);
    default: return *reinterpret_cast<const float*>(at);
  }
}

void clear(const Operand& x, int64_t batches, int64_t rows, int64_t heads, int64_t cols) {
  const auto size = static_cast<int64_t>(size_of(x.dtype));
  for (int64_t b = 0; b < batches; ++b)
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t h = 0; h < heads; ++h) {
        char* to = x.at(b, r, h);
        if (x.stride_col == 1)
          std::memset(to, 0, static_cast<std::size_t>(cols * size));
        else
          for (int64_t c = 0; c < cols; ++c)
            std::memset(to + c * x.stride_col * size, 0, static_cast<std::size_t>(size));
      }
}

static void clear_forward(const Problem& p) {
  clear(p.out, p.batch_q, p.rows_q, p.nheads, p.headdim_v);
  if (!p.lse.present()) return;
  for (int64_t b = 0; b < p.batch_q; ++b)
    for (int64_t r = 0; r < p.rows_q; ++r)
      for (int64_t h = 0; h < p.nheads; ++h) *reinterpret_cast<float*>(p.lse.at(b, r, h)) = p.empty_lse();
  if (!p.scores.sink.present()) return;
  for (int64_t b = 0; b < p.batch; ++b) {  // queries without keys still have the sink
    const Sequence s = p.sequences.at(b);
    for (int64_t i = 0; i < s.seqlen_q; ++i)
      for (int64_t h = 0; h < p.nheads; ++h)
        *reinterpret_cast<float*>(p.lse.at(s.q_batch, s.q_row + i, h)) = static_cast<float>(sink_logit(p.scores, h));
  }
}

void clear_if_uncovered(const Problem& p) {
  int64_t covered_q = 0, covered_k = 0;
  for (int64_t b = 0; b < p.batch; ++b) {
    const Sequence s = p.sequences.at(b);
    if (s.empty()) continue;
    covered_q += s.seqlen_q;
    covered_k += s.seqlen_k;
  }
  const bool all_q = covered_q == p.batch_q * p.rows_q, all_k = covered_k == p.batch_k * p.rows_k;
  if (p.pass == Pass::forward) {
    if (!all_q) clear_forward(p);
    return;
  }
  if (!all_q) clear(p.dq, p.batch_q, p.rows_q, p.nheads, p.headdim);
  if (all_k) return;
  clear(p.dk, p.batch_k, p.rows_k, p.nheads_k, p.headdim);
  clear(p.dv, p.batch_k, p.rows_k, p.nheads_k, p.headdim_v);
}

}  // namespace flash_attn::cpu
