// From the public Sequences to the checked SequenceTable.
#pragma once

#include "core/overlap.hpp"
#include "core/problem.hpp"

namespace flash_attn {

/// Decides the layout by which of `s` is present, checks the ranks and shapes of q, k, v, all of `s` and the keys that
/// join, and fills the dimensions of `p` (batch, nheads, headdim, rows, lengths) and p.sequences. Contents are read on
/// the CPU only.
void read_sequences(const Tensor& q, const Tensor& k, const Tensor& v, const Sequences& s, const NewKeys& new_keys,
                    Memory& memory, Problem& p);

/// Sequence b for any content of the tables: where these are well formed, `SequenceTable::at(b)`; else what a kernel on
/// a device makes of them. All rows lie inside the tensors. Pages are clamped where they are looked up, to [0,
/// num_blocks), positions of rotary embedding to [0, rows of cos). The kernels mirror this function.
Sequence clamped(const Problem& p, int64_t b);

/// A (batch) or (batch + 1) tensor of int32, checked; nullptr if it is absent.
const int32_t* read_table(const char* argument, const Tensor& t, const char* layout, const char* meaning,
                          int64_t entries, Memory& memory);

}  // namespace flash_attn
