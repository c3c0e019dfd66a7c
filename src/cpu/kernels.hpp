// The seam between meaning and arithmetic.
//
// Drivers (forward.cpp, backward.cpp) are compiled once, for any processor, and do all the thinking: which rows, which
// keys, where they lie. Kernels (kernel/*.hpp) are compiled once per instruction set and see plain numbers only. The
// structs here have no functions, so that no inline code is shared across instruction sets (it would leak: the linker
// keeps one copy).
#pragma once

#include <cstdint>

#include "core/row_move.hpp"
#include "cpu/norm_rows.hpp"
#include "flash_attn/tensor.hpp"

namespace flash_attn::cpu {

inline constexpr double kLog2e = 1.4426950408889634;
inline constexpr double kLn2 = 0.6931471805599453;

/// In base 2. Beyond this the rounding of a base is worth 1 and more: scale s - base, rounded once, may be far above 0.
inline constexpr float kHugeScore = 0x1p24f;

/// Rows of one tensor, each found by its address: strided memory, pages and head groups all look like this.
struct RowList {
  const char* const* row;  // (rows); nullptr: a row of zeros
  int64_t rows;
  int64_t cols;
  int64_t stride_col;  // in elements
  DType dtype;         // f16, bf16 or f32; a bias may be f64
};

/// What dropout does to the rows of a task, as core/dropout.hpp means it.
struct DropoutRow {
  uint32_t row, plane;  // the query's index in its sequence, batch entry * nheads + head
};
struct DropoutTask {
  int32_t threshold;  // draws below it drop; 0: off
  float scale;        // of what is kept
  uint32_t key[2], offset;
  int64_t first_key;       // of the task, in its sequence: a multiple of 8, as one counter gives eight draws
  const DropoutRow* rows;  // (rows)
};

/// The softmax of some rows under way. Their output is o / sum l, their log-sum-exp ln 2 m + ln sum l.
struct SoftmaxSums {
  float* o;  // (rows, headdim_v padded to the width): sum of p . v
  float* m;  // (rows): max of s
  float* l;  // (rows, width): sum of p, by lanes
};

/// Memory that is needed next: `rows` runs of `bytes`, `step` bytes apart. A kernel asks L2 for it between its
/// products, a few lines at a time: rows of a head lie apart, and no prefetcher follows them from page to page.
struct Ahead {
  const char* first;
  int64_t rows, step, bytes;
};

/// One task of the forward: `rows` queries of one key head against its packed keys [0, keys).
///   x = q . k  ->  s = scale x, or cap tanh(scale x / cap)  ->  ALiBi  ->  bias  ->  mask  ->  p = 2^(s - m)  ->
///   dropout
/// All scores are in log2 units. q, k and v are packs of the kernel's own making; q carries ScoreScale::q_factor.
struct AttendTask {
  int64_t rows, headdim, headdim_v;
  const char* q;             // of `rows` rows
  int64_t keys;              // of packs: padded to panels
  const char *k, *v;         // packs of `keys` rows
  const uint8_t* v_special;  // (keys / panel): what pack_v returned; nullptr if all false
  const int64_t *lo, *hi;    // (rows): visible keys
  float scale;               // positive: log2(e) |softmax_scale|
  float softcap_log2;        // cap = softcap * log2(e); 0: off
  const float* slope_log2;   // (rows): ALiBi slope * log2(e); nullptr: off
  const int64_t* position;   // (rows): the key position that the row stands at
  RowList bias;              // (rows, keys that have one), in natural units; row nullptr: off
  DropoutTask dropout;       // of the p that multiply v, not of l; its scale is left to the driver
  float* o;                  // (rows padded to tiles, headdim_v padded to the width): sum of p . v
  float* m;                  // (rows): max of s
  float* l;                  // (rows, width): sum of p, by lanes
  char* scratch;
  const Ahead* ahead;  // (aheads): what the worker will read and write after this task
  int64_t aheads;
};

/// Keys where they lie, for tasks of several key heads that see them: key j of task h is at k.row[j] + h * k_head.
struct KeysInPlace {
  RowList k, v;            // of the first task; columns next to each other
  int64_t k_head, v_head;  // bytes
};

/// The forward in one arithmetic: how rows are packed, and the loop over them. Sizes are in bytes, multiples of 64.
/// A kernel that has attend_in_place packs q only.
///
/// `special` rows hold values that the arithmetic cannot treat one by one: 0 * inf is NaN, so a product over keys that
/// only some rows see must not meet an inf, and a number that is split into parts must be finite.
struct AttendKernel {
  const char* name;   // of the arithmetic
  int64_t panel;      // keys packed at a time, at most kMostPacked
  int64_t tile_rows;  // rows of a score tile
  int64_t tile_keys;  // keys of a score tile
  int64_t scratch;
  int64_t (*q_bytes)(int64_t rows, int64_t headdim);
  int64_t (*k_bytes)(int64_t keys, int64_t headdim);
  int64_t (*v_bytes)(int64_t keys, int64_t headdim_v);

  /// factor * rows -> q. Like the next two, returns whether some row is special.
  bool (*pack_q)(const RowList& rows, float factor, char* q);
  /// One panel of keys (its list has up to `panel` rows) -> keys [first, first + panel) of a pack of `keys`. Beyond the
  /// list, rows up to a whole vector are zeros, and others are not read by attend.
  bool (*pack_k)(const RowList& rows, char* k, int64_t keys, int64_t first);
  bool (*pack_v)(const RowList& rows, char* v, int64_t keys, int64_t first);
  void (*attend)(const AttendTask& task);
  /// `heads` tasks, as many key heads with the same queries. Their k, v and v_special are not read.
  void (*attend_in_place)(const AttendTask* task, int64_t heads, const KeysInPlace& keys);
  /// Whether a head with special rows is left to `Kernels::attend_any` (else the kernel takes v_special into account).
  bool plain_only;
};

/// One task of the backward: `rows` queries of one head against packed keys [0, keys). With x and s as above,
///   p = 2^(s - base),  z = 0 where dropout drops, else its scale,  u = z (dout . v) - delta
///   dv += (z p)^T dout     dbias = p u      dx = p u (times 1 - tanh(scale x / cap)^2 with softcap)
///   dk += dx^T q           dq += dx k
/// The driver multiplies dk and dq by the softmax scale when it writes them, and dk by 1 / q_factor.
struct BackwardTask {
  int64_t rows, headdim, headdim_v;
  const char* queries;         // packs of q and dout, of row_capacity rows
  const char* keys_packed;     // packs of k and v, of `keys` keys
  int64_t row_capacity, keys;  // keys: padded to panels
  const float* base;           // (rows): lse * log2(e); +inf: the row sees nothing
  const float* delta;          // (rows): sum of dout * out, less dlse
  const float* largest;        // (rows): s - base of scores that may be the largest, where base is beyond kHugeScore
  const uint8_t* row_special;  // (rows / tile_rows): what pack_queries returned
  const uint8_t* key_special;  // (keys / panel): what pack_keys returned
  const int64_t *lo, *hi;      // (rows)
  float scale, softcap_log2;   // as above
  const float* slope_log2;
  const int64_t* position;
  RowList bias;
  DropoutTask dropout;
  float* const* dbias;   // (rows): where the gradient of key 0 is; nullptr: not wanted. Visible keys are written,
  int64_t dbias_stride;  // of the keys
  bool dbias_sums;       // or added to: several rows may have one place
  float* dq;             // (rows padded to tiles, headdim padded to the width): added to
  float* dk;             // headdim padded x keys, in the kernel's own layout: added to
  float* dv;             // headdim_v padded x keys: added to
  char* scratch;
  const Ahead* ahead;  // (aheads): as above
  int64_t aheads;
};

/// The backward in one arithmetic. Sizes are in bytes, multiples of 64; `special` is as in AttendKernel.
struct BackwardKernel {
  const char* name;
  int64_t panel;      // keys packed at a time, at most kMostPacked
  int64_t tile_rows;  // rows of a score tile, packed at a time; at most kMostPacked
  int64_t tile_keys;  // keys of a score tile
  int64_t scratch;
  int64_t (*query_bytes)(int64_t rows, int64_t headdim, int64_t headdim_v);
  int64_t (*key_bytes)(int64_t keys, int64_t headdim, int64_t headdim_v);

  /// One tile of factor * q and of dout (lists of up to `tile_rows` rows) -> rows [first, first + tile_rows) of a pack
  /// of `row_capacity`. Like the next, returns whether some row is special.
  bool (*pack_queries)(const RowList& q, const RowList& dout, float factor, char* to, int64_t row_capacity,
                       int64_t first);
  /// One panel of k and v (lists of up to `panel` rows) -> keys [first, first + panel) of a pack of `keys`.
  bool (*pack_keys)(const RowList& k, const RowList& v, char* to, int64_t keys, int64_t first);
  void (*backward)(const BackwardTask& task);
  /// dk or dv in the kernel's layout -> (keys, cols padded to the width). nullptr: it is that.
  void (*sum_rows)(const float* sums, int64_t keys, int64_t cols, float* rows);
  /// Whether special rows are left to `Kernels::backward_any` (else the kernel takes row_special and key_special into
  /// account).
  bool plain_only;
};

/// More rows than these are better served by packing their keys. So are rows of fewer keys: there packing costs nothing
/// that counts, and the backward, which packs, should meet the very scores that its lse is made of (a lone key's p is
/// then 1 to the last digit).
inline constexpr int64_t kInPlaceRows = 16, kInPlaceKeys = 64;

struct Kernels {
  const char* name;
  int64_t width;  // floats in a vector
  // By the dtype of q, k and v; `any` takes special rows.
  const AttendKernel *attend_f32, *attend_bf16, *attend_f16, *attend_any;
  const AttendKernel* attend_in_place;  // of any dtype, for few rows, headdims of whole pairs of vectors
  const BackwardKernel *backward_f32, *backward_bf16, *backward_f16, *backward_any;

  /// row[r][c] = factor[r] * src[r][c], rounded once to dtype. The rows of the list are written.
  void (*store_rows)(const RowList& rows, const float* factor, const float* src, int64_t ld);
  /// dots[r] = sum over columns of row r of x times row r of y.
  void (*dot_rows)(const RowList& x, const RowList& y, float* dots);
  /// Adds the sums of the same rows over other keys (Milakov & Gimelshein 2018, eq. 4).
  void (*merge_rows)(int64_t rows, int64_t headdim_v, const SoftmaxSums& from, const SoftmaxSums& to);
  /// The end of the forward's softmax: factor (rows) = 1 / sum l, lse (rows) = ln 2 m + ln sum l; 0 and -inf where l is
  /// 0.
  void (*finish_rows)(int64_t rows, const float* m, const float* l, float* factor, float* lse);
  /// As core/row_move.hpp means it, for rows of f16, bf16 or f32.
  MoveRow move_row;
  void (*norm_rows)(const NormRows& task);
  void (*norm_gradient_rows)(const NormGradientRows& task);
  /// row (cols), plus `add`, in fp32 -> to (cols padded to the width).
  void (*read_row)(const Rows& row, int64_t cols, float add, float* to);
  /// Columns [0, cols) of the sum of `parts` rows of `ld` floats, in their order -> to, rounded once. `rows` may be
  /// read up to a whole vector.
  void (*sum_parts)(const float* rows, int64_t parts, int64_t ld, int64_t cols, const Rows& to);
};

}  // namespace flash_attn::cpu
