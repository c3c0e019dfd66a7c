// Whole multiples, and the most keys or rows that a kernel packs at a time.
#pragma once

#include <cstdint>

namespace flash_attn::cpu {

constexpr int64_t divide_up(int64_t n, int64_t by) { return (n + by - 1) / by; }
constexpr int64_t round_up(int64_t n, int64_t to) { return divide_up(n, to) * to; }

/// AttendKernel::panel, BackwardKernel::panel and BackwardKernel::tile_rows are no larger.
inline constexpr int64_t kMostPacked = 64;

}  // namespace flash_attn::cpu
