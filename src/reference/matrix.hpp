// Matrix: rows of doubles; and the only code of the oracle that knows dtypes: loading memory into doubles and
// rounding doubles, once, into memory.
#pragma once

#include <cstdint>
#include <cstring>
#include <span>
#include <vector>

#include "core/half.hpp"
#include "core/problem.hpp"
#include "reference/key_source.hpp"

namespace flash_attn::reference {

inline double load(const char* address, DType dtype) {
  uint16_t half;
  float single;
  double value;
  switch (dtype) {
    case DType::f16: return std::memcpy(&half, address, sizeof half), f16_to_double(half);
    case DType::bf16: return std::memcpy(&half, address, sizeof half), bf16_to_double(half);
    case DType::f32: return std::memcpy(&single, address, sizeof single), single;
    case DType::f64: return std::memcpy(&value, address, sizeof value), value;
    default: throw Error(ErrorCode::internal, "reference: not a floating dtype");
  }
}

inline void store(char* address, DType dtype, double value) {
  uint16_t half;
  const float single = static_cast<float>(value);
  switch (dtype) {
    case DType::f16: half = f16_from_double(value), std::memcpy(address, &half, sizeof half); return;
    case DType::bf16: half = bf16_from_double(value), std::memcpy(address, &half, sizeof half); return;
    case DType::f32: std::memcpy(address, &single, sizeof single); return;
    case DType::f64: std::memcpy(address, &value, sizeof value); return;
    default: throw Error(ErrorCode::internal, "reference: not a floating dtype");
  }
}

/// Element (batch, row, head, col) of an operand.
inline char* element(const Operand& x, int64_t batch, int64_t row, int64_t head, int64_t col) {
  return x.at(batch, row, head) + col * x.stride_col * static_cast<int64_t>(size_of(x.dtype));
}

inline void load_row(const Operand& x, int64_t batch, int64_t row, int64_t head, std::span<double> to) {
  for (std::size_t c = 0; c < to.size(); ++c) {
    to[c] = load(element(x, batch, row, head, static_cast<int64_t>(c)), x.dtype);
  }
}

inline void store_row(const Operand& x, int64_t batch, int64_t row, int64_t head, std::span<const double> from) {
  for (std::size_t c = 0; c < from.size(); ++c) {
    store(element(x, batch, row, head, static_cast<int64_t>(c)), x.dtype, from[c]);
  }
}

/// Writes `value` to all of a (batch, row, head, col) operand of the given extents.
inline void fill(const Operand& x, int64_t batch, int64_t rows, int64_t heads, int64_t cols, double value) {
  const std::vector<double> line(static_cast<std::size_t>(cols), value);
  for (int64_t b = 0; b < batch; ++b) {
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t h = 0; h < heads; ++h) store_row(x, b, r, h, line);
    }
  }
}

class Matrix {
 public:
  Matrix(int64_t rows, int64_t cols) : cols_(static_cast<std::size_t>(cols)), data_(rows * cols, 0.0) {}
  std::span<double> row(int64_t r) { return {data_.data() + r * cols_, cols_}; }
  std::span<const double> row(int64_t r) const { return {data_.data() + r * cols_, cols_}; }

 private:
  std::size_t cols_;
  std::vector<double> data_;
};

/// Keys (or values) [0, seqlen_k) of one sequence and one head of them: (seqlen_k, cols).
inline Matrix load_keys(const Operand& x, const KeySource& source, int64_t seqlen_k, int64_t head, int64_t cols) {
  Matrix keys(seqlen_k, cols);
  for (int64_t j = 0; j < seqlen_k; ++j) {
    const KeyPlace at = source.place(j);
    load_row(x, at.batch, at.row, head, keys.row(j));
  }
  return keys;
}

inline double dot(std::span<const double> a, std::span<const double> b) {
  double sum = 0.0;
  for (std::size_t c = 0; c < a.size(); ++c) sum += a[c] * b[c];
  return sum;
}

/// y += a * x
inline void add_scaled(std::span<double> y, double a, std::span<const double> x) {
  for (std::size_t c = 0; c < y.size(); ++c) y[c] += a * x[c];
}

}  // namespace flash_attn::reference
