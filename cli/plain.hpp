// The yardstick: attention in the plain arithmetic of the input's dtype, as a few lines of PyTorch would compute it.
#pragma once

#include <memory>
#include <string>

#include "core/backend.hpp"

namespace flash_attn::cli {

/// How the gradient gets at the probabilities.
enum class Recall {
  kept,        // as autograd does: those of the forward
  recomputed,  // from lse, and the row sums of dP * P from dout and out: all that our Backward call is given
};

/// A backend chosen by name only. Scores, softmax and sums are fp32, in the order of the loops; for 16-bit inputs the
/// matrices P, dP and dS are rounded to the input's dtype before the matrix products that read or follow them, as
/// 16-bit tensors are.
std::unique_ptr<Backend> make_plain_backend(const std::string& name, Recall recall);

}  // namespace flash_attn::cli
