#include "reservation.hpp"

#include <fmt/format.h>
#include <sys/mman.h>

#include <algorithm>

#include "flash_attn/error.hpp"
#include "terminal.hpp"

namespace flash_attn::cli {

Tensor Reservation::tensor(DType dtype, std::initializer_list<int64_t> shape) {
  double bytes = static_cast<double>(size_of(dtype));
  for (const int64_t n : shape) bytes *= static_cast<double>(std::max<int64_t>(n, 0));
  if (bytes > 0x1p46)
    throw Error(ErrorCode::invalid_argument,
                fmt::format("a tensor of {} is beyond the address space", bytes_text(bytes)));
  const std::size_t size = static_cast<std::size_t>(bytes) + 1;
  void* data = mmap(nullptr, size, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (data == MAP_FAILED)
    throw Error(ErrorCode::out_of_memory, fmt::format("cannot reserve {} of address space", bytes_text(bytes)));
  maps_.emplace_back(data, size);
  return view(data, dtype, shape);
}

Tensor Reservation::numbers(std::vector<int32_t> values) {
  const auto& kept = numbers_.emplace_back(std::move(values));
  return view(kept.data(), {static_cast<int64_t>(kept.size())});
}

Tensor Reservation::matrix(std::vector<int32_t> values, int64_t rows, int64_t cols) {
  return view(numbers_.emplace_back(std::move(values)).data(), {rows, cols});
}

Reservation::~Reservation() {
  for (const auto& [data, size] : maps_) munmap(data, size);
}

}  // namespace flash_attn::cli
