// explain: what a call would do, without doing it. A Problem of any size can be asked about: its tensors are address
// space that is reserved and never touched.
#include <fmt/format.h>
#include <sys/mman.h>

#include <cmath>
#include <deque>
#include <numeric>

#include "commands.hpp"
#include "dtype.hpp"
#include "flash_attn/flash_attn.hpp"
#include "terminal.hpp"

namespace flash_attn::cli {
namespace {

struct Flags {
  int64_t batch = 1, nheads = 16, nheads_k = 0, seqlen_q = 0, seqlen_k = 4096, headdim = 128, headdim_v = 0;
  std::string dtype = "bf16", bias, backend;
  std::vector<int64_t> lengths_q, lengths_k, window{-1, -1};
  int64_t page_size = 0, chunk = 0;
  bool causal = false, alibi = false, sink = false, seqused = false, leftpad = false, backward = false;
  double softcap = 0.0, dropout = 0.0, scale = 0.0;
};

/// Address space for the tensors of one call: readable zeros that cost no memory.
class Reservation {
 public:
  Tensor tensor(DType dtype, std::initializer_list<int64_t> shape) {
    double bytes = static_cast<double>(size_of(dtype));
    for (const int64_t n : shape) bytes *= static_cast<double>(std::max<int64_t>(n, 0));
    if (bytes > 0x1p46)
      throw Error(ErrorCode::invalid_argument,
                  fmt::format("a tensor of {} is beyond the address space", bytes_text(bytes)));
    const std::size_t size = static_cast<std::size_t>(bytes) + 1;
    void* data = mmap(nullptr, size, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (data == MAP_FAILED)
      throw Error(ErrorCode::out_of_memory, fmt::format("cannot reserve {} of address space", bytes_text(bytes)));
    maps_.emplace_back(data, size);
    return view(data, dtype, shape);
  }
  /// int32 values that are read by the checks: kept here.
  Tensor numbers(std::vector<int32_t> values) {
    const auto& kept = numbers_.emplace_back(std::move(values));
    return view(kept.data(), {static_cast<int64_t>(kept.size())});
  }
  Tensor matrix(std::vector<int32_t> values, int64_t rows, int64_t cols) {
    return view(numbers_.emplace_back(std::move(values)).data(), {rows, cols});
  }
  Reservation() = default;
  Reservation(const Reservation&) = delete;
  Reservation& operator=(const Reservation&) = delete;
  ~Reservation() {
    for (const auto& [data, size] : maps_) munmap(data, size);
  }

 private:
  std::vector<std::pair<void*, std::size_t>> maps_;
  std::deque<std::vector<int32_t>> numbers_;
};

std::vector<int32_t> running_sum(const std::vector<int64_t>& lengths) {
  std::vector<int32_t> sum{0};
  for (const int64_t n : lengths) sum.push_back(static_cast<int32_t>(sum.back() + n));
  return sum;
}

Explanation ask(const Flags& f, Reservation& memory) {
  const DType dtype = dtype_named(f.dtype).value();
  const bool varlen = !f.lengths_q.empty() || !f.lengths_k.empty();
  const std::vector<int64_t>& lengths_q = f.lengths_q.empty() ? f.lengths_k : f.lengths_q;
  const std::vector<int64_t>& lengths_k = f.lengths_k.empty() ? f.lengths_q : f.lengths_k;
  const int64_t batch = varlen ? static_cast<int64_t>(lengths_q.size()) : f.batch;
  const int64_t seqlen_k = f.seqlen_k, seqlen_q = f.seqlen_q > 0 ? f.seqlen_q : seqlen_k;
  const int64_t nheads = f.nheads, nheads_k = f.nheads_k > 0 ? f.nheads_k : nheads;
  const int64_t headdim = f.headdim, headdim_v = f.headdim_v > 0 ? f.headdim_v : headdim;
  const int64_t total_q = std::accumulate(lengths_q.begin(), lengths_q.end(), int64_t{0});
  const int64_t total_k = std::accumulate(lengths_k.begin(), lengths_k.end(), int64_t{0});
  if (varlen && f.page_size > 0)
    throw Error(ErrorCode::invalid_argument, "--page-size: not together with --lengths-q or --lengths-k");

  const auto like_q = [&](int64_t d) {
    return varlen ? memory.tensor(dtype, {total_q, nheads, d}) : memory.tensor(dtype, {batch, seqlen_q, nheads, d});
  };
  const int64_t pages = f.page_size > 0 ? (seqlen_k + f.page_size - 1) / f.page_size : 0;
  const auto like_k = [&](int64_t d) {
    if (varlen) return memory.tensor(dtype, {total_k, nheads_k, d});
    if (pages > 0) return memory.tensor(dtype, {batch * pages, f.page_size, nheads_k, d});
    return memory.tensor(dtype, {batch, seqlen_k, nheads_k, d});
  };
  const auto lse = [&] {
    return varlen ? memory.tensor(DType::f32, {nheads, total_q}) : memory.tensor(DType::f32, {batch, nheads, seqlen_q});
  };

  Sequences sequences;
  if (varlen) {
    sequences.cu_seqlens_q = memory.numbers(running_sum(lengths_q));
    sequences.cu_seqlens_k = memory.numbers(running_sum(lengths_k));
  }
  if (pages > 0) {
    std::vector<int32_t> table(static_cast<std::size_t>(batch * pages));
    std::iota(table.begin(), table.end(), 0);
    sequences.block_table = memory.matrix(std::move(table), batch, pages);
  }
  const std::size_t n = static_cast<std::size_t>(batch);
  if (f.seqused || pages > 0) {
    std::vector<int32_t> used(n, static_cast<int32_t>(seqlen_k));
    for (std::size_t b = 0; varlen && b < n; ++b) used[b] = static_cast<int32_t>(lengths_k[b]);
    sequences.seqused_k = memory.numbers(std::move(used));
  }
  if (f.leftpad) sequences.leftpad_k = memory.numbers(std::vector<int32_t>(n, 0));

  Scores scores{.causal = f.causal,
                .window_left = f.window[0],
                .window_right = f.window[1],
                .attention_chunk = f.chunk,
                .softcap = f.softcap};
  if (f.scale > 0) scores.softmax_scale = f.scale;
  if (f.alibi) scores.alibi_slopes = memory.tensor(DType::f32, {nheads});
  if (f.sink) scores.sink = memory.tensor(DType::f32, {nheads});
  if (f.bias == "full") scores.bias = memory.tensor(dtype, {batch, nheads, seqlen_q, seqlen_k});
  if (f.bias == "keys") scores.bias = memory.tensor(dtype, {batch, 1, 1, seqlen_k});
  const Dropout dropout{.p = f.dropout};
  const Run run{.backend = f.backend};

  if (!f.backward) {
    return explain(Forward{.q = like_q(headdim),
                           .k = like_k(headdim),
                           .v = like_k(headdim_v),
                           .out = like_q(headdim_v),
                           .lse = lse(),
                           .sequences = sequences,
                           .scores = scores,
                           .dropout = dropout,
                           .run = run});
  }
  return explain(Backward{.dout = like_q(headdim_v),
                          .q = like_q(headdim),
                          .k = like_k(headdim),
                          .v = like_k(headdim_v),
                          .out = like_q(headdim_v),
                          .lse = lse(),
                          .dq = like_q(headdim),
                          .dk = like_k(headdim),
                          .dv = like_k(headdim_v),
                          .sequences = sequences,
                          .scores = scores,
                          .dropout = dropout,
                          .run = run});
}

void run_explain(const Flags& flags, const JsonOption& json) {
  Reservation memory;
  const Explanation answer = ask(flags, memory);
  std::string chosen;
  for (const Candidate& c : answer.candidates) {
    if (c.chosen) chosen = c.backend;
  }
  if (json.tables()) {
    fmt::print("{}\n\n", painted(answer.problem, Colour::bold));
    Table table({"backend", "answer"});
    for (const Candidate& c : answer.candidates) {
      if (c.chosen) {
        table.add({{c.backend, Colour::green}, {"chosen", Colour::green}});
      } else {
        table.add({c.backend,
                   {c.why_not.empty() ? "serves it" : "refuses: " + c.why_not,
                    c.why_not.empty() ? Colour::none : Colour::yellow}});
      }
    }
    table.print();
    if (chosen.empty()) {
      fmt::print("\nNobody serves this call unasked; --backend NAME asks for one that does.\n");
    } else {
      fmt::print("\n{}\n{}\n", painted("plan", Colour::bold),
                 answer.plan.empty() ? "(the backend describes none)" : answer.plan);
    }
  }
  std::vector<Json> candidates;
  for (const Candidate& c : answer.candidates) {
    candidates.push_back(Json::object(
        {{"backend", c.backend}, {"chosen", c.chosen}, {"refuses", c.why_not.empty() ? Json() : Json(c.why_not)}}));
  }
  json.write(Json::object({{"problem", answer.problem},
                           {"candidates", Json::array(candidates)},
                           {"choice", chosen.empty() ? Json() : Json(chosen)},
                           {"plan", chosen.empty() ? Json() : Json(answer.plan)}},
                          true));
}

}  // namespace

void add_explain(CLI::App& app) {
  CLI::App* command =
      app.add_subcommand("explain", "A call's Problem: every backend's answer, the choice and its plan");
  const auto f = std::make_shared<Flags>();
  command->add_option("--batch", f->batch, "Sequences")->capture_default_str();
  command->add_option("--nheads", f->nheads, "Heads of q")->capture_default_str();
  command->add_option("--nheads-k", f->nheads_k, "Heads of k and v (default: as q)");
  command->add_option("--seqlen-q", f->seqlen_q, "Queries per sequence (default: as keys)");
  command->add_option("--seqlen-k", f->seqlen_k, "Keys per sequence")->capture_default_str();
  command->add_option("--lengths-q", f->lengths_q, "Packed sequences of these lengths: 100,20,7")->delimiter(',');
  command->add_option("--lengths-k", f->lengths_k, "Their lengths in keys (default: as --lengths-q)")->delimiter(',');
  command->add_option("--page-size", f->page_size, "Keys in pages of that many rows");
  command->add_flag("--seqused-k", f->seqused, "With used lengths of keys");
  command->add_flag("--leftpad-k", f->leftpad, "With left padding of keys");
  command->add_option("--headdim", f->headdim, "Head dimension of q and k")->capture_default_str();
  command->add_option("--headdim-v", f->headdim_v, "Head dimension of v (default: as --headdim)");
  command->add_option("--dtype", f->dtype, "fp16, bf16, fp32 or fp64")
      ->check(CLI::IsMember({"fp16", "bf16", "fp32", "fp64"}))
      ->capture_default_str();
  command->add_flag("--causal", f->causal);
  command->add_option("--window", f->window, "LEFT,RIGHT; -1: no limit")->delimiter(',')->expected(2)->type_name("L,R");
  command->add_option("--chunk", f->chunk, "Attention within chunks of that many positions");
  command->add_option("--scale", f->scale, "Softmax scale (default: headdim^-1/2)");
  command->add_option("--softcap", f->softcap);
  command->add_flag("--alibi", f->alibi, "With ALiBi slopes");
  command->add_flag("--sink", f->sink, "With a sink per head");
  command->add_option("--bias", f->bias, "full (batch, nheads, seqlen_q, seqlen_k), or keys (batch, 1, 1, seqlen_k)")
      ->check(CLI::IsMember({"full", "keys"}));
  command->add_option("--dropout", f->dropout, "Probability of dropping an entry");
  command->add_flag("--backward", f->backward, "The gradient's call");
  command->add_option("--backend", f->backend, "Ask for this backend by name");
  const auto json = JsonOption::add_to(*command);
  command->callback([f, json] { run_explain(*f, *json); });
}

}  // namespace flash_attn::cli
