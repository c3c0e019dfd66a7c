// New keys join a cache, and are rotated, as the queries are: what a call does before it attends.
#pragma once

#include <memory>

#include "core/overlap.hpp"
#include "core/problem.hpp"
#include "core/row_move.hpp"

namespace flash_attn {

/// Checks the shapes of new keys and tells p.sequences how many join each sequence, before its contents are read.
void read_new_keys(const NewKeys& keys, const Sequences& sequences, Memory& memory, Problem& p);

/// Checks the rotary tables, the positions they must reach, and that no two new keys share a place in the cache. Needs
/// all of p.sequences and the mask. Contents are read on the CPU only.
void read_rotary(const Rotary& rotary, const NewKeys& keys, Memory& memory, Problem& p);

/// Where the first new key and the first query of a sequence stand, and whether later queries stand behind it: without
/// a mask all stand there.
inline int64_t first_position(const Problem& p, int64_t b) {
  return p.append.positions ? p.append.positions[b] : p.sequences.used(b);
}
inline bool queries_advance(const Problem& p) { return !p.scores.mask.trivial(); }

/// The work in blocks of rows, to be done in any order or at once: writes new keys and values into the cache and, if
/// p.append.rotates(), every query of a sequence, rotated, into `q` (as p.q, but for its strides). `move` moves a row.
int64_t append_blocks(const Problem& p);
void append_block(const Problem& p, const Operand& q, int64_t block, MoveRow move);
/// All blocks, one after the other, in plain loops.
void append_all(const Problem& p, const Operand& q);

/// The rotated queries of a Problem of the CPU: memory for them, of q's shape, and the Problem that reads them there.
class RotatedQueries {
 public:
  explicit RotatedQueries(const Problem& p);
  const Operand& operand() const { return q_; }
  /// `p` without its append: what is left to do once all blocks are done.
  Problem attend_after(const Problem& p) const;

 private:
  std::unique_ptr<char[]> memory_;
  Operand q_;
};

}  // namespace flash_attn
