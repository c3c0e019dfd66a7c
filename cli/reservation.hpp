// Tensors of any size that nobody reads: address space without memory.
#pragma once

#include <cstdint>
#include <deque>
#include <initializer_list>
#include <utility>
#include <vector>

#include "flash_attn/tensor.hpp"

namespace flash_attn::cli {

class Reservation {
 public:
  /// Readable zeros. Throws Error if the address space does not hold them.
  Tensor tensor(DType dtype, std::initializer_list<int64_t> shape);
  /// int32 values, which the checks read.
  Tensor numbers(std::vector<int32_t> values);
  Tensor matrix(std::vector<int32_t> values, int64_t rows, int64_t cols);

  Reservation() = default;
  Reservation(const Reservation&) = delete;
  Reservation& operator=(const Reservation&) = delete;
  ~Reservation();

 private:
  std::vector<std::pair<void*, std::size_t>> maps_;
  std::deque<std::vector<int32_t>> numbers_;
};

}  // namespace flash_attn::cli
