// The features of the score pipeline, each as a small case in float64. Forward and backward tests run all of them.
#pragma once

#include <functional>
#include <ostream>
#include <string>

#include "support/attention_case.hpp"

namespace flash_attn::test {

struct NamedCase {
  std::string name;
  std::function<AttentionCase()> make;

  friend std::ostream& operator<<(std::ostream& to, const NamedCase& c) { return to << c.name; }
};

/// What can be differentiated: all but the ways to read a KV cache.
inline std::vector<NamedCase> differentiable_cases() {
  const auto change = [](std::string name, void (*set)(AttentionCase&), const Dims& dims = {}) {
    return NamedCase{std::move(name), [=] {
                       AttentionCase c = AttentionCase::fixed(DType::f64, dims);
                       set(c);
                       return c;
                     }};
  };
  static const auto slopes = [](const Shape& shape) { return HostTensor::normal(DType::f32, shape, 98, 0.3); };
  static const auto drawn = [](const Shape& shape) { return HostTensor::normal(DType::f64, shape, 99); };
  return {
      change("plain", [](AttentionCase&) {}),
      change("scale", [](AttentionCase& c) { c.scores.softmax_scale = -1.25; }),
      change("mha_one_head_dim", [](AttentionCase&) {}, {.nheads = 2, .nheads_k = 2, .headdim = 1, .headdim_v = 1}),
      change("headdim_v", [](AttentionCase&) {}, {.headdim = 4, .headdim_v = 6}),
      change("softcap", [](AttentionCase& c) { c.scores.softcap = 0.8; }),
      change("alibi", [](AttentionCase& c) { c.alibi = slopes({4}); }),
      change("alibi_per_batch",
             [](AttentionCase& c) {
               c.alibi = slopes({2, 4});
             }),
      change("bias",
             [](AttentionCase& c) {
               c.bias = drawn({2, 4, 5, 7});
             }),
      change("bias_over_batch",
             [](AttentionCase& c) {
               c.bias = drawn({1, 4, 5, 7});
             }),
      change("bias_over_heads",
             [](AttentionCase& c) {
               c.bias = drawn({2, 1, 5, 7});
             }),
      change("bias_over_rows",
             [](AttentionCase& c) {
               c.bias = drawn({2, 4, 1, 7});
             }),
      change("bias_over_all",
             [](AttentionCase& c) {
               c.bias = drawn({1, 1, 1, 7});
             }),
      change("bias_hides_keys",
             [](AttentionCase& c) {
               c.bias = drawn({1, 1, 5, 7});
               for (int j = 0; j < 7; ++j) c.bias.put(-INFINITY, 0, 0, 2, j);
               c.bias.put(-INFINITY, 0, 0, 3, 0);
             }),
      change("causal", [](AttentionCase& c) { c.scores.causal = true; }),
      change("causal_more_queries", [](AttentionCase& c) { c.scores.causal = true; }, {.seqlen_q = 7, .seqlen_k = 4}),
      change("window", [](AttentionCase& c) { c.scores.window_left = 2, c.scores.window_right = 1; }),
      change("window_left_zero", [](AttentionCase& c) { c.scores.window_left = 0; }),
      change("window_more_queries", [](AttentionCase& c) { c.scores.window_left = 1, c.scores.window_right = 1; },
             {.seqlen_q = 9, .seqlen_k = 4}),
      change("chunk", [](AttentionCase& c) { c.scores.attention_chunk = 3; }),
      change("chunk_causal_more_queries",
             [](AttentionCase& c) { c.scores.attention_chunk = 2, c.scores.causal = true; },
             {.seqlen_q = 6, .seqlen_k = 5}),
      change("sink", [](AttentionCase& c) { c.sink = drawn({4}); }),
      change("sink_rows_without_keys", [](AttentionCase& c) { c.sink = drawn({4}), c.scores.causal = true; },
             {.seqlen_q = 7, .seqlen_k = 4}),
      change("dropout", [](AttentionCase& c) { c.dropout = {.p = 0.3, .seed = 42, .offset = 7}; }),
      change("seqused",
             [](AttentionCase& c) {
               c.seqused_q = HostTensor::ints({3, 5}), c.seqused_k = HostTensor::ints({6, 0});
               c.scores.causal = true;
             }),
      change("leftpad",
             [](AttentionCase& c) {
               c.leftpad_k = HostTensor::ints({2, 0}), c.seqused_k = HostTensor::ints({7, 5});
               c.scores.window_left = 2, c.bias = drawn({2, 4, 5, 7});
             }),
      change("everything",
             [](AttentionCase& c) {
               c.scores = {
                   .softmax_scale = 0.7, .causal = true, .window_left = 4, .attention_chunk = 5, .softcap = 1.5};
               c.alibi = slopes({2, 4}), c.bias = drawn({1, 4, 5, 7}), c.sink = drawn({4});
               c.dropout = {.p = 0.25, .seed = 3, .offset = 1};
             },
             {.headdim = 5, .headdim_v = 2}),
      {"strides",
       [] {
         AttentionCase c = AttentionCase::fixed(DType::f64, {}, 1, {.order = {2, 3, 0, 1}, .step = 2, .pad = 3});
         c.scores.causal = true;
         return c;
       }},
      {"varlen",
       [] {
         AttentionCase c = AttentionCase::packed(DType::f64, {3, 0, 4, 2}, {5, 2, 0, 1}, {}, 1, 2);
         c.scores.causal = true, c.sink = drawn({4}), c.alibi = slopes({4, 4});
         return c;
       }},
      {"varlen_everything",
       [] {
         AttentionCase c = AttentionCase::packed(DType::f64, {3, 6}, {7, 4}, {.headdim_v = 2}, 1, 1);
         c.scores = {.window_left = 3, .window_right = 1, .softcap = 2.0};
         c.bias = drawn({2, 1, 6, 7}), c.seqused_q = HostTensor::ints({2, 6}), c.seqused_k = HostTensor::ints({7, 3});
         c.dropout = {.p = 0.2, .seed = 11, .offset = 0};
         return c;
       }},
  };
}

/// The ways to read a KV cache: forward only.
inline std::vector<NamedCase> cache_cases() {
  return {
      {"cache_batch_idx",
       [] {
         AttentionCase c = AttentionCase::fixed(DType::f64, {.batch = 3});
         c.q = HostTensor::normal(DType::f64, {2, 5, 4, 3}, 5), c.out = c.q.like();
         c.lse = HostTensor(DType::f32, {2, 4, 5});
         c.cache_batch_idx = HostTensor::ints({2, 0});
         return c;
       }},
      {"paged",
       [] {
         AttentionCase c = AttentionCase::fixed(DType::f64, {.batch = 6, .seqlen_k = 3});  // six pages of three keys
         c.q = HostTensor::normal(DType::f64, {2, 5, 4, 3}, 5), c.out = c.q.like();
         c.lse = HostTensor(DType::f32, {2, 4, 5});
         c.block_table = HostTensor::ints({4, 1, 5, 0, 2, 2}, {2, 3});
         c.seqused_k = HostTensor::ints({8, 6}), c.leftpad_k = HostTensor::ints({1, 4});
         c.scores.causal = true;
         return c;
       }},
  };
}

}  // namespace flash_attn::test
