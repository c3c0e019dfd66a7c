// `clamped`: what at(b) says of well-formed tables, and rows inside the tensors whatever the tables hold.
#include "core/sequences.hpp"

#include <gtest/gtest.h>

#include <functional>
#include <random>
#include <utility>

#include "core/calls.hpp"

namespace flash_attn::test {
namespace {

void expect_same(const Sequence& a, const Sequence& b) {
  EXPECT_EQ(a.q_batch, b.q_batch);
  EXPECT_EQ(a.q_row, b.q_row);
  EXPECT_EQ(a.seqlen_q, b.seqlen_q);
  EXPECT_EQ(a.k_batch, b.k_batch);
  EXPECT_EQ(a.k_row, b.k_row);
  EXPECT_EQ(a.seqlen_k, b.seqlen_k);
  EXPECT_EQ(a.pages, b.pages);
}

struct Shape {
  const char* name;
  Forward (*make)(Store&);
};

Forward used(Store& store) {
  Forward call = fixed_call(store);
  call.sequences.seqused_q = store.ints({3, 5});
  call.sequences.seqused_k = store.ints({7, 2});
  call.sequences.leftpad_k = store.ints({1, 2});
  call.sequences.cache_batch_idx = store.ints({1, 0});
  return call;
}
Forward one_number(Store& store) {
  Forward call = fixed_call(store);
  call.sequences.used_k = 4;
  return call;
}
Forward joined(Store& store) {
  Forward call = fixed_call(store);
  call.sequences.seqused_k = store.ints({2, 3});
  call.new_keys = {.k = store.floats({4, 2, 8}), .v = store.floats({4, 2, 6}), .cu_seqlens = store.ints({0, 1, 4})};
  return call;
}

const Shape kShapes[] = {{"fixed", fixed_call}, {"packed", packed_call},    {"paged", paged_call},
                         {"used", used},        {"one number", one_number}, {"joined", joined}};

TEST(Clamped, AgreesWithAtWhereTablesAreWellFormed) {
  for (const Shape& shape : kShapes) {
    Store store;
    const Problem p = make_problem(shape.make(store));
    for (int64_t b = 0; b < p.batch; ++b) {
      SCOPED_TRACE(shape.name);
      expect_same(clamped(p, b), p.sequences.at(b));
    }
  }
}

TEST(Clamped, StaysInsideWhateverTheTablesHold) {
  std::mt19937 random(1);
  const int32_t wild[] = {INT32_MIN, -1, 0, 1, 3, 7, 100, INT32_MAX};
  for (const Shape& shape : kShapes)
    for (int repeat = 0; repeat < 200; ++repeat) {
      Store store;
      Forward call = shape.make(store);
      const Problem p = make_problem(call);
      Sequences& s = call.sequences;
      for (Tensor* t : {&s.cu_seqlens_q, &s.cu_seqlens_k, &s.seqused_q, &s.seqused_k, &s.leftpad_k, &s.cache_batch_idx,
                        &call.new_keys.cu_seqlens})
        for (int64_t i = 0; t->present() && i < t->numel(); ++i) set(*t, i, wild[random() % std::size(wild)]);
      for (int64_t b = 0; b < p.batch; ++b) {
        const Sequence x = clamped(p, b);
        SCOPED_TRACE(shape.name);
        EXPECT_TRUE(x.q_batch >= 0 && x.q_batch < p.batch_q && x.q_row >= 0 && x.seqlen_q >= 0);
        EXPECT_LE(x.q_row + x.seqlen_q, p.rows_q);
        EXPECT_TRUE(x.k_row >= 0 && x.seqlen_k >= 0);
        EXPECT_LE(x.k_row + x.seqlen_k, x.pages ? p.sequences.seqlen_k : p.rows_k);
        EXPECT_TRUE(x.pages || (x.k_batch >= 0 && x.k_batch < p.batch_k));
      }
    }
}

TEST(UsedKeys, OneNumberIsATableOfEqualEntries) {
  Store store;
  Forward call = one_number(store), table = fixed_call(store);
  table.sequences.seqused_k = store.ints({4, 4});
  const Problem p = make_problem(call), q = make_problem(table);
  for (int64_t b = 0; b < 2; ++b) expect_same(p.sequences.at(b), q.sequences.at(b));
  EXPECT_EQ(p.max_seqlen_k, q.max_seqlen_k);
  EXPECT_EQ(p.features, q.features);
}

/// Five queries each, under a causal mask. That the longest sequence has keys enough for them says nothing of others.
TEST(BlindRows, AreToldWhereverLengthsVary) {
  Store store;
  const auto fixed = [&] {
    Forward call = fixed_call(store);
    call.sequences.used_k = 5;
    call.scores.causal = true;
    return call;
  };
  const auto packed_keys_join = [&](Forward& call) {
    call.sequences.used_k = 4;
    call.new_keys = {.k = store.floats({3, 2, 8}), .v = store.floats({3, 2, 6}), .cu_seqlens = store.ints({0, 3, 3})};
  };
  const std::pair<const char*, std::function<void(Forward&)>> rows[] = {
      {"seqused_q",
       [&](Forward& c) {
         c.sequences.seqused_q = store.ints({1, 1});
       }},
      {"seqused_k",
       [&](Forward& c) {
         c.sequences.used_k = -1, c.sequences.seqused_k = store.ints({5, 1});
       }},
      {"leftpad_k",
       [&](Forward& c) {
         c.sequences.leftpad_k = store.ints({0, 4});
       }},
      {"packed new keys", packed_keys_join},
  };
  EXPECT_FALSE(make_problem(fixed()).features & bit(Feature::blind_rows));
  for (const auto& [name, vary] : rows) {
    Forward call = fixed();
    vary(call);
    EXPECT_TRUE(make_problem(call).features & bit(Feature::blind_rows)) << name;
  }
}

}  // namespace
}  // namespace flash_attn::test
