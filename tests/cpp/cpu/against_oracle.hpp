// The kernels of one instruction set against the oracle, in both passes.
#pragma once

#include "core/problem.hpp"
#include "cpu/driver.hpp"
#include "support/attention_case.hpp"
#include "support/compare.hpp"

namespace flash_attn::test {

/// The call with the oracle's results.
inline AttentionCase by_oracle(AttentionCase call) {
  call.run.backend = "reference";
  forward(call.forward_call());
  backward(call.backward_call());
  return call;
}

/// out and lse, then the gradients from the oracle's out and lse; `got` may be asked for more of them afterwards.
inline void expect_as_oracle(AttentionCase& got, const AttentionCase& want, const cpu::Kernels& kernels, double atol,
                             double gradient_atol) {
  cpu::forward(make_problem(got.forward_call()), kernels);
  EXPECT_TRUE(close(got.out, want.out, atol, atol));
  EXPECT_TRUE(close(got.lse, want.lse, 1e-5, 1e-6));
  got.out = want.out, got.lse = want.lse;
  cpu::backward(make_problem(got.backward_call()), kernels);
  EXPECT_TRUE(close(got.dq, want.dq, gradient_atol, atol));
  EXPECT_TRUE(close(got.dk, want.dk, gradient_atol, atol));
  EXPECT_TRUE(close(got.dv, want.dv, gradient_atol, atol));
}

}  // namespace flash_attn::test
