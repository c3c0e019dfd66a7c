// Features: what a Problem uses, as one set of bits; and what a backend serves, as data.
//
// Choice, refusals, `explain`, `flash-attn info` and the table in the documents are made from these sets. So a backend
// that lacks a feature need not say so in code, and one that forgets a feature refuses it.
#pragma once

#include <array>
#include <cstdint>
#include <initializer_list>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "flash_attn/flash_attn.hpp"

namespace flash_attn {

struct Problem;
enum class Pass;

enum class Feature : uint8_t {
  packed_q,         // cu_seqlens_q
  packed_k,         // cu_seqlens_k
  pages,            // block_table
  seqused_q,        // used lengths of queries
  seqused_k,        // used lengths of keys: a tensor, or the integer used_k
  leftpad_k,        // keys before the first
  cache_batch_idx,  // entries of k and v in another order
  new_keys,         // keys that join a cache
  rotary,           // queries and new keys are rotated
  grouped,          // more heads of queries than of keys
  own_headdim_v,    // headdim_v differs from headdim
  causal,           // causal, and no window on the left
  window,           // any other window
  chunk,            // attention_chunk
  softcap,
  alibi,
  bias,
  sink,
  dropout,
  lse,              // the forward returns lse
  dlse,             // lse has a gradient
  dbias,            // the gradient of bias is wanted
  dsink,            // the gradient of sink is wanted
  deterministic,    // asked for
  strided_columns,  // elements of a row of q, k, v, out (dout, dq, dk, dv) do not lie side by side
  blind_rows,       // seqlen_q > seqlen_k under a mask, so that rows may see nothing; or lengths that vary, under one
  count,
};

inline constexpr std::size_t kFeatures = static_cast<std::size_t>(Feature::count);

/// The names of `Feature`, in its order: "packed_q", ...
extern const std::array<std::string_view, kFeatures> kFeatureNames;

using Features = uint64_t;  // bit i: Feature i

constexpr Features bit(Feature f) { return Features{1} << static_cast<int>(f); }
constexpr Features features(std::initializer_list<Feature> list) {
  Features set = 0;
  for (const Feature f : list) set |= bit(f);
  return set;
}
inline constexpr Features kAllFeatures = bit(Feature::count) - 1;
/// What only one pass can use: a cache has no gradient.
inline constexpr Features kForwardOnly =
    features({Feature::pages, Feature::cache_batch_idx, Feature::new_keys, Feature::rotary, Feature::lse});
inline constexpr Features kBackwardOnly = features({Feature::dlse, Feature::dbias, Feature::dsink});

/// What a checked Problem uses. No memory is read.
Features features_of(const Problem& problem);

/// What a backend serves in one pass.
struct Serves {
  uint32_t dtypes = 0;  // bit i: DType i
  Features features = 0;
  int64_t max_headdim = 0;  // of q and v; 0: any
  int64_t headdim_multiple = 1;
  std::vector<std::pair<Feature, std::string>> words{};  // of a refusal, instead of "softcap: not served"
};

constexpr uint32_t bit(DType t) { return uint32_t{1} << static_cast<int>(t); }

/// Every dtype and every feature.
extern const Serves kServesAll;

/// "float32, bfloat16 and float16; headdim multiples of 8 up to 256; all but chunk, bias"; "nothing" of nullptr.
std::string serves_text(const Serves* serves);

/// The first thing that `problem` uses and `serves` lacks, in words that name the argument; empty if there is none.
std::string refusal(const Serves& serves, const Problem& problem);

}  // namespace flash_attn
