// HostTensor: a tensor that owns its memory, of any dtype and any layout, for tests.
//
// Memory starts as 0xFF bytes, which is NaN in every floating dtype: what should be written and is not shows, and so
// does a read or a write between the elements (gaps_untouched).
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <random>
#include <stdexcept>
#include <vector>

#include "core/half.hpp"
#include "flash_attn/tensor.hpp"

namespace flash_attn::test {

using Shape = std::vector<int64_t>;

/// How elements lie in memory. Row-major without gaps by default.
struct Layout {
  std::vector<int> order{};  // dimensions from the outermost to the innermost; empty: 0, 1, 2, ...
  int64_t step = 1;          // stride of the innermost dimension
  int64_t pad = 0;           // elements left free after each run of the innermost dimension
};

class HostTensor {
 public:
  HostTensor() = default;  // absent

  HostTensor(DType dtype, const Shape& shape, Layout layout = {}) {
    view_.dtype = dtype;
    view_.ndim = static_cast<int32_t>(shape.size());
    std::copy(shape.begin(), shape.end(), view_.shape);
    if (layout.order.empty()) {
      layout.order.resize(shape.size());
      std::iota(layout.order.begin(), layout.order.end(), 0);
    }
    int64_t stride = layout.step;
    for (auto dim = layout.order.rbegin(); dim != layout.order.rend(); ++dim) {
      view_.stride[*dim] = stride;
      stride *= shape[*dim];
      if (dim == layout.order.rbegin()) stride += layout.pad;
    }
    memory_.assign(std::max<int64_t>(stride, 1) * size_of(dtype), kUnwritten);
  }

  /// Independent draws of N(0, scale^2).
  static HostTensor normal(DType dtype, const Shape& shape, uint64_t seed, double scale = 1.0, Layout layout = {}) {
    HostTensor t(dtype, shape, layout);
    std::mt19937_64 random(seed);
    std::normal_distribution<double> draw(0.0, scale);
    for (int64_t n = 0; n < t.numel(); ++n) t.set(n, draw(random));
    return t;
  }
  static HostTensor full(DType dtype, const Shape& shape, double value, Layout layout = {}) {
    HostTensor t(dtype, shape, layout);
    for (int64_t n = 0; n < t.numel(); ++n) t.set(n, value);
    return t;
  }
  static HostTensor ints(const std::vector<int32_t>& values, Shape shape = {}) {
    if (shape.empty()) shape = {static_cast<int64_t>(values.size())};
    HostTensor t(DType::i32, shape);
    for (int64_t n = 0; n < t.numel(); ++n) t.set(n, values[n]);
    return t;
  }
  /// An unwritten tensor of the same shape and layout.
  HostTensor like(DType dtype) const {
    HostTensor t = *this;
    t.view_.dtype = dtype;
    t.memory_.assign(memory_.size() / size_of(view_.dtype) * size_of(dtype), kUnwritten);
    return t;
  }
  HostTensor like() const { return like(view_.dtype); }

  bool present() const { return view_.present(); }
  DType dtype() const { return view_.dtype; }
  int64_t numel() const { return view_.numel(); }
  int64_t size(int dim) const { return view_.shape[dim]; }

  Tensor tensor() const {
    Tensor t = view_;
    if (present()) t.data = const_cast<unsigned char*>(memory_.data());
    return t;
  }

  /// Indices of the n-th element in row-major order, whatever the layout.
  Shape index(int64_t n) const {
    Shape at(view_.ndim);
    for (int d = view_.ndim - 1; d >= 0; --d) {
      at[d] = n % view_.shape[d];
      n /= view_.shape[d];
    }
    return at;
  }
  double get(int64_t n) const { return read(offset(index(n))); }
  void set(int64_t n, double value) { write(offset(index(n)), value); }
  template <class... Index>
  double at(Index... i) const {
    return read(offset({static_cast<int64_t>(i)...}));
  }
  template <class... Index>
  void put(double value, Index... i) {
    write(offset({static_cast<int64_t>(i)...}), value);
  }

  /// Whether no byte outside the elements was written.
  bool gaps_untouched() const {
    std::vector<bool> is_element(memory_.size());
    const auto width = static_cast<int64_t>(size_of(view_.dtype));
    for (int64_t n = 0; n < numel(); ++n) std::fill_n(is_element.begin() + offset(index(n)) * width, width, true);
    for (std::size_t n = 0; n < memory_.size(); ++n) {
      if (!is_element[n] && memory_[n] != kUnwritten) return false;
    }
    return true;
  }

 private:
  static constexpr unsigned char kUnwritten = 0xFF;

  int64_t offset(const Shape& at) const { return std::inner_product(at.begin(), at.end(), view_.stride, int64_t{0}); }
  template <class T>
  T peek(int64_t offset) const {
    T x;
    std::memcpy(&x, memory_.data() + offset * sizeof(T), sizeof(T));
    return x;
  }
  template <class T>
  void poke(int64_t offset, T x) {
    std::memcpy(memory_.data() + offset * sizeof(T), &x, sizeof(T));
  }
  double read(int64_t offset) const {
    switch (view_.dtype) {
      case DType::f16: return f16_to_double(peek<uint16_t>(offset));
      case DType::bf16: return bf16_to_double(peek<uint16_t>(offset));
      case DType::f32: return peek<float>(offset);
      case DType::f64: return peek<double>(offset);
      case DType::i32: return peek<int32_t>(offset);
      case DType::i64: return static_cast<double>(peek<int64_t>(offset));
    }
    throw std::logic_error("unknown dtype");
  }
  void write(int64_t offset, double x) {
    switch (view_.dtype) {
      case DType::f16: return poke(offset, f16_from_double(x));
      case DType::bf16: return poke(offset, bf16_from_double(x));
      case DType::f32: return poke(offset, static_cast<float>(x));
      case DType::f64: return poke(offset, x);
      case DType::i32: return poke(offset, static_cast<int32_t>(x));
      case DType::i64: return poke(offset, static_cast<int64_t>(x));
    }
    throw std::logic_error("unknown dtype");
  }

  Tensor view_{};
  std::vector<unsigned char> memory_;
};

}  // namespace flash_attn::test
