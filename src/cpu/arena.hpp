// Arena: scratch memory that is kept between calls. Fresh pages cost more than a small attention call.
#pragma once

#include <cstddef>
#include <cstdint>

namespace flash_attn::cpu {

/// One call's scratch, carved front to back. At most one block per calling thread is kept when it ends.
class Arena {
 public:
  explicit Arena(int64_t bytes);  // throws out_of_memory
  /// Has no memory, and only adds up what is taken: what it hands out must not be followed. A class that takes its
  /// memory in its constructor says in this way how much it needs.
  static Arena counter() { return Arena(); }
  ~Arena();
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;

  /// n elements on a cache line of their own. 128: neighbouring lines are fetched in pairs, and two workers must not
  /// share one.
  template <class T>
  T* take(int64_t n) {
    const std::uintptr_t at = next_;
    next_ += (static_cast<std::uintptr_t>(n) * sizeof(T) + 127) / 128 * 128;
    return reinterpret_cast<T*>(at);
  }
  /// Bytes taken so far.
  int64_t taken() const { return static_cast<int64_t>(next_ - reinterpret_cast<std::uintptr_t>(begin_)); }
  /// Starts again at the front: what was taken is free.
  void rewind() { next_ = reinterpret_cast<std::uintptr_t>(begin_); }

 private:
  Arena() = default;

  char* begin_ = nullptr;
  std::uintptr_t next_ = 0;
  std::size_t size_ = 0;
};

/// What make(arena) takes from an arena.
template <class Make>
int64_t bytes_taken(const Make& make) {
  Arena arena = Arena::counter();
  make(arena);
  return arena.taken();
}

}  // namespace flash_attn::cpu
