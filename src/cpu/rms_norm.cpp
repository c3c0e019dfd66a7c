#include "cpu/rms_norm.hpp"

#include <algorithm>

#include "core/check.hpp"
#include "cpu/arena.hpp"
#include "cpu/isa.hpp"
#include "cpu/row_tasks.hpp"

namespace flash_attn::cpu {
namespace {

/// Rows whose sum for dweight is one partial sum: at least so many, so that partial sums are few beside the rows, and
/// at most kMostParts of them. Nothing here knows of threads: they change no bit.
constexpr int64_t kLeastRows = 16, kMostParts = 128;

Rows rows_of(const Tensor& t) {
  if (!t.present()) return {};
  return {static_cast<char*>(t.data), t.dtype, t.ndim == 2 ? t.stride[0] : 0};
}
Rows from_row(Rows rows, int64_t first) {
  if (rows.data) rows.data += first * rows.stride * static_cast<int64_t>(size_of(rows.dtype));
  return rows;
}

/// (rows, cols) of x's shape.
void check_rows(const char* name, const Tensor& t, const Tensor& x) {
  check_rank(name, t, 2, "(rows, cols)");
  check_dim(name, t, 0, "rows", x.shape[0]);
  check_dim(name, t, 1, "cols", x.shape[1]);
  check_row_numbers(name, t);
}
void check_columns(const char* name, const Tensor& t, const Tensor& x) {
  check_rank(name, t, 1, "(cols)");
  check_dim(name, t, 0, "cols", x.shape[1]);
  check_row_numbers(name, t);
}
void check_rstd(const Tensor& t, const Tensor& x) {
  check_rank("rstd", t, 2, "(rows, 1)");
  check_dim("rstd", t, 0, "rows", x.shape[0]);
  check_dim("rstd", t, 1, "1", 1);
  check_dtype("rstd", t, DType::f32);
  if (t.shape[0] > 1 && t.stride[0] != 1) invalid("rstd", "expected dense memory");
}

/// weight (cols) -> (cols padded to the width), in fp32, as it counts.
const float* read_weight(const Tensor& weight, bool zero_centered, const Kernels& k, float* to) {
  k.read_row(rows_of(weight), weight.shape[0], zero_centered ? 1.0f : 0.0f, to);
  return to;
}

}  // namespace

void rms_norm(const RmsNorm& call) {
  check_rows("x", call.x, call.x);
  check_rows("y", call.y, call.x);
  if (call.residual.present()) check_rows("residual", call.residual, call.x);
  if (call.h.present()) check_rows("h", call.h, call.x);
  check_columns("weight", call.weight, call.x);
  check_rstd(call.rstd, call.x);
  const int64_t rows = call.x.shape[0], cols = call.x.shape[1];
  if (rows == 0 || cols == 0) return;
  const Kernels& k = active_kernels();
  const int64_t ld = round_up(cols, k.width);
  Arena arena(bytes_taken([&](Arena& a) { a.take<float>(ld); }));
  const float* const weight = read_weight(call.weight, call.zero_centered_weight, k, arena.take<float>(ld));
  for_row_tasks(rows, cols, [&](int64_t first, int64_t n) {
    k.norm_rows({.rows = n,
                 .cols = cols,
                 .x = from_row(rows_of(call.x), first),
                 .residual = from_row(rows_of(call.residual), first),
                 .weight = weight,
                 .eps = static_cast<float>(call.eps),
                 .y = from_row(rows_of(call.y), first),
                 .h = from_row(rows_of(call.h), first),
                 .rstd = static_cast<float*>(call.rstd.data) + first});
  });
}

void rms_norm_backward(const RmsNormBackward& call) {
  check_rows("h", call.h, call.h);
  check_rows("dy", call.dy, call.h);
  if (call.dstream.present()) check_rows("dstream", call.dstream, call.h);
  check_rows("dx", call.dx, call.h);
  if (call.dresidual.present()) check_rows("dresidual", call.dresidual, call.h);
  check_columns("weight", call.weight, call.h);
  check_columns("dweight", call.dweight, call.h);
  check_rstd(call.rstd, call.h);
  const int64_t rows = call.h.shape[0], cols = call.h.shape[1];
  if (cols == 0) return;
  const Kernels& k = active_kernels();
  const int64_t ld = round_up(cols, k.width), of_part = std::max(kLeastRows, divide_up(rows, kMostParts)),
                parts = divide_up(rows, of_part);
  Arena arena(bytes_taken([&](Arena& a) { a.take<float>(ld), a.take<float>(parts * ld); }));
  const float* const weight = read_weight(call.weight, call.zero_centered_weight, k, arena.take<float>(ld));
  float* const sums = arena.take<float>(parts * ld);
  parallel_for(
      parts, max_workers(),
      [&](int64_t part, int) {
        const int64_t first = part * of_part;
        float* const dweight = sums + part * ld;
        std::fill_n(dweight, ld, 0.0f);
        k.norm_gradient_rows({.rows = std::min(of_part, rows - first),
                              .cols = cols,
                              .dy = from_row(rows_of(call.dy), first),
                              .dstream = from_row(rows_of(call.dstream), first),
                              .h = from_row(rows_of(call.h), first),
                              .weight = weight,
                              .rstd = static_cast<const float*>(call.rstd.data) + first,
                              .dh = {from_row(rows_of(call.dx), first), from_row(rows_of(call.dresidual), first)},
                              .dweight = dweight});
      },
      Order::by_place);
  // Columns are apart from each other; each is summed in the order of the parts.
  constexpr int64_t kColumns = 512;
  const Rows to = rows_of(call.dweight);
  const int64_t size = static_cast<int64_t>(size_of(to.dtype));
  parallel_for(divide_up(cols, kColumns), parts * cols < kTaskElements ? 1 : max_workers(), [&](int64_t i, int) {
    const int64_t first = i * kColumns;
    k.sum_parts(sums + first, parts, ld, std::min(kColumns, cols - first), {to.data + first * size, to.dtype, 0});
  });
}

}  // namespace flash_attn::cpu
