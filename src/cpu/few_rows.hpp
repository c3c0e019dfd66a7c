// The forward where all rows of a key head fit one task: a task owns its keys (plan.hpp).
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/arena.hpp"
#include "cpu/rows.hpp"

namespace flash_attn::cpu {

/// Returns the indices of the heads that the kernel leaves. Heads of a sequence are neighbours.
std::vector<int64_t> attend_few_rows(const Forward& f, const std::vector<Head>& heads, int workers, Arena& arena);

}  // namespace flash_attn::cpu
