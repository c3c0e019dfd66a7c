// explain: what a call would do, without doing it. A call of any size can be asked about: its tensors are address space
// that is reserved and never touched.
#include <fmt/format.h>

#include "commands.hpp"
#include "options.hpp"
#include "question.hpp"
#include "terminal.hpp"

namespace flash_attn::cli {
namespace {

void run_explain(const Question& question, const JsonOption& json) {
  const Explanation answer = ask(question);
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
    fmt::print("\n{}\n{}\n", painted("work", Colour::bold), answer.work);
  }
  std::vector<Json> candidates;
  for (const Candidate& c : answer.candidates) {
    candidates.push_back(Json::object(
        {{"backend", c.backend}, {"chosen", c.chosen}, {"refuses", c.why_not.empty() ? Json() : Json(c.why_not)}}));
  }
  json.write(Json::object({{"problem", answer.problem},
                           {"candidates", Json::array(candidates)},
                           {"choice", chosen.empty() ? Json() : Json(chosen)},
                           {"plan", chosen.empty() ? Json() : Json(answer.plan)},
                           {"work", answer.work}},
                          true));
}

}  // namespace

void add_explain(CLI::App& app) {
  CLI::App* command =
      app.add_subcommand("explain", "A call's Problem: every backend's answer, the choice and its plan");
  const auto f = std::make_shared<Question>();
  const auto number = [&](const char* name, int64_t& value, const char* help, int64_t low = 1) {
    return command->add_option(name, value, help)->check(integer_from(low))->type_name("N");
  };
  const auto list = [&](const char* name, std::vector<int64_t>& values, const char* help) {
    return command->add_option(name, values, help)->delimiter(',')->check(integer_from(0))->type_name("N,...");
  };
  number("--batch", f->batch, "Sequences", 0)->capture_default_str();
  number("--nheads", f->nheads, "Heads of q")->capture_default_str();
  number("--nheads-k", f->nheads_k, "Heads of k and v (default: as q)");
  number("--seqlen-q", f->seqlen_q, "Queries per sequence (default: as --new-keys, else as keys)");
  number("--seqlen-k", f->seqlen_k, "Keys per sequence, or the rows of a cache", 0)->capture_default_str();
  number("--headdim", f->headdim, "Head dimension of q and k")->capture_default_str();
  number("--headdim-v", f->headdim_v, "Head dimension of v (default: as --headdim)");
  command->add_option("--dtype", f->dtype, "Of q, k, v and out")
      ->check(CLI::IsMember({"fp16", "bf16", "fp32", "fp64"}))
      ->capture_default_str();

  list("--lengths-q", f->lengths_q, "Packed sequences of these lengths: 100,20,7");
  list("--lengths-k", f->lengths_k, "Their lengths in keys (default: as --lengths-q)");
  list("--seqused-q", f->seqused_q, "Queries in use, one number for all sequences or one for each");
  list("--seqused-k", f->seqused_k, "Keys in use (cache_seqlens), before new ones join them; likewise");
  list("--leftpad-k", f->leftpad_k, "Rows before the first key; likewise");

  number("--page-size", f->page_size, "Keys in pages of that many rows");
  list("--cache-batch-idx", f->cache_batch_idx, "The cache's entry of each sequence");
  number("--new-keys", f->new_keys, "New keys per sequence, written to the cache first");
  list("--lengths-new", f->lengths_new, "New keys, packed, of these lengths");
  number("--rotary-dim", f->rotary_dim, "Rotary embedding of q and the new keys, over that many columns");
  command->add_flag("--rotary-interleaved", f->rotary_interleaved, "Pairs of neighbouring columns");

  command->add_flag("--causal", f->causal, "Causal mask");
  command->add_option("--window", f->window, "LEFT,RIGHT; -1: no limit")
      ->delimiter(',')
      ->check(integer_from(-1))
      ->type_name("L,R");
  number("--chunk", f->chunk, "Attention within chunks of that many positions");
  command->add_option("--scale", f->scale, "Softmax scale (default: headdim^-1/2)")->check(positive_number());
  command->add_option("--softcap", f->softcap, "softcap * tanh(score / softcap)")->check(positive_number());
  command->add_flag("--alibi", f->alibi, "With ALiBi slopes");
  command->add_flag("--sink", f->sink, "With a sink per head");
  command
      ->add_option("--bias", f->bias,
                   "full (batch, nheads, seqlen_q, seqlen_k), heads (1, nheads, ...), or keys (batch, 1, 1, seqlen_k)")
      ->check(CLI::IsMember({"full", "heads", "keys"}));
  command->add_option("--dropout", f->dropout, "Probability of dropping an entry")->check(probability());
  command->add_flag("--backward", f->backward, "The gradient's call");
  command->add_option("--backend", f->backend, "Ask for this backend by name");
  const auto json = JsonOption::add_to(*command);
  command->callback([f, json] { run_explain(*f, *json); });
}

}  // namespace flash_attn::cli
