#include "question.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <numeric>

#include "dtype.hpp"
#include "reservation.hpp"

namespace flash_attn::cli {
namespace {

using Lengths = std::vector<int64_t>;

[[noreturn]] void refuse(const std::string& message) { throw Error(ErrorCode::invalid_argument, message); }

int64_t largest(const Lengths& lengths) { return *std::max_element(lengths.begin(), lengths.end()); }

int32_t narrowed(int64_t n, const char* option) {
  if (n > INT32_MAX) refuse(fmt::format("{}: {} is more than an int32 holds", option, n));
  return static_cast<int32_t>(n);
}

/// The call's parts, in the order in which each needs those before it.
class Asked {
 public:
  explicit Asked(const Question& question) : f(question) {
    find_sizes();
    fill_sequences();
    fill_new_keys();
    fill_scores();
  }

  Explanation forward() {
    return explain(Forward{.q = like_q(headdim),
                           .k = like_k(headdim),
                           .v = like_k(headdim_v),
                           .out = like_q(headdim_v),
                           .lse = lse(),
                           .sequences = sequences,
                           .scores = scores,
                           .dropout = {.p = f.dropout},
                           .run = {.backend = f.backend},
                           .new_keys = new_keys,
                           .rotary = rotary});
  }

  Explanation backward() {
    if (new_keys.k.present()) refuse("--backward: not together with --new-keys or --lengths-new");
    Tensor dbias, dsink;
    if (scores.bias.present()) dbias = bias(DType::f32);
    if (scores.sink.present()) dsink = memory.tensor(DType::f32, {nheads});
    return explain(Backward{.dout = like_q(headdim_v),
                            .q = like_q(headdim),
                            .k = like_k(headdim),
                            .v = like_k(headdim_v),
                            .out = like_q(headdim_v),
                            .lse = lse(),
                            .dq = like_q(headdim),
                            .dk = like_k(headdim),
                            .dv = like_k(headdim_v),
                            .dbias = dbias,
                            .dsink = dsink,
                            .sequences = sequences,
                            .scores = scores,
                            .dropout = {.p = f.dropout},
                            .run = {.backend = f.backend}});
  }

 private:
  void find_sizes() {
    nheads_k = f.nheads_k > 0 ? f.nheads_k : nheads;
    headdim_v = f.headdim_v > 0 ? f.headdim_v : headdim;
    if (f.window.size() != 2) refuse(fmt::format("--window: expected LEFT,RIGHT, got {} values", f.window.size()));
    bool counted = false;  // the first list says how many sequences there are
    for (const auto& [list, option] :
         {std::pair(&f.lengths_q, "--lengths-q"), std::pair(&f.lengths_k, "--lengths-k"),
          std::pair(&f.lengths_new, "--lengths-new"), std::pair(&f.cache_batch_idx, "--cache-batch-idx")}) {
      if (list->empty()) continue;
      const auto count = static_cast<int64_t>(list->size());
      if (counted && count != batch)
        refuse(fmt::format("{}: expected {} values, one for each sequence, got {}", option, batch, count));
      batch = count;
      counted = true;
    }
    if (!f.lengths_k.empty() && f.page_size > 0)
      refuse("--lengths-k: not together with --page-size; --seqused-k gives the keys of each sequence");
    if (!f.lengths_k.empty() && !f.cache_batch_idx.empty())
      refuse("--lengths-k: not together with --cache-batch-idx; --seqused-k gives the keys of each sequence");
    if (!f.lengths_new.empty() && f.new_keys > 0) refuse("--new-keys: not together with --lengths-new");
    // A packed call is packed on both sides, unless its keys are a cache.
    lengths_q = f.lengths_q;
    lengths_k = f.lengths_k;
    if (lengths_q.empty()) lengths_q = lengths_k;
    if (!cache() && lengths_k.empty()) lengths_k = lengths_q;
    seqlen_new = f.lengths_new.empty() ? f.new_keys : largest(f.lengths_new);
    seqlen_k = lengths_k.empty() ? f.seqlen_k : largest(lengths_k);
    seqlen_q = !lengths_q.empty() ? largest(lengths_q)
               : f.seqlen_q > 0   ? f.seqlen_q
               : seqlen_new > 0   ? seqlen_new
                                  : seqlen_k;
  }

  /// Keys lie in a cache with room for each sequence, not packed.
  bool cache() const { return f.page_size > 0 || !f.cache_batch_idx.empty() || seqlen_new_given(); }
  bool seqlen_new_given() const { return f.new_keys > 0 || !f.lengths_new.empty(); }

  void fill_sequences() {
    if (!lengths_q.empty()) sequences.cu_seqlens_q = running_sum(lengths_q, "--lengths-q");
    if (!lengths_k.empty()) sequences.cu_seqlens_k = running_sum(lengths_k, "--lengths-k");
    if (!f.seqused_q.empty()) sequences.seqused_q = for_each_sequence(f.seqused_q, "--seqused-q");
    if (!f.leftpad_k.empty()) sequences.leftpad_k = for_each_sequence(f.leftpad_k, "--leftpad-k");
    if (!f.cache_batch_idx.empty()) sequences.cache_batch_idx = for_each_sequence(f.cache_batch_idx, "");
    if (f.page_size > 0) {
      pages = (seqlen_k + f.page_size - 1) / f.page_size;
      std::vector<int32_t> table(static_cast<std::size_t>(narrowed(batch * pages, "--page-size: the number of pages")));
      std::iota(table.begin(), table.end(), 0);
      sequences.block_table = memory.matrix(std::move(table), batch, pages);
    }
    // Pages and new keys need the lengths: by default the cache is full, once the new keys are in it.
    if (!f.seqused_k.empty()) {
      used = f.seqused_k;
    } else if (pages > 0 || seqlen_new_given()) {
      used = {std::max<int64_t>(0, seqlen_k - seqlen_new)};
    }
    if (!used.empty()) sequences.seqused_k = for_each_sequence(used, "--seqused-k");
  }

  void fill_new_keys() {
    if (f.rotary_dim > 0 && !seqlen_new_given()) refuse("--rotary-dim: needs --new-keys or --lengths-new");
    if (!seqlen_new_given()) return;
    const auto rows = [&](int64_t d) {
      if (f.lengths_new.empty()) return memory.tensor(dtype, {batch, seqlen_new, nheads_k, d});
      return memory.tensor(dtype, {sum(f.lengths_new), nheads_k, d});
    };
    new_keys.k = rows(headdim);
    new_keys.v = rows(headdim_v);
    if (!f.lengths_new.empty()) new_keys.cu_seqlens = running_sum(f.lengths_new, "--lengths-new");
    if (f.rotary_dim == 0) return;
    const int64_t positions = std::max(seqlen_k, largest(used) + std::max(seqlen_q, seqlen_new));
    rotary.cos = memory.tensor(dtype, {positions, f.rotary_dim / 2});
    rotary.sin = memory.tensor(dtype, {positions, f.rotary_dim / 2});
    rotary.interleaved = f.rotary_interleaved;
  }

  void fill_scores() {
    scores = {.causal = f.causal,
              .window_left = f.window[0],
              .window_right = f.window[1],
              .attention_chunk = f.chunk,
              .softcap = f.softcap};
    if (f.scale > 0) scores.softmax_scale = f.scale;
    if (f.alibi) scores.alibi_slopes = memory.tensor(DType::f32, {nheads});
    if (f.sink) scores.sink = memory.tensor(DType::f32, {nheads});
    if (!f.bias.empty()) scores.bias = bias(dtype);
  }

  /// Packed sequences share a bias as wide as the longest.
  Tensor bias(DType type) {
    const int64_t keys = pages > 0 ? pages * f.page_size : seqlen_k;
    if (f.bias == "keys") return memory.tensor(type, {batch, 1, 1, keys});
    return memory.tensor(type, {f.bias == "heads" ? 1 : batch, nheads, seqlen_q, keys});
  }

  Tensor like_q(int64_t d) {
    if (!lengths_q.empty()) return memory.tensor(dtype, {sum(lengths_q), nheads, d});
    return memory.tensor(dtype, {batch, seqlen_q, nheads, d});
  }
  Tensor like_k(int64_t d) {
    if (!lengths_k.empty()) return memory.tensor(dtype, {sum(lengths_k), nheads_k, d});
    if (pages > 0) return memory.tensor(dtype, {batch * pages, f.page_size, nheads_k, d});
    const int64_t entries = f.cache_batch_idx.empty() ? batch : largest(f.cache_batch_idx) + 1;
    return memory.tensor(dtype, {entries, seqlen_k, nheads_k, d});
  }
  Tensor lse() {
    if (!lengths_q.empty()) return memory.tensor(DType::f32, {nheads, sum(lengths_q)});
    return memory.tensor(DType::f32, {batch, nheads, seqlen_q});
  }

  static int64_t sum(const Lengths& lengths) { return std::accumulate(lengths.begin(), lengths.end(), int64_t{0}); }
  Tensor running_sum(const Lengths& lengths, const char* option) {
    std::vector<int32_t> sums{0};
    for (const int64_t n : lengths) sums.push_back(narrowed(sums.back() + n, option));
    return memory.numbers(std::move(sums));
  }
  Tensor for_each_sequence(const Lengths& values, const char* option) {
    if (values.size() != 1 && static_cast<int64_t>(values.size()) != batch)
      refuse(fmt::format("{}: expected 1 or {} values, one for each sequence, got {}", option, batch, values.size()));
    std::vector<int32_t> numbers;
    for (int64_t b = 0; b < batch; ++b)
      numbers.push_back(narrowed(values[values.size() == 1 ? 0 : static_cast<std::size_t>(b)], option));
    return memory.numbers(std::move(numbers));
  }

  const Question& f;
  const DType dtype = dtype_named(f.dtype).value();
  const int64_t nheads = f.nheads, headdim = f.headdim;
  int64_t batch = f.batch, nheads_k = 0, headdim_v = 0, seqlen_q = 0, seqlen_k = 0, seqlen_new = 0, pages = 0;
  Lengths lengths_q, lengths_k, used;  // empty: not packed; seqused_k, one for all or for each

  Reservation memory;
  Sequences sequences{};
  NewKeys new_keys{};
  Rotary rotary{};
  Scores scores{};
};

}  // namespace

Explanation ask(const Question& question) {
  Asked call(question);
  return question.backward ? call.backward() : call.forward();
}

}  // namespace flash_attn::cli
