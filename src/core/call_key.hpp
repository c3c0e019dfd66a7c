// The key of a call on a device: all that the work of an engine may follow from, but for addresses.
//
// Tables on a device are never read by the host, so what an engine launches is a function of dtypes, shapes, strides,
// the alignment of addresses, and numbers. Calls of one key launch the same kernels on other memory (recordings.hpp).
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

#include "flash_attn/flash_attn.hpp"

namespace flash_attn {

// clang-format off
/// The tensors of a call, forward or backward.
enum class Role : uint8_t {
  q, k, v, out, lse, dout, dq, dk, dv, dlse, dbias, dsink,
  cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, leftpad_k, cache_batch_idx, block_table,
  alibi_slopes, bias, sink, dropout_state,
  new_k, new_v, cu_seqlens_new, rotary_cos, rotary_sin, rotary_positions,
  count,
};
// clang-format on

inline constexpr std::size_t kRoles = static_cast<std::size_t>(Role::count);

/// The names of `Role`, in its order; engines know the tensors by them.
extern const std::array<std::string_view, kRoles> kRoleNames;

struct CallKey {
  std::string bytes;
  std::array<const void*, kRoles> addresses{};  // by Role; nullptr: absent
};

/// Of a call that make_problem has checked. Calls have one key as long as no backend comes or goes.
CallKey key_of(const Forward& call);
CallKey key_of(const Backward& call);

}  // namespace flash_attn
