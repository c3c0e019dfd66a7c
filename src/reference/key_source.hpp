// KeySource: where key t of a sequence lies in memory. The one place of the oracle that knows of pages.
#pragma once

#include "core/problem.hpp"

namespace flash_attn::reference {

/// Position of a key (and of its value, and of their gradients) in operands laid out (batch, row, head, col).
struct KeyPlace {
  int64_t batch, row;
};

class KeySource {
 public:
  KeySource(const Sequence& sequence, int64_t page_size) : sequence_(sequence), page_size_(page_size) {}

  /// Key j of [0, seqlen_k): a row of the strided run, or of the page that holds it.
  KeyPlace place(int64_t j) const {
    const int64_t t = sequence_.k_row + j;
    if (!sequence_.pages) return {sequence_.k_batch, t};
    return {sequence_.pages[t / page_size_], t % page_size_};
  }

 private:
  Sequence sequence_;
  int64_t page_size_;
};

}  // namespace flash_attn::reference
