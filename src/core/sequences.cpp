// Sequences: who attends to whom, from the many ways to say it.
//
// First the shapes (these decide batch, heads and rows), then, where the integer tensors can be read, their contents.
// After that SequenceTable::at(b) can be followed blindly: every row and every page it leads to exists.
#include "core/sequences.hpp"

#include <algorithm>
#include <limits>
#include <string>
#include <utility>

#include "core/append.hpp"

namespace flash_attn {
namespace {

/// Shapes of q, k, v: heads, head dimensions, rows, and the batch.
void read_shapes(const Tensor& q, const Tensor& k, const Tensor& v, const Sequences& s, Problem& p) {
  const bool packed_q = s.cu_seqlens_q.present(), paged = s.block_table.present();
  const bool packed_k = s.cu_seqlens_k.present() && !paged;

  if (packed_q)
    check_rank("q", q, 3, "(total_q, nheads, headdim)");
  else
    check_rank("q", q, 4, "(batch, seqlen_q, nheads, headdim)");
  const char* layout_k = paged      ? "(num_blocks, page_size, nheads_k, headdim)"
                         : packed_k ? "(total_k, nheads_k, headdim)"
                                    : "(batch, seqlen_k, nheads_k, headdim)";
  check_rank("k", k, packed_k ? 3 : 4, layout_k);
  check_rank("v", v, k.ndim,
             paged      ? "(num_blocks, page_size, nheads_k, headdim_v)"
             : packed_k ? "(total_k, nheads_k, headdim_v)"
                        : "(batch, seqlen_k, nheads_k, headdim_v)");

  const int64_t* shape_q = q.shape + (packed_q ? 0 : 1);  // (rows, nheads, headdim)
  const int64_t* shape_k = k.shape + (packed_k ? 0 : 1);
  p.batch_q = packed_q ? 1 : q.shape[0];
  p.batch_k = packed_k ? 1 : k.shape[0];
  p.rows_q = shape_q[0], p.nheads = shape_q[1], p.headdim = shape_q[2];
  p.rows_k = shape_k[0], p.nheads_k = shape_k[1];
  p.headdim_v = v.shape[v.ndim - 1];

  if (p.headdim < 1) invalid("q", "expected headdim >= 1, got " + shape_text(q));
  check_dim("k", k, k.ndim - 1, "headdim", p.headdim);
  for (int d = 0; d < k.ndim - 1; ++d)
    if (v.shape[d] != k.shape[d])
      invalid("v", "expected the shape of k, " + shape_text(k) + ", but for headdim_v, got " + shape_text(v));
  if (p.headdim_v < 1) invalid("v", "expected headdim_v >= 1, got " + shape_text(v));
  if (p.nheads < 1) invalid("q", "expected nheads >= 1, got " + shape_text(q));
  if (p.nheads_k < 1) invalid("k", "expected nheads_k >= 1, got " + shape_text(k));
  if (p.nheads % p.nheads_k != 0)
    invalid("k", "expected nheads_k to divide nheads = " + std::to_string(p.nheads) +
                     ", got nheads_k = " + std::to_string(p.nheads_k));

  // Whoever has one entry per sequence says how many there are: cu_seqlens_q or q, and the others agree.
  p.batch = packed_q ? s.cu_seqlens_q.shape[0] - 1 : q.shape[0];
  if (!packed_k && !paged && !s.cache_batch_idx.present()) check_dim("k", k, 0, "batch", p.batch);
  if (paged && p.rows_k < 1) invalid("k", "expected page_size >= 1, got " + shape_text(k));
}

/// cu_seqlens start at 0, never decrease and end within `total` rows.
void check_cu_seqlens(const char* argument, const int32_t* cu, int64_t batch, int64_t total) {
  if (cu[0] != 0) fail_entry(argument, 0, "0", cu[0]);
  for (int64_t b = 1; b <= batch; ++b)
    if (cu[b] < cu[b - 1]) fail_entry(argument, b, "at least the entry before, " + std::to_string(cu[b - 1]), cu[b]);
  if (cu[batch] > total) fail_entry(argument, batch, "at most the rows there are, " + std::to_string(total), cu[batch]);
}

void check_range(const char* argument, int64_t b, int64_t value, int64_t most, const char* meaning) {
  if (value < 0 || value > most)
    fail_entry(argument, b, "0 <= entry <= " + std::string(meaning) + " = " + std::to_string(most), value);
}

const char* used_meaning(int64_t new_keys) {
  return new_keys > 0 ? "the rows of the sequence less its new keys" : "the rows of the sequence";
}

/// The one number of used keys, which no table holds.
void check_used(int64_t used, int64_t most, const char* meaning) {
  if (used > most)
    invalid("seqused_k", "expected at most " + std::string(meaning) + " = " + std::to_string(most) + ", got " +
                             std::to_string(used));
}

/// The pages that keys [first, last) of sequence b lie in exist.
void check_pages(const SequenceTable& t, int64_t b, int64_t first, int64_t last, int64_t num_blocks) {
  if (last <= first) return;
  const int32_t* row = t.block_table + b * t.block_table_stride;
  for (int64_t page = first / t.page_size; page <= (last - 1) / t.page_size; ++page)
    if (row[page] < 0 || row[page] >= num_blocks)
      throw Error(ErrorCode::invalid_argument, "block_table[" + std::to_string(b) + ", " + std::to_string(page) +
                                                   "]: expected 0 <= entry < num_blocks = " +
                                                   std::to_string(num_blocks) + ", got " + std::to_string(row[page]));
}

/// Follows every sequence once: all it leads to exists. Sets the exact longest lengths.
void read_contents(Problem& p) {
  const SequenceTable& t = p.sequences;
  const bool paged = t.page_size > 0;
  if (t.cu_seqlens_q) check_cu_seqlens("cu_seqlens_q", t.cu_seqlens_q, p.batch, p.rows_q);
  if (t.cu_seqlens_k)
    check_cu_seqlens("cu_seqlens_k", t.cu_seqlens_k, p.batch, paged ? std::numeric_limits<int64_t>::max() : p.rows_k);
  if (t.cu_seqlens_new) check_cu_seqlens("new_keys.cu_seqlens", t.cu_seqlens_new, p.batch, p.append.rows);
  for (int64_t b = 0; b < p.batch; ++b) {
    const int64_t rows_q = t.cu_seqlens_q ? int64_t{t.cu_seqlens_q[b + 1]} - t.cu_seqlens_q[b] : t.seqlen_q;
    const int64_t rows_k = t.cu_seqlens_k ? int64_t{t.cu_seqlens_k[b + 1]} - t.cu_seqlens_k[b] : t.seqlen_k;
    if (paged && rows_k > t.seqlen_k)
      fail_entry("cu_seqlens_k", b + 1,
                 "a length within the pages, max_blocks * page_size = " + std::to_string(t.seqlen_k), rows_k);
    if (t.seqused_q) check_range("seqused_q", b, t.seqused_q[b], rows_q, "the rows of the sequence");
    const int64_t new_keys = t.new_keys(b);
    p.append.max_rows = std::max(p.append.max_rows, new_keys);
    if (t.seqused_k) check_range("seqused_k", b, t.seqused_k[b], rows_k - new_keys, used_meaning(new_keys));
    if (t.used_k >= 0) check_used(t.used_k, rows_k - new_keys, used_meaning(new_keys));
    const int64_t used_k = t.counts_keys() ? t.used(b) : rows_k;
    if (t.leftpad_k) check_range("leftpad_k", b, t.leftpad_k[b], used_k, "the keys of the sequence");
    if (t.cache_batch_idx)
      check_range("cache_batch_idx", b, t.cache_batch_idx[b], p.batch_k - 1, "the last entry of k");
    if (paged) check_pages(t, b, t.leftpad_k ? t.leftpad_k[b] : 0, used_k + new_keys, p.batch_k);
    const Sequence sequence = t.at(b);
    p.max_seqlen_q = std::max(p.max_seqlen_q, sequence.seqlen_q);
    p.max_seqlen_k = std::max(p.max_seqlen_k, sequence.seqlen_k);
  }
}

void check_max(const char* argument, int64_t given, int64_t real) {
  if (given < real)
    invalid(argument,
            "expected at least the longest sequence, " + std::to_string(real) + ", got " + std::to_string(given));
}

/// Lengths on a device can't be read here: the caller's bounds, or the capacity. No bound exceeds the rows there are.
int64_t bound(const char* argument, int64_t given, bool packed, int64_t capacity) {
  if (given < 0 && packed) invalid(argument, "required, since cu_seqlens are not in the CPU's memory");
  return given < 0 ? capacity : std::min(given, capacity);
}

}  // namespace

Sequence clamped(const Problem& p, int64_t b) {
  const SequenceTable& t = p.sequences;
  const auto within = [](int64_t x, int64_t lo, int64_t hi) { return std::max(lo, std::min(x, hi)); };
  Sequence s{b, 0, t.seqlen_q, b, 0, t.seqlen_k, nullptr};
  if (t.cu_seqlens_q) {
    s.q_batch = 0;
    s.q_row = within(t.cu_seqlens_q[b], 0, p.rows_q);
    s.seqlen_q = within(t.cu_seqlens_q[b + 1], s.q_row, p.rows_q) - s.q_row;
  }
  if (t.cu_seqlens_k && t.block_table) {
    s.seqlen_k = within(int64_t{t.cu_seqlens_k[b + 1]} - t.cu_seqlens_k[b], 0, t.seqlen_k);
  } else if (t.cu_seqlens_k) {
    s.k_batch = 0;
    s.k_row = within(t.cu_seqlens_k[b], 0, p.rows_k);
    s.seqlen_k = within(t.cu_seqlens_k[b + 1], s.k_row, p.rows_k) - s.k_row;
  }
  if (t.cache_batch_idx) s.k_batch = within(t.cache_batch_idx[b], 0, p.batch_k - 1);
  if (t.seqused_q) s.seqlen_q = within(t.seqused_q[b], 0, s.seqlen_q);
  const int64_t joining = within(t.new_keys(b), 0, std::min(p.append.max_rows, s.seqlen_k));
  if (t.counts_keys()) s.seqlen_k = within(t.used(b), 0, s.seqlen_k - joining) + joining;
  if (t.leftpad_k) {
    const int64_t pad = within(t.leftpad_k[b], 0, s.seqlen_k);
    s.k_row += pad, s.seqlen_k -= pad;
  }
  if (t.block_table) s.pages = t.block_table + b * t.block_table_stride;
  return s;
}

const int32_t* read_table(const char* argument, const Tensor& t, const char* layout, const char* meaning,
                          int64_t entries, Memory& memory) {
  if (!t.present()) return nullptr;
  memory.add_input(argument, t);
  check_rank(argument, t, 1, layout);
  check_int32(argument, t);
  check_dim(argument, t, 0, meaning, entries);
  return static_cast<const int32_t*>(t.data);
}

void read_sequences(const Tensor& q, const Tensor& k, const Tensor& v, const Sequences& s, const NewKeys& new_keys,
                    Memory& memory, Problem& p) {
  const Tensor *cu_q = &s.cu_seqlens_q, *cu_k = &s.cu_seqlens_k;
  for (const auto& [argument, cu] : {std::pair{"cu_seqlens_q", cu_q}, std::pair{"cu_seqlens_k", cu_k}})
    if (cu->present()) {
      check_rank(argument, *cu, 1, "(batch + 1)");
      if (cu->shape[0] < 1) invalid(argument, "expected batch + 1 entries, got none");
    }
  read_shapes(q, k, v, s, p);
  SequenceTable& t = p.sequences;
  t.cu_seqlens_q = read_table("cu_seqlens_q", s.cu_seqlens_q, "(batch + 1)", "batch + 1", p.batch + 1, memory);
  t.cu_seqlens_k = read_table("cu_seqlens_k", s.cu_seqlens_k, "(batch + 1)", "batch + 1", p.batch + 1, memory);
  t.seqused_q = read_table("seqused_q", s.seqused_q, "(batch)", "batch", p.batch, memory);
  t.seqused_k = read_table("seqused_k", s.seqused_k, "(batch)", "batch", p.batch, memory);
  t.leftpad_k = read_table("leftpad_k", s.leftpad_k, "(batch)", "batch", p.batch, memory);
  t.cache_batch_idx = read_table("cache_batch_idx", s.cache_batch_idx, "(batch)", "batch", p.batch, memory);
  if (s.used_k < -1) invalid("used_k", "expected >= 0, or -1 if not given, got " + std::to_string(s.used_k));
  if (s.used_k >= 0 && t.seqused_k) invalid("used_k", "given with seqused_k, which says the same");
  t.used_k = s.used_k;
  const bool paged = s.block_table.present();
  if (s.cache_batch_idx.present() && (paged || s.cu_seqlens_k.present()))
    invalid("cache_batch_idx", std::string("expected k to be (batch, seqlen_k, nheads_k, headdim), got it with ") +
                                   (paged ? "block_table" : "cu_seqlens_k"));
  t.batch = p.batch;
  t.seqlen_q = p.rows_q;
  t.seqlen_k = p.rows_k;
  if (paged) {
    memory.add_input("block_table", s.block_table);
    check_rank("block_table", s.block_table, 2, "(batch, max_blocks)");
    check_int32("block_table", s.block_table);
    check_dim("block_table", s.block_table, 0, "batch", p.batch);
    t.block_table = static_cast<const int32_t*>(s.block_table.data);
    t.page_size = p.rows_k;
    t.block_table_stride = s.block_table.stride[0];
    if (__builtin_mul_overflow(s.block_table.shape[1], t.page_size, &t.seqlen_k))
      invalid("block_table", "max_blocks * page_size overflows");
  }
  read_new_keys(new_keys, s, memory, p);

  if (!p.device.is_cpu()) {
    p.max_seqlen_q = bound("max_seqlen_q", s.max_seqlen_q, s.cu_seqlens_q.present(), t.seqlen_q);
    p.max_seqlen_k = bound("max_seqlen_k", s.max_seqlen_k, s.cu_seqlens_k.present(), t.seqlen_k);
    if (t.used_k >= 0) {
      const int64_t most = t.seqlen_k - t.seqlen_new;
      check_used(t.used_k, most, used_meaning(t.seqlen_new));
      p.max_seqlen_k = std::min(p.max_seqlen_k, t.used_k + p.append.max_rows);
    }
    return;
  }
  const bool fixed = !(s.cu_seqlens_q.present() || s.cu_seqlens_k.present() || s.seqused_q.present() ||
                       t.counts_keys() || s.leftpad_k.present() || s.cache_batch_idx.present() || paged);
  if (!fixed)
    read_contents(p);
  else if (p.batch > 0)
    p.max_seqlen_q = t.seqlen_q, p.max_seqlen_k = t.seqlen_k;
  if (s.max_seqlen_q >= 0) check_max("max_seqlen_q", s.max_seqlen_q, p.max_seqlen_q);
  if (s.max_seqlen_k >= 0) check_max("max_seqlen_k", s.max_seqlen_k, p.max_seqlen_k);
}

}  // namespace flash_attn
