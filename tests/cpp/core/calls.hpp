// Well-formed calls over memory of their own, for tests to run or to spoil.
#pragma once

#include <cstring>
#include <deque>
#include <initializer_list>
#include <vector>

#include "flash_attn/flash_attn.hpp"

namespace flash_attn::test {

/// Owns the memory of a call's tensors and can tell whether anything was written since `remember`.
class Store {
 public:
  Tensor floats(std::initializer_list<int64_t> shape, DType dtype = DType::f32) {
    Tensor t = view(nullptr, dtype, shape);
    std::vector<char>& bytes = memory_.emplace_back(t.numel() * size_of(dtype) + 64, 0);
    for (std::size_t i = 0; i + 4 <= bytes.size() && dtype == DType::f32; i += 4) {
      const float x = 0.01f * static_cast<float>(i % 37);
      std::memcpy(&bytes[i], &x, 4);
    }
    t.data = bytes.data();
    return t;
  }
  Tensor ints(std::initializer_list<int32_t> values) {
    std::vector<char>& bytes = memory_.emplace_back(values.size() * 4 + 64, 0);
    std::memcpy(bytes.data(), values.begin(), values.size() * 4);
    return view(bytes.data(), DType::i32, {static_cast<int64_t>(values.size())});
  }
  void remember() { before_ = memory_; }
  bool untouched() const { return memory_ == before_; }

 private:
  std::deque<std::vector<char>> memory_, before_;
};

/// Writes entry i of an integer tensor.
inline void set(Tensor& t, int64_t i, int32_t value) { static_cast<int32_t*>(t.data)[i] = value; }

/// batch 2, 5 queries, 7 keys, 4 heads over 2, headdim 8, headdim_v 6.
inline Forward fixed_call(Store& store) {
  return {.q = store.floats({2, 5, 4, 8}),
          .k = store.floats({2, 7, 2, 8}),
          .v = store.floats({2, 7, 2, 6}),
          .out = store.floats({2, 5, 4, 6}),
          .lse = store.floats({2, 4, 5})};
}

/// Two sequences, of 3 and 2 queries and 4 and 3 keys; one row of q and of k belongs to nobody.
inline Forward packed_call(Store& store) {
  return {.q = store.floats({6, 4, 8}),
          .k = store.floats({8, 2, 8}),
          .v = store.floats({8, 2, 6}),
          .out = store.floats({6, 4, 6}),
          .lse = store.floats({4, 6}),
          .sequences = {.cu_seqlens_q = store.ints({0, 3, 5}), .cu_seqlens_k = store.ints({0, 4, 7})}};
}

/// Two sequences of 5 queries whose 6 and 3 keys lie in 5 pages of 4.
inline Forward paged_call(Store& store) {
  Forward call = fixed_call(store);
  call.k = store.floats({5, 4, 2, 8});
  call.v = store.floats({5, 4, 2, 6});
  call.sequences.seqused_k = store.ints({6, 3});
  call.sequences.block_table = store.ints({3, 1, 0, 4});
  call.sequences.block_table.ndim = 2;
  call.sequences.block_table.shape[0] = call.sequences.block_table.shape[1] = 2;
  call.sequences.block_table.stride[0] = 2;
  call.sequences.block_table.stride[1] = 1;
  return call;
}

/// A KV cache of 3 batch entries of 7 keys, of which sequences 0 and 1 use entries 2 and 0.
inline Forward cached_call(Store& store) {
  Forward call = fixed_call(store);
  call.k = store.floats({3, 7, 2, 8});
  call.v = store.floats({3, 7, 2, 6});
  call.sequences.seqused_k = store.ints({7, 4});
  call.sequences.leftpad_k = store.ints({1, 4});
  call.sequences.cache_batch_idx = store.ints({2, 0});
  return call;
}

/// Two new keys of each of two sequences join pages of 4 that hold 5 and 1; 4 of 8 columns are rotated.
inline Forward joining_call(Store& store) {
  Forward call = paged_call(store);
  call.sequences.seqused_k = store.ints({5, 1});
  call.new_keys = {.k = store.floats({2, 2, 2, 8}), .v = store.floats({2, 2, 2, 6})};
  call.rotary = {.cos = store.floats({12, 2}), .sin = store.floats({12, 2})};
  return call;
}

inline Backward backward_call(Store& store) {
  const Forward f = fixed_call(store);
  Backward call{.dout = store.floats({2, 5, 4, 6}),
                .q = f.q,
                .k = f.k,
                .v = f.v,
                .out = f.out,
                .lse = f.lse,
                .dq = store.floats({2, 5, 4, 8}),
                .dk = store.floats({2, 7, 2, 8}),
                .dv = store.floats({2, 7, 2, 6})};
  return call;
}

}  // namespace flash_attn::test
