#include "cpu/rotary.hpp"

#include <string>
#include <utility>

#include "core/check.hpp"
#include "cpu/isa.hpp"
#include "cpu/row_tasks.hpp"

namespace flash_attn::cpu {
namespace {

/// One-dimensional integers, read at their own width.
class Integers {
 public:
  Integers(const char* name, const Tensor& t) : t_(t) {
    if (!t.present()) return;
    check_rank(name, t, 1, "(batch) or (batch + 1)");
    if (t.dtype != DType::i32 && t.dtype != DType::i64) fail_dtype(name, DType::i32, t.dtype);
  }
  bool present() const { return t_.present(); }
  int64_t size() const { return t_.shape[0]; }
  int64_t operator[](int64_t i) const {
    const int64_t at = i * t_.stride[0];
    return t_.dtype == DType::i32 ? static_cast<const int32_t*>(t_.data)[at] : static_cast<const int64_t*>(t_.data)[at];
  }

 private:
  Tensor t_;
};

/// The call in one form: batch entries of rows (a packed tensor is one), of groups of heads.
class Rotation {
 public:
  explicit Rotation(const RotaryCall& call)
      : call_(call), cu_seqlens_("cu_seqlens", call.cu_seqlens), offsets_("seqlen_offsets", call.offsets) {
    const Tensor &x = call.x, &out = call.out;
    const int lead = cu_seqlens_.present() ? 1 : 2, inner = x.ndim - lead;
    if (inner != 2 && inner != 3)
      fail_rank("x", x, lead + 2, lead == 2 ? "(batch, seqlen, nheads, headdim)" : "(total, nheads, headdim)");
    check_rank("out", out, x.ndim, "of x");
    for (int d = 0; d < x.ndim; ++d) check_dim("out", out, d, "the size of x", x.shape[d]);
    check_row_dtype("x", x);
    check_dtype("out", out, x.dtype);
    for (const auto& [name, table] : {std::pair{"cos", &call.cos}, std::pair{"sin", &call.sin}}) {
      check_rank(name, *table, 2, "(seqlen_rotary, rotary_dim / 2)");
      check_dim(name, *table, 0, "the size of cos", call.cos.shape[0]);
      check_dim(name, *table, 1, "the size of cos", call.cos.shape[1]);
      check_row_dtype(name, *table);
    }
    const int64_t headdim = x.shape[x.ndim - 1];
    if (2 * call.cos.shape[1] > headdim) invalid("cos", "expected rotary_dim <= headdim = " + std::to_string(headdim));
    batch_ = lead == 2 ? x.shape[0] : 1;
    rows_ = x.shape[lead - 1];
    const int64_t sequences = cu_seqlens_.present() ? cu_seqlens_.size() - 1 : batch_;
    if (sequences < 0) invalid("cu_seqlens", "expected shape (batch + 1,), got (0,)");
    if (offsets_.present()) check_dim("seqlen_offsets", call.offsets, 0, "batch", sequences);
    groups_ = inner == 3 ? x.shape[lead] : 1;
    heads_ = x.shape[x.ndim - 2];
    for (const Tensor* t : {&x, &out})  // groups side by side are more heads
      one_group_ = one_group_ && (inner == 2 || t->stride[lead] == heads_ * t->stride[lead + 1]);
    if (one_group_) heads_ *= groups_, groups_ = 1;
    if (x.numel() == 0) batch_ = 0;
  }

  int64_t row_elements() const { return groups_ * heads_ * call_.x.shape[call_.x.ndim - 1]; }
  int64_t rows() const { return batch_ * rows_; }

  void run(int64_t row, MoveRow move) const {
    const Tensor &x = call_.x, &out = call_.out;
    const int last = x.ndim - 1, lead = cu_seqlens_.present() ? 1 : 2;
    const int64_t b = row / rows_, r = row % rows_;
    const auto at = [&](const Tensor& t, int64_t group) {
      const int64_t offset =
          (lead == 2 ? b * t.stride[0] : 0) + r * t.stride[lead - 1] + (groups_ > 1 ? group * t.stride[lead] : 0);
      return static_cast<char*>(t.data) + offset * static_cast<int64_t>(size_of(t.dtype));
    };
    const RowAngles angles = angles_of(b, r);
    for (int64_t g = 0; g < groups_; ++g)
      move({.dtype = x.dtype,
            .heads = heads_,
            .cols = x.shape[last],
            .from = at(x, g),
            .into = at(out, g),
            .from_head = x.stride[last - 1],
            .from_col = x.stride[last],
            .into_head = out.stride[last - 1],
            .into_col = out.stride[last],
            .angles = angles});
  }

 private:
  /// Tables are not trusted: a position is looked at before it is used.
  RowAngles angles_of(int64_t b, int64_t r) const {
    int64_t position = r, sequence = b;
    if (cu_seqlens_.present()) {
      sequence = sequence_of(r);
      if (sequence + 1 >= cu_seqlens_.size()) return {};
      const int64_t start = cu_seqlens_[sequence];
      if (start < 0 || start > r) return {};
      position -= start;
    }
    const int64_t offset = offsets_.present() ? offsets_[sequence] : call_.offset, length = call_.cos.shape[0];
    if (offset < -position || offset >= length - position) return {};
    position += offset;
    const Tensor &cos = call_.cos, &sin = call_.sin;
    const auto row_of = [&](const Tensor& t) {
      return static_cast<const char*>(t.data) + position * t.stride[0] * static_cast<int64_t>(size_of(t.dtype));
    };
    return {.cos = row_of(cos),
            .sin = row_of(sin),
            .cos_dtype = cos.dtype,
            .sin_dtype = sin.dtype,
            .cos_stride = cos.stride[1],
            .sin_stride = sin.stride[1],
            .pairs = cos.shape[1],
            .interleaved = call_.interleaved,
            .conjugate = call_.conjugate};
  }

  /// The first sequence that ends behind row r.
  int64_t sequence_of(int64_t r) const {
    int64_t low = 0, high = cu_seqlens_.size() - 1;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (cu_seqlens_[middle + 1] > r)
        high = middle;
      else
        low = middle + 1;
    }
    return low;
  }

  const RotaryCall& call_;
  Integers cu_seqlens_, offsets_;
  int64_t batch_ = 0, rows_ = 0, groups_ = 1, heads_ = 0;
  bool one_group_ = true;
};

}  // namespace

void rotate(const RotaryCall& call) {
  const Rotation rotation(call);
  if (rotation.rows() == 0) return;
  const MoveRow move = active_kernels().move_row;
  for_row_tasks(rotation.rows(), rotation.row_elements(), [&](int64_t first, int64_t n) {
    for (int64_t row = first; row < first + n; ++row) rotation.run(row, move);
  });
}

}  // namespace flash_attn::cpu
