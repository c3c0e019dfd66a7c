// What the drivers of both passes share: finding rows, packing heads, the score pipeline in kernel units.
#pragma once

#include <cstdint>

#include "core/problem.hpp"
#include "cpu/kernels.hpp"

namespace flash_attn::cpu {

inline constexpr double kLog2e = 1.4426950408889634;
inline constexpr double kLn2 = 0.6931471805599453;

inline int64_t divide_up(int64_t n, int64_t by) { return (n + by - 1) / by; }
inline int64_t round_up(int64_t n, int64_t to) { return divide_up(n, to) * to; }

/// Addresses of keys [first, first + n) of head `head` of one sequence; a page is looked up once, not once per key.
void key_rows(const Problem& p, const Operand& x, const Sequence& s, int64_t head, int64_t first, int64_t n,
              const char** rows);

/// How a kernel gets scores from products x = (sign q) . k:  s = scale x, or softcap_log2 tanh(scale x), in log2 units.
/// The scale is positive, so that maxima of x are maxima of s and -inf stays what it is; q carries only its sign, which
/// rounds nothing.
struct ScoreScale {
  float sign, scale, softcap_log2;  // softcap_log2 0: off
};
ScoreScale score_scale(const ScorePipeline& scores);

/// Dropout of a task whose rows are `rows` and whose key 0 is key first_key of its sequence.
DropoutTask dropout_task(const Dropout& dropout, const DropoutRow* rows, int64_t first_key);

/// The bias of a task whose rows begin at `rows`, for that key. Absent: no rows.
RowList bias_rows(const ScorePipeline& scores, const char* const* rows, int64_t n, int64_t first_key);

/// Counts keys from `step` keys further on: what n rows see, where they stand, and where their bias begins if they have
/// one.
void move_origin(const ScorePipeline& scores, int64_t step, int64_t n, int64_t* lo, int64_t* hi, int64_t* position,
                 const char** bias);

/// The kernels for a problem: by its dtype, and where few rows make packing a waste, the one that reads keys in place.
const AttendKernel& attend_kernel(const Kernels& kernels, const Problem& problem);
const BackwardKernel& backward_kernel(const Kernels& kernels, DType dtype);

/// The sink of a head as a logit (natural log units).
double sink_logit(const ScorePipeline& s, int64_t head);

/// batches x rows x heads rows of `cols` elements, all bits zero.
void clear(const Operand& x, int64_t batches, int64_t rows, int64_t heads, int64_t cols);

/// Rows that no task writes (they belong to no sequence, or theirs has no queries or no keys): before the tasks, the
/// outputs are cleared as a whole if there are any. out, dq, dk, dv: 0; lse: what a row that sees nothing has.
void clear_if_uncovered(const Problem& p);

void forward(const Problem& problem, const Kernels& kernels);
void backward(const Problem& problem, const Kernels& kernels);

}  // namespace flash_attn::cpu
