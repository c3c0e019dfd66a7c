#include "cpu/arena.hpp"

#include <cstdlib>
#include <utility>

#include "cpu/system.hpp"
#include "flash_attn/error.hpp"

namespace flash_attn::cpu {
namespace {

constexpr std::size_t kHugePage = std::size_t{2} << 20;
constexpr std::size_t kKeep = std::size_t{64} << 20;  // larger blocks go back to the system at once

struct Block {
  char* data = nullptr;
  std::size_t size = 0;
  ~Block() { std::free(data); }
};
thread_local Block kept;

}  // namespace

Arena::Arena(int64_t wanted) {
  const auto bytes = static_cast<std::size_t>(wanted);
  if (kept.size >= bytes && kept.data) {
    begin_ = std::exchange(kept.data, nullptr);
    size_ = std::exchange(kept.size, 0);
  } else {
    const std::size_t align = bytes >= kHugePage ? kHugePage : 128;
    size_ = (bytes + align - 1) / align * align;
    if (size_ == 0) size_ = align;
    begin_ = static_cast<char*>(std::aligned_alloc(align, size_));
    if (!begin_)
      throw Error(ErrorCode::out_of_memory, "workspace: cannot allocate " + std::to_string(size_) + " bytes");
    if (align == kHugePage) advise_huge_pages(begin_, size_);
  }
  rewind();
}

Arena::~Arena() {
  if (!begin_) return;
  if (size_ <= kKeep && size_ > kept.size) {
    std::free(std::exchange(kept.data, begin_));
    kept.size = size_;
  } else {
    std::free(begin_);
  }
}

}  // namespace flash_attn::cpu
