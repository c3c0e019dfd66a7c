#include "cpu/key_split.hpp"

#include <algorithm>
#include <cmath>

#include "cpu/driver.hpp"

namespace flash_attn::cpu {

KeySplit::KeySplit(Arena& a, const Backward& f, float* rows) : rows_(rows) {
  const int64_t keys = f.plan.keys_per_split;
  keys_ = a.take<char>(f.plan.key_bytes), special_ = a.take<uint8_t>(keys);
  dk_ = a.take<float>(keys * round_up(f.p.headdim, f.k.width));
  dv_ = a.take<float>(keys * round_up(f.p.headdim_v, f.k.width));
}

int64_t KeySplit::row_floats(const Backward& f) {
  return f.kernel.sum_rows ? f.plan.keys_per_split * round_up(std::max(f.p.headdim, f.p.headdim_v), f.k.width) : 0;
}

void KeySplit::take(const Backward& f, const Sequence& sequence, int64_t hk, int64_t begin, int64_t end) {
  sequence_ = sequence, hk_ = hk, begin_ = begin, end_ = end;
  kernel_ = nullptr;
  use(f, f.kernel);
}

bool KeySplit::pack(const Backward& f) {
  const Problem& p = f.p;
  const int64_t panel = kernel_->panel, keys = round_up(end_ - begin_, panel);
  bool special = false;
  for (int64_t j = 0; j < keys; j += panel) {
    const int64_t n = std::min(panel, end_ - begin_ - j);
    const char *k[64] = {}, *v[64] = {};
    key_rows(p, p.k, sequence_, hk_, begin_ + j, n, k);
    key_rows(p, p.v, sequence_, hk_, begin_ + j, n, v);
    const bool x = kernel_->pack_keys({k, panel, p.headdim, p.k.stride_col, p.dtype},
                                      {v, panel, p.headdim_v, p.v.stride_col, p.dtype}, keys_, keys, j);
    special_[j / panel] = x;
    special |= x;
  }
  return special;
}

/// Packs the keys for a kernel, or for the one that takes any. Sums made so far are kept.
void KeySplit::use(const Backward& f, const BackwardKernel& kernel) {
  const int64_t d = round_up(f.p.headdim, f.k.width), dv = round_up(f.p.headdim_v, f.k.width);
  const BackwardKernel* const before = kernel_;
  const int64_t keys = before ? round_up(end_ - begin_, before->panel) : 0;
  const auto sums_so_far = [&](float* sums, int64_t cols, int64_t ld) {
    if (before && before->sum_rows) {
      before->sum_rows(sums, keys, cols, rows_);
      std::copy(rows_, rows_ + keys * ld, sums);
    }
    const int64_t all = round_up(end_ - begin_, std::max(f.kernel.panel, f.k.backward_any->panel));
    std::fill(sums + keys * ld, sums + all * ld, 0.0f);
  };
  sums_so_far(dk_, f.p.headdim, d);
  sums_so_far(dv_, f.p.headdim_v, dv);
  kernel_ = &kernel;
  if (pack(f) && kernel.plain_only) use(f, *f.k.backward_any);
}

const float* KeySplit::attend(const Backward& f, QueryRows& queries) {
  if (queries.pack(f, *kernel_) && kernel_->plain_only) {
    use(f, *f.k.backward_any);
    queries.pack(f, *kernel_);
  }
  BackwardTask task = queries.task(f, begin_);
  task.keys_packed = keys_;
  task.keys = round_up(end_ - begin_, kernel_->panel);
  task.key_special = special_;
  task.dk = dk_;
  task.dv = dv_;
  kernel_->backward(task);
  return task.dq;
}

void KeySplit::store(const Backward& f) {
  const Problem& p = f.p;
  const int64_t keys = round_up(end_ - begin_, kernel_->panel);
  const auto store_sums = [&](const Operand& to, const float* sums, int64_t cols, float factor) {
    if (kernel_->sum_rows) kernel_->sum_rows(sums, keys, cols, rows_);
    store_rows(f.k, end_ - begin_, cols, to.stride_col, p.dtype, factor, kernel_->sum_rows ? rows_ : sums,
               round_up(cols, f.k.width),
               [&](int64_t j) { return to.at(sequence_.k_batch, sequence_.k_row + begin_ + j, hk_); });
  };
  store_sums(p.dk, dk_, p.headdim, static_cast<float>(std::abs(p.scores.scale)));
  store_sums(p.dv, dv_, p.headdim_v, 1.0f);
}

}  // namespace flash_attn::cpu
