// Overlap of strided tensors.
//
// A tensor is the set of bytes base + sum_d i_d * stride_d, 0 <= i_d < shape_d, with the bytes of one element as a
// last dimension of stride 1. Two tensors share a byte iff the difference of their bases is a sum of
// (stride, bounded integer) terms. Terms of equal stride merge, so that slices of one tensor give few of them, and
// taken from the largest stride down each leaves a window of one or two candidates: what the smaller terms can still
// make up. dq, dk, dv as slices of one (batch, seqlen, 3, nheads, headdim) tensor are decided in a dozen steps.
#include "core/overlap.hpp"

#include <algorithm>
#include <utility>

namespace flash_attn {
namespace {

/// n * stride for any n in [lo, hi]; stride > 0, in bytes.
struct Term {
  int64_t stride, lo, hi;
};

/// The terms of up to two tensors (one byte dimension each), by falling stride.
struct Terms {
  std::array<Term, 2 * (Tensor::kMaxDims + 1)> term;
  std::array<int64_t, 2 * (Tensor::kMaxDims + 1) + 1> least{}, most{};  // of the sum of terms [i, count)
  int count = 0;

  void add(int64_t stride, int64_t lo, int64_t hi) {
    if (stride == 0 || lo == hi) return;  // contributes nothing
    if (stride < 0) stride = -stride, std::swap(lo, hi), lo = -lo, hi = -hi;
    int i = 0;
    while (i < count && term[i].stride > stride) ++i;
    if (i < count && term[i].stride == stride) {
      term[i].lo += lo, term[i].hi += hi;
      return;
    }
    for (int j = count++; j > i; --j) term[j] = term[j - 1];
    term[i] = {stride, lo, hi};
  }

  void sum_up() {
    for (int i = count - 1; i >= 0; --i) {
      least[i] = least[i + 1] + term[i].lo * term[i].stride;
      most[i] = most[i + 1] + term[i].hi * term[i].stride;
    }
  }

  /// Whether terms [i, count) can sum to `target`; true as well once `budget` steps are spent.
  bool reaches(int i, int64_t target, int& budget) const {
    if (target < least[i] || target > most[i]) return false;
    if (i == count) return true;
    const Term& t = term[i];
    const int64_t first = std::max(t.lo, ceil_div(target - most[i + 1], t.stride));
    const int64_t last = std::min(t.hi, floor_div(target - least[i + 1], t.stride));
    for (int64_t n = first; n <= last; ++n)
      if (--budget < 0 || reaches(i + 1, target - n * t.stride, budget)) return true;
    return false;
  }

  static int64_t floor_div(int64_t a, int64_t b) { return a / b - (a % b < 0); }
  static int64_t ceil_div(int64_t a, int64_t b) { return -floor_div(-a, b); }
};

constexpr int kSearchBudget = 1000;

/// The longest reach of a tensor to either side of its data, in bytes: sums of a few of them stay inside int64.
constexpr int64_t kMaxReach = int64_t{1} << 60;

/// False if the bytes of `t`, which is not empty, do not fit the address space.
bool extent_of(const Tensor& t, Extent& e) {
  const int64_t size = static_cast<int64_t>(size_of(t.dtype));
  int64_t below = 0, above = size;
  for (int d = 0; d < t.ndim; ++d) {
    int64_t span = 0;
    if (t.shape[d] == 1) continue;
    if (__builtin_mul_overflow(t.shape[d] - 1, t.stride[d], &span) || __builtin_mul_overflow(span, size, &span))
      return false;
    if (span < -kMaxReach || span > kMaxReach) return false;
    (span < 0 ? below : above) += span;
  }
  if (below < -kMaxReach || above > kMaxReach) return false;
  const auto base = reinterpret_cast<uintptr_t>(t.data);
  e = {base + static_cast<uintptr_t>(below), base + static_cast<uintptr_t>(above)};
  return e.lo <= base && base < e.hi;
}

}  // namespace

bool may_overlap_itself(const Tensor& t) {
  std::array<std::pair<int64_t, int64_t>, Tensor::kMaxDims> dims;  // (|stride|, shape), by rising stride
  int count = 0;
  for (int d = 0; d < t.ndim; ++d) {
    if (t.shape[d] == 0) return false;
    if (t.shape[d] == 1) continue;
    const std::pair dim{t.stride[d] < 0 ? -t.stride[d] : t.stride[d], t.shape[d]};
    int i = count++;
    for (; i > 0 && dims[i - 1] > dim; --i) dims[i] = dims[i - 1];
    dims[i] = dim;
  }
  int64_t span = 0;  // of the dimensions so far; every larger stride must step over it
  for (int i = 0; i < count; ++i) {
    if (dims[i].first <= span) return true;
    span += dims[i].first * (dims[i].second - 1);
  }
  return false;
}

bool may_overlap(const Tensor& a, const Extent& ea, const Tensor& b, const Extent& eb) {
  if (ea.lo >= eb.hi || eb.lo >= ea.hi) return false;
  Terms terms;
  const int64_t size_a = static_cast<int64_t>(size_of(a.dtype)), size_b = static_cast<int64_t>(size_of(b.dtype));
  for (int d = 0; d < a.ndim; ++d)
    if (a.shape[d] > 1) terms.add(a.stride[d] * size_a, 0, a.shape[d] - 1);
  for (int d = 0; d < b.ndim; ++d)
    if (b.shape[d] > 1) terms.add(b.stride[d] * size_b, 1 - b.shape[d], 0);
  terms.add(1, 0, size_a - 1);
  terms.add(1, 1 - size_b, 0);
  terms.sum_up();
  int budget = kSearchBudget;
  return terms.reaches(
      0, static_cast<int64_t>(reinterpret_cast<uintptr_t>(b.data) - reinterpret_cast<uintptr_t>(a.data)), budget);
}

void Memory::add(const char* argument, const Tensor& t, bool output) {
  if (t.ndim > Tensor::kMaxDims)
    invalid(argument, "expected at most " + std::to_string(Tensor::kMaxDims) + " dimensions, got more");
  if (size_of(t.dtype) == 0) fail(ErrorCode::type_mismatch, argument, "unknown dtype");
  bool empty = false, huge = false;
  for (int64_t d = 0, elements = 1; d < t.ndim; ++d) {
    if (t.shape[d] < 0) invalid(argument, "expected dimensions >= 0, got " + shape_text(t));
    if (t.shape[d] == 0)
      empty = true;
    else
      huge |= __builtin_mul_overflow(elements, t.shape[d], &elements) || elements > kMaxReach;
  }
  if (t.device != device_)
    invalid(argument, "expected a tensor on " + device_text(device_) + " as q is, got one on " + device_text(t.device));
  Entry e{argument, &t, {}, output};
  if (!empty) {
    if (t.data == nullptr) invalid(argument, "no data (a null pointer) for shape " + shape_text(t));
    if (device_.has_addresses() && reinterpret_cast<uintptr_t>(t.data) % size_of(t.dtype) != 0)
      invalid(argument, std::string("expected data aligned to its dtype, ") + name_of(t.dtype));
    huge |= !extent_of(t, e.extent);
  }
  if (huge) invalid(argument, "shape " + shape_text(t) + " with its strides exceeds the address space");
  entries_[count_++] = e;
}

void Memory::check_outputs() const {
  for (int i = 0; i < count_; ++i) {
    const Entry& a = entries_[i];
    if (!a.output || a.extent.lo == a.extent.hi) continue;
    if (may_overlap_itself(*a.tensor))
      invalid(a.argument, "an output needs every element in a place of its own; shape " + shape_text(*a.tensor) +
                              " with its strides (an expanded tensor?) overlaps itself");
    if (!device_.has_addresses()) continue;  // handles don't tell where tensors lie
    for (int j = 0; j < count_; ++j) {
      const Entry& b = entries_[j];
      if (j == i || (b.output && j < i) || b.extent.lo == b.extent.hi) continue;
      if (may_overlap(*a.tensor, a.extent, *b.tensor, b.extent))
        invalid(a.argument,
                std::string("an output must not overlap other memory of the call, but may overlap ") + b.argument);
    }
  }
}

}  // namespace flash_attn
