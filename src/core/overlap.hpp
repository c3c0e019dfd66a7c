// Overlap: may two strided tensors share a byte? may one tensor write the same byte twice?
#pragma once

#include <array>
#include <cstdint>

#include "core/check.hpp"

namespace flash_attn {

/// The bytes [lo, hi) that enclose a tensor; empty (lo == hi) if it has no elements.
struct Extent {
  uintptr_t lo = 0, hi = 0;
};

/// Whether two elements of `t` may share a byte. Exact for tensors whose strides nest (every slice, permutation or
/// expansion of a contiguous tensor does); anything else counts as overlapping.
bool may_overlap_itself(const Tensor& t);

/// Whether `a` and `b` may share a byte: false is always right; true is exact unless the strides of the two are so
/// unlike each other that a bounded search does not decide.
bool may_overlap(const Tensor& a, const Extent& ea, const Tensor& b, const Extent& eb);

/// All tensors of one call. Each is checked for its own sanity when it is added, and `check_outputs` then sees
/// that no output shares memory with itself, another output or an input.
class Memory {
 public:
  explicit Memory(Device device) : device_(device) {}

  /// Checks rank <= 5, dimensions >= 0, device, a known dtype, data present and aligned, size within the address space.
  void add_input(const char* argument, const Tensor& t) { add(argument, t, false); }
  void add_output(const char* argument, const Tensor& t) { add(argument, t, true); }
  void check_outputs() const;

 private:
  struct Entry {
    const char* argument;
    const Tensor* tensor;
    Extent extent;
    bool output;
  };
  void add(const char* argument, const Tensor& t, bool output);

  Device device_;
  int count_ = 0;
  std::array<Entry, 24> entries_;
};

}  // namespace flash_attn
