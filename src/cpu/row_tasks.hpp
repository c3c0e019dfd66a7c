// What operations on rows share: which numbers they take, and how rows become tasks.
#pragma once

#include <algorithm>
#include <string>

#include "core/check.hpp"
#include "cpu/rounding.hpp"
#include "cpu/threads.hpp"

namespace flash_attn::cpu {

/// Of a task, at least: some ten KiB, a few microseconds.
inline constexpr int64_t kTaskElements = 1 << 14;

/// body(first, n) for rows [first, first + n), on as many workers as there are tasks; each begins with neighbours.
template <class Body>
void for_row_tasks(int64_t rows, int64_t row_elements, const Body& body) {
  const int64_t step = divide_up(kTaskElements, std::max<int64_t>(row_elements, 1));
  parallel_for(
      divide_up(rows, step), max_workers(), [&](int64_t i, int) { body(i * step, std::min(step, rows - i * step)); },
      Order::by_place);
}

/// fp32, bf16 or fp16; the columns of a row next to each other.
inline void check_row_dtype(const char* name, const Tensor& t) {
  if (t.dtype == DType::f32 || t.dtype == DType::bf16 || t.dtype == DType::f16) return;
  fail(ErrorCode::type_mismatch, name, std::string("expected float32, bfloat16 or float16, got ") + name_of(t.dtype));
}
inline void check_row_numbers(const char* name, const Tensor& t) {
  check_row_dtype(name, t);
  const int last = t.ndim - 1;
  if (t.shape[last] > 1 && t.stride[last] != 1)
    invalid(name, "expected a contiguous last dimension, got stride " + std::to_string(t.stride[last]));
}

}  // namespace flash_attn::cpu
