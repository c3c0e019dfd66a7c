// A call to ask about: the options of `explain`, and the call made of them.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "flash_attn/flash_attn.hpp"

namespace flash_attn::cli {

/// 0, -1 or empty: not given. A list with one value for each sequence may have one value for all of them.
struct Question {
  // Shapes
  int64_t batch = 1, nheads = 16, nheads_k = 0, seqlen_q = 0, seqlen_k = 4096, headdim = 128, headdim_v = 0;
  std::string dtype = "bf16";

  // Sequences
  std::vector<int64_t> lengths_q, lengths_k, seqused_q, seqused_k, leftpad_k;

  // KV cache
  std::vector<int64_t> cache_batch_idx, lengths_new;
  int64_t page_size = 0, new_keys = 0, rotary_dim = 0;
  bool rotary_interleaved = false;

  // Scores
  bool causal = false, alibi = false, sink = false;
  std::vector<int64_t> window{-1, -1};
  int64_t chunk = 0;
  double softcap = 0.0, dropout = 0.0, scale = 0.0;
  std::string bias;

  bool backward = false;
  std::string backend;
};

/// What the library answers. Throws Error where the options contradict one another, or the library refuses the call.
Explanation ask(const Question& question);

}  // namespace flash_attn::cli
