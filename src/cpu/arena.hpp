// Arena: scratch memory that is kept between calls. Fresh pages cost more than a small attention call.
#pragma once

#include <cstddef>
#include <cstdint>

namespace flash_attn::cpu {

/// One call's scratch, carved front to back. At most one block per calling thread is kept when it ends.
class Arena {
 public:
  explicit Arena(std::size_t bytes);  // throws out_of_memory
  ~Arena();
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;

  /// n elements on a cache line of their own; the total was given to the constructor (sizes as padded()).
  template <class T>
  T* take(int64_t n) {
    char* p = next_;
    next_ += padded<T>(n);
    return reinterpret_cast<T*>(p);
  }
  /// 128: neighbouring lines are fetched in pairs, and two workers must not share one.
  template <class T>
  static constexpr std::size_t padded(int64_t n) {
    return (static_cast<std::size_t>(n) * sizeof(T) + 127) / 128 * 128;
  }

 private:
  char* begin_;
  char* next_;
  std::size_t size_;
};

}  // namespace flash_attn::cpu
