// The checks of new keys and of their rotary embedding.
#include <algorithm>
#include <string>
#include <utility>
#include <vector>

#include "core/append.hpp"
#include "core/sequences.hpp"

namespace flash_attn {
namespace {

/// (position, pair), indexed as (row, col).
Operand table_operand(const Tensor& t) {
  Operand o;
  o.data = static_cast<char*>(t.data);
  o.dtype = t.dtype;
  o.stride_row = t.stride[0], o.stride_col = t.stride[1];
  return o;
}

void check_positions(const Problem& p, int64_t rows) {
  for (int64_t b = 0; b < p.batch; ++b) {
    const int64_t first = first_position(p, b), queries = p.sequences.at(b).seqlen_q;
    if (first < 0) fail_entry("rotary.positions", b, "at least 0", first);
    const int64_t needed = first + std::max(p.sequences.new_keys(b), queries_advance(p) ? queries : queries > 0);
    if (needed > rows && needed > first)
      invalid("rotary.cos", "expected at least " + std::to_string(needed) + " rows, the positions that sequence " +
                                std::to_string(b) + " reaches, got " + std::to_string(rows));
  }
}

/// Rows that sequence b writes.
struct Written {
  KeyRun rows;
  int64_t b;
};

std::vector<Written> written_rows(const Problem& p) {
  const SequenceTable& t = p.sequences;
  std::vector<Written> written;
  for (int64_t b = 0; b < p.batch; ++b) {
    const Sequence s = t.at(b);
    for (int64_t row = t.used(b), end = row + t.new_keys(b); row < end;) {
      KeyRun rows = s.key_run(row, t.page_size);
      rows.run = std::min(rows.run, end - row);
      written.push_back({rows, b});
      row += rows.run;
    }
  }
  return written;
}

void check_written_once(const Problem& p) {
  const SequenceTable& t = p.sequences;
  if (!t.block_table && !t.cache_batch_idx) return;  // every sequence has an entry of its own
  std::vector<Written> written = written_rows(p);
  const auto before = [](const Written& x, const Written& y) {
    return x.rows.batch != y.rows.batch ? x.rows.batch < y.rows.batch : x.rows.row < y.rows.row;
  };
  std::sort(written.begin(), written.end(), before);
  for (std::size_t i = 1; i < written.size(); ++i) {
    const Written &x = written[i - 1], &y = written[i];
    if (x.rows.batch == y.rows.batch && y.rows.row < x.rows.row + x.rows.run)
      invalid(t.block_table ? "block_table" : "cache_batch_idx",
              "sequences " + std::to_string(x.b) + " and " + std::to_string(y.b) + " would write the same row " +
                  std::to_string(y.rows.row) + (t.block_table ? " of page " : " of entry ") +
                  std::to_string(y.rows.batch));
  }
}

}  // namespace

void read_new_keys(const NewKeys& keys, const Sequences& sequences, Memory& memory, Problem& p) {
  if (!keys.k.present() && !keys.v.present()) {
    if (keys.cu_seqlens.present()) invalid("new_keys.cu_seqlens", "given without new_keys.k");
    return;
  }
  if (!keys.k.present()) invalid("new_keys.k", "required where new_keys.v is given, but absent");
  if (!keys.v.present()) invalid("new_keys.v", "required where new_keys.k is given, but absent");
  if (!p.sequences.counts_keys())
    invalid("seqused_k", "required where new_keys are given, but absent: new keys are written behind those in use");
  if (sequences.cu_seqlens_k.present())
    invalid("cu_seqlens_k", "given with new_keys, which need k in entries (batch, seqlen_k, ...) or pages");
  memory.add_input("new_keys.k", keys.k);
  memory.add_input("new_keys.v", keys.v);
  check_dtype("new_keys.k", keys.k, p.dtype);
  check_dtype("new_keys.v", keys.v, p.dtype);
  const bool packed = keys.cu_seqlens.present();
  const int rank = packed ? 3 : 4;
  check_rank("new_keys.k", keys.k, rank,
             packed ? "(total_new, nheads_k, headdim)" : "(batch, seqlen_new, nheads_k, headdim)");
  check_rank("new_keys.v", keys.v, rank,
             packed ? "(total_new, nheads_k, headdim_v)" : "(batch, seqlen_new, nheads_k, headdim_v)");
  if (!packed) check_dim("new_keys.k", keys.k, 0, "batch", p.batch);
  check_dim("new_keys.k", keys.k, rank - 2, "nheads_k", p.nheads_k);
  check_dim("new_keys.k", keys.k, rank - 1, "headdim", p.headdim);
  check_dim("new_keys.v", keys.v, rank - 1, "headdim_v", p.headdim_v);
  if (!std::equal(keys.k.shape, keys.k.shape + rank - 1, keys.v.shape))
    invalid("new_keys.v", "expected the shape of new_keys.k, " + shape_text(keys.k) + ", but for headdim_v, got " +
                              shape_text(keys.v));
  p.sequences.cu_seqlens_new =
      read_table("new_keys.cu_seqlens", keys.cu_seqlens, "(batch + 1)", "batch + 1", p.batch + 1, memory);
  p.append.k = operand(keys.k), p.append.v = operand(keys.v);
  p.append.rows = keys.k.shape[rank - 3];
  if (!packed) p.sequences.seqlen_new = p.append.rows;
  // Of packed keys the CPU sees how many join the longest (read_contents); on a device all might join one sequence.
  if (!packed || !p.device.is_cpu()) p.append.max_rows = p.append.rows;
}

void read_rotary(const Rotary& rotary, const NewKeys& keys, Memory& memory, Problem& p) {
  if (p.append.present() && p.device.is_cpu()) check_written_once(p);
  if (!rotary.cos.present()) {
    if (rotary.sin.present()) invalid("rotary.sin", "given without rotary.cos");
    if (rotary.positions.present()) invalid("rotary.positions", "given without rotary.cos");
    return;
  }
  if (!rotary.sin.present()) invalid("rotary.sin", "required where rotary.cos is given, but absent");
  if (!keys.k.present())
    invalid("rotary.cos", "given without new_keys: it rotates queries and the keys that join them");
  for (const auto& [argument, t] : {std::pair{"rotary.cos", &rotary.cos}, std::pair{"rotary.sin", &rotary.sin}}) {
    memory.add_input(argument, *t);
    if (t->dtype != DType::f32) check_dtype(argument, *t, p.dtype);
    check_rank(argument, *t, 2, "(seqlen_rotary, rotary_dim / 2)");
  }
  const int64_t rows = rotary.cos.shape[0], pairs = rotary.cos.shape[1];
  if (rotary.sin.shape[0] != rows || rotary.sin.shape[1] != pairs)
    invalid("rotary.sin",
            "expected the shape of rotary.cos, " + shape_text(rotary.cos) + ", got " + shape_text(rotary.sin));
  if (pairs < 1 || pairs > p.headdim / 2)
    invalid("rotary.cos",
            "expected 1 to headdim / 2 = " + std::to_string(p.headdim / 2) + " columns, got " + shape_text(rotary.cos));
  p.append.positions = read_table("rotary.positions", rotary.positions, "(batch)", "batch", p.batch, memory);
  p.append.cos = table_operand(rotary.cos), p.append.sin = table_operand(rotary.sin);
  p.append.rotary_dim = 2 * pairs, p.append.interleaved = rotary.interleaved;
  if (p.device.is_cpu()) check_positions(p, rows);
}

}  // namespace flash_attn
