// What a Problem uses, and the words for what a backend lacks.
#include "core/features.hpp"

#include <bit>

#include "core/check.hpp"
#include "core/problem.hpp"

namespace flash_attn {

const std::array<std::string_view, kFeatures> kFeatureNames = {
    "packed_q",        "packed_k",  "pages",   "seqused_q", "seqused_k",     "leftpad_k",
    "cache_batch_idx", "new_keys",  "rotary",  "grouped",   "own_headdim_v", "causal",
    "window",          "chunk",     "softcap", "alibi",     "bias",          "sink",
    "dropout",         "lse",       "dlse",    "dbias",     "dsink",         "deterministic",
    "strided_columns", "blind_rows"};

constinit const Serves kServesAll = {.dtypes = bit(DType::f16) | bit(DType::bf16) | bit(DType::f32) | bit(DType::f64),
                                     .features = kAllFeatures};

namespace {

bool lengths_vary(const SequenceTable& t) {
  return t.cu_seqlens_q || t.cu_seqlens_k || t.seqused_q || t.seqused_k || t.leftpad_k || t.cu_seqlens_new;
}

bool has_strided_columns(const Problem& p) {
  for (const Operand* x : {&p.q, &p.k, &p.out, &p.v, &p.dout, &p.dq, &p.dk, &p.dv})
    if (x->present() && x->stride_col != 1) return true;
  return false;
}

std::string headdim_limits(const Serves& serves) {
  std::string text = serves.headdim_multiple > 1 ? "multiples of " + std::to_string(serves.headdim_multiple) : "";
  if (serves.max_headdim > 0) text += (text.empty() ? "up to " : " up to ") + std::to_string(serves.max_headdim);
  return text;
}

bool serves_headdim(const Serves& serves, int64_t headdim) {
  return (serves.max_headdim == 0 || headdim <= serves.max_headdim) && headdim % serves.headdim_multiple == 0;
}

std::string dtypes_text(uint32_t dtypes) {
  std::vector<std::string> names;
  for (const DType t : {DType::f32, DType::bf16, DType::f16, DType::f64})
    if (dtypes & bit(t)) names.emplace_back(name_of(t));
  if (names.size() < 2) return join(names);
  const std::string last = names.back();
  names.pop_back();
  return join(names) + " and " + last;
}

}  // namespace

Features features_of(const Problem& p) {
  const SequenceTable& t = p.sequences;
  const ScorePipeline& s = p.scores;
  const Mask& m = s.mask;
  const bool causal = m.window_right == 0 && m.window_left < 0;
  Features set = 0;
  const auto add = [&set](Feature f, bool used) { set |= used ? bit(f) : 0; };
  add(Feature::packed_q, t.cu_seqlens_q);
  add(Feature::packed_k, t.cu_seqlens_k);
  add(Feature::pages, t.block_table);
  add(Feature::seqused_q, t.seqused_q);
  add(Feature::seqused_k, t.counts_keys());
  add(Feature::leftpad_k, t.leftpad_k);
  add(Feature::cache_batch_idx, t.cache_batch_idx);
  add(Feature::new_keys, p.append.rows > 0);
  add(Feature::rotary, p.append.rotates());
  add(Feature::grouped, p.nheads != p.nheads_k);
  add(Feature::own_headdim_v, p.headdim_v != p.headdim);
  add(Feature::causal, causal);
  add(Feature::window, !causal && (m.window_left >= 0 || m.window_right >= 0));
  add(Feature::chunk, m.chunk > 0);
  add(Feature::softcap, s.softcap > 0);
  add(Feature::alibi, s.alibi);
  add(Feature::bias, s.bias.present());
  add(Feature::sink, s.sink.present());
  add(Feature::dropout, s.dropout.p > 0);
  add(Feature::lse, p.pass == Pass::forward && p.lse.present());
  add(Feature::dlse, p.dlse.present());
  add(Feature::dbias, p.dbias.present());
  add(Feature::dsink, p.dsink.present());
  add(Feature::deterministic, p.run.deterministic);
  add(Feature::strided_columns, has_strided_columns(p));
  add(Feature::blind_rows, !m.trivial() && (p.max_seqlen_q > p.max_seqlen_k || lengths_vary(t)));
  return set;
}

std::string serves_text(const Serves* serves) {
  if (!serves) return "nothing";
  std::string text = dtypes_text(serves->dtypes);
  if (serves->max_headdim > 0 || serves->headdim_multiple > 1) text += "; headdim " + headdim_limits(*serves);
  std::vector<std::string_view> lacking;
  for (std::size_t i = 0; i < kFeatures; ++i)
    if (!(serves->features >> i & 1)) lacking.push_back(kFeatureNames[i]);
  return text + (lacking.empty() ? "; every feature" : "; all but " + join(lacking));
}

std::string refusal(const Serves& serves, const Problem& p) {
  if (!(serves.dtypes & bit(p.dtype)))
    return std::string("dtype: ") + name_of(p.dtype) + " is not served (" + dtypes_text(serves.dtypes) +
           (std::has_single_bit(serves.dtypes) ? " is)" : " are)");
  for (const int64_t headdim : {p.headdim, p.headdim_v})
    if (!serves_headdim(serves, headdim))
      return "headdim: " + std::to_string(headdim) + " is not served (" + headdim_limits(serves) + " are)";
  const Features lacking = p.features & ~serves.features;
  if (lacking == 0) return {};
  const auto first = static_cast<Feature>(std::countr_zero(lacking));
  for (const auto& [feature, text] : serves.words)
    if (feature == first) return text;
  return std::string(kFeatureNames[static_cast<std::size_t>(first)]) + ": not served";
}

}  // namespace flash_attn
