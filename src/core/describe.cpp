// A Problem in one line of words.
#include <string>

#include "core/check.hpp"
#include "core/problem.hpp"

namespace flash_attn {
namespace {

std::string lengths(const Problem& p) {
  const SequenceTable& t = p.sequences;
  const bool ragged = t.cu_seqlens_q || t.cu_seqlens_k || t.seqused_q || t.counts_keys() || t.leftpad_k;
  return std::string(ragged ? "seqlen up to " : "seqlen ") + std::to_string(p.max_seqlen_q) + " x " +
         std::to_string(p.max_seqlen_k);
}

void add_sequences(std::string& text, const Problem& p) {
  const SequenceTable& t = p.sequences;
  if (t.cu_seqlens_q || (t.cu_seqlens_k && t.page_size == 0)) text += ", packed";
  if (t.page_size > 0) text += ", pages of " + std::to_string(t.page_size);
  if (t.seqused_q) text += ", seqused_q";
  if (t.counts_keys()) text += ", seqused_k";
  if (t.leftpad_k) text += ", leftpad_k";
  if (t.cache_batch_idx) text += ", cache_batch_idx";
  if (p.append.rows > 0) text += t.cu_seqlens_new ? ", new keys" : ", " + std::to_string(p.append.rows) + " new keys";
  if (p.append.rotates())
    text += ", rotary " + std::to_string(p.append.rotary_dim) + (p.append.interleaved ? " interleaved" : "");
}

void add_scores(std::string& text, const Problem& p) {
  const ScorePipeline& s = p.scores;
  const Mask& m = s.mask;
  if (m.window_right == 0 && m.window_left < 0)
    text += ", causal";
  else if (m.window_left >= 0 || m.window_right >= 0)
    text += ", window (" + std::to_string(m.window_left) + ", " + std::to_string(m.window_right) + ")";
  if (m.chunk > 0) text += ", chunks of " + std::to_string(m.chunk);
  if (s.softcap > 0.0) text += ", softcap " + number_text(s.softcap);
  if (s.alibi) text += ", alibi";
  if (s.bias.present()) text += ", bias";
  if (s.sink.present()) text += ", sink";
  if (s.dropout.p > 0.0) text += ", dropout " + number_text(s.dropout.p);
  if (p.dlse.present()) text += ", dlse";
}

}  // namespace

std::string describe(const Problem& p) {
  std::string text = p.pass == Pass::forward ? "forward " : "backward ";
  text += std::string(name_of(p.dtype)) + " batch " + std::to_string(p.batch) + ", " + std::to_string(p.nheads) +
          (p.nheads == 1 ? " head" : " heads");
  if (p.nheads_k != p.nheads) text += " (" + std::to_string(p.nheads_k) + " of keys)";
  text += ", headdim " + std::to_string(p.headdim);
  if (p.headdim_v != p.headdim) text += " (" + std::to_string(p.headdim_v) + " of values)";
  text += ", " + lengths(p);
  add_sequences(text, p);
  add_scores(text, p);
  if (!p.device.is_cpu()) text += ", on " + device_text(p.device);
  return text;
}

}  // namespace flash_attn
