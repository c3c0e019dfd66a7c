// Additive biases of the CPU kernels: every shape and dtype, what hides a row, what is NaN, and the end of memory.
#include <gtest/gtest.h>
#include <sys/mman.h>
#include <unistd.h>

#include <limits>

#include "core/problem.hpp"
#include "cpu/against_oracle.hpp"
#include "cpu/driver.hpp"
#include "cpu/kernels_under_test.hpp"
#include "cpu/plan.hpp"
#include "support/attention_case.hpp"
#include "support/compare.hpp"

namespace flash_attn::test {
namespace {

const Dims kDims{2, 70, 150, 4, 2, 24, 20};

void expect_as_oracle(AttentionCase got, const cpu::Kernels& kernels, double atol) {
  const AttentionCase want = by_oracle(got);
  expect_as_oracle(got, want, kernels, atol, 4 * atol);
  EXPECT_TRUE(close(got.dbias, want.dbias, 40 * atol, atol));
  EXPECT_TRUE(got.dbias.gaps_untouched());
}

TEST(CpuBias, EveryBroadcastAndDtype) {
  for (const cpu::Kernels* kernels : kernels_under_test()) {
    for (int broadcast = 0; broadcast < 8; ++broadcast) {
      for (const DType dtype : {DType::f32, DType::bf16, DType::f16, DType::f64}) {
        for (const double softcap : {0.0, 5.0}) {
          SCOPED_TRACE(std::string(kernels->name) + ", broadcast " + std::to_string(broadcast));
          const Shape shape{broadcast & 1 ? 1 : 2, broadcast & 2 ? 1 : 4, broadcast & 4 ? 1 : 70, 150};
          AttentionCase c = AttentionCase::fixed(DType::f32, kDims);
          c.bias = HostTensor::normal(dtype, shape, 5);
          c.scores.causal = true, c.scores.softcap = softcap;
          expect_as_oracle(c, *kernels, 2e-5);
        }
      }
    }
  }
}

/// Several splits of the keys, some of which a row or a whole sequence has nothing of.
TEST(CpuBias, SplitsOfKeys) {
  for (const cpu::Kernels* kernels : kernels_under_test()) {
    for (const bool sums : {false, true}) {
      SCOPED_TRACE(kernels->name);
      AttentionCase c = AttentionCase::packed(DType::f32, {40, 3, 25}, {1100, 20, 300}, {3, 40, 1100, 2, 1, 16, 16});
      c.scores.window_left = 400, c.scores.window_right = 30;
      c.bias = HostTensor::normal(DType::f32, {sums ? 1 : 3, 2, 40, 1100}, 5, 1.0, {{0, 2, 1, 3}, 1, 5});
      const Problem p = make_problem(c.backward_call());
      ASSERT_GT(cpu::make_backward_plan(p, *kernels, cpu::backward_kernel(*kernels, p.dtype), 1).splits, 2);
      expect_as_oracle(c, *kernels, 2e-5);
    }
  }
}

/// Few rows split their keys in the forward too: what is added and what is dropped counts from the sequence's key 0.
TEST(CpuBias, FewRows) {
  for (const cpu::Kernels* kernels : kernels_under_test()) {
    for (const DType dtype : {DType::f32, DType::bf16, DType::f16}) {
      for (const double dropout : {0.0, 0.2}) {
        SCOPED_TRACE(kernels->name);
        AttentionCase c = AttentionCase::fixed(dtype, {1, 3, 3000, 4, 2, 24, 20});
        c.bias = HostTensor::normal(DType::f32, {1, 4, 3, 3000}, 5);
        for (int j = 0; j < 2900; ++j) c.bias.put(-INFINITY, 0, 1, 2, j);  // nothing of the first splits
        for (int j = 0; j < 3000; ++j) c.bias.put(-INFINITY, 0, 2, 1, j);  // nothing at all
        c.dropout = {.p = dropout, .seed = 5, .offset = 6};
        const Problem p = make_problem(c.forward_call());
        ASSERT_GT(cpu::make_plan(p, cpu::attend_kernel(*kernels, p), kernels->width, 1).splits, 2);
        expect_as_oracle(c, *kernels, dtype == DType::f32 ? 2e-5 : dtype == DType::bf16 ? 8e-3 : 1e-3);
      }
    }
  }
}

/// Rows and keys of the bias that no sequence has are not read, and their gradient is 0.
TEST(CpuBias, LargerThanItsSequences) {
  for (const cpu::Kernels* kernels : kernels_under_test()) {
    SCOPED_TRACE(kernels->name);
    AttentionCase c = AttentionCase::packed(DType::f32, {30, 0, 17}, {40, 20, 33}, {3, 30, 40, 2, 2, 16, 16});
    c.bias = HostTensor::full(DType::f32, {3, 2, 30, 40}, NAN, {{0, 3, 1, 2}, 1, 0});
    const int64_t rows[] = {30, 0, 17}, keys[] = {40, 20, 33};
    for (int b = 0; b < 3; ++b)
      for (int h = 0; h < 2; ++h)
        for (int i = 0; i < rows[b]; ++i)
          for (int j = 0; j < keys[b]; ++j) c.bias.put(0.1 * ((i * 7 + j * 5 + h) % 11), b, h, i, j);
    expect_as_oracle(c, *kernels, 2e-5);
  }
}

/// Without sequences, gradients that have elements all the same are 0.
TEST(CpuBias, NoSequences) {
  for (const cpu::Kernels* kernels : kernels_under_test()) {
    SCOPED_TRACE(kernels->name);
    AttentionCase c = AttentionCase::fixed(DType::f32, {0, 30, 40, 2, 2, 16, 16});
    c.bias = HostTensor::normal(DType::f32, {1, 2, 30, 40}, 5);
    c.sink = HostTensor::normal(DType::f32, {2}, 6);
    expect_as_oracle(c, *kernels, 2e-5);
  }
}

/// -inf hides a key; rows of nothing else see nothing, and leave no gradient whatever comes for them.
TEST(CpuBias, MinusInfinityHides) {
  for (const cpu::Kernels* kernels : kernels_under_test()) {
    for (const bool with_sink : {false, true}) {
      SCOPED_TRACE(kernels->name);
      AttentionCase c = AttentionCase::fixed(DType::f32, kDims);
      c.bias = HostTensor::normal(DType::f32, {1, 4, 70, 150}, 5);
      for (int j = 0; j < 150; ++j) {
        c.bias.put(-INFINITY, 0, 1, 3, j);
        for (int i = 0; i < 70 && j % 3 == 0; ++i) c.bias.put(-INFINITY, 0, 2, i, j);
      }
      if (with_sink)
        c.sink = HostTensor::normal(DType::f32, {4}, 6);
      else
        c.dout.put(NAN, 0, 3, 1, 5), c.dlse.put(INFINITY, 1, 1, 3);
      expect_as_oracle(c, *kernels, 2e-5);
    }
  }
}

TEST(CpuBias, NanAndInfinityReachTheirRows) {
  for (const cpu::Kernels* kernels : kernels_under_test()) {
    for (const DType dtype : {DType::f32, DType::bf16, DType::f16}) {
      for (const double value : {static_cast<double>(NAN), static_cast<double>(INFINITY)}) {
        SCOPED_TRACE(std::string(kernels->name) + ", " + std::to_string(value));
        AttentionCase c = AttentionCase::fixed(dtype, kDims);
        c.scores.causal = true;
        c.bias = HostTensor::normal(DType::f32, {2, 4, 70, 150}, 5);
        c.bias.put(value, 1, 2, 30, 5);    // seen
        c.bias.put(value, 0, 1, 30, 149);  // not seen
        expect_as_oracle(c, *kernels, dtype == DType::f32 ? 2e-5 : dtype == DType::bf16 ? 8e-3 : 1e-3);
      }
    }
  }
}

/// Keys hidden by a large finite number have no weight. Where a whole row has it, all its keys weigh the same, in the
/// backward, too, whether a gradient comes to the row or none: no number is so low that it hides a row.
TEST(CpuBias, LargeFiniteNumbers) {
  for (const cpu::Kernels* kernels : kernels_under_test()) {
    for (const double low : {-1e9, -7e10, -static_cast<double>(std::numeric_limits<float>::max()), -1e300}) {
      SCOPED_TRACE(std::string(kernels->name) + ", " + std::to_string(low));
      AttentionCase c = AttentionCase::fixed(DType::f32, kDims);
      c.bias = HostTensor::normal(DType::f64, {2, 1, 70, 150}, 5);
      for (int j = 0; j < 150; ++j) {
        c.bias.put(low, 0, 0, 3, j);
        for (int i = 0; i < 70 && j % 3 == 0; ++i) c.bias.put(low, 1, 0, i, j);
      }
      c.dlse = HostTensor();
      for (int h = 0; h < 4; ++h)
        for (int d = 0; d < 24; ++d) c.q.put(0.0, 0, 3, h, d);
      for (int h = 0; h < 2; ++h)
        for (int d = 0; d < 20; ++d) c.dout.put(0.0, 0, 3, h, d);  // as of a row that nobody reads
      c.run.backend = "reference";
      forward(c.forward_call());
      const HostTensor want = c.out;
      cpu::forward(make_problem(c.forward_call()), *kernels);
      EXPECT_TRUE(close(c.out, want, 2e-5, 2e-5));
      AttentionCase exact = c;
      backward(exact.backward_call());
      cpu::backward(make_problem(c.backward_call()), *kernels);
      EXPECT_TRUE(close(c.dq, exact.dq, 8e-5, 2e-5));
      EXPECT_TRUE(close(c.dk, exact.dk, 8e-5, 2e-5));
      EXPECT_TRUE(close(c.dv, exact.dv, 8e-5, 2e-5));
      EXPECT_TRUE(close(c.dbias, exact.dbias, 8e-4, 2e-5));
    }
  }
}

TEST(CpuBias, NothingBeyondItsEndIsRead) {
  const auto page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
  char* const memory =
      static_cast<char*>(mmap(nullptr, 2 * page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
  ASSERT_NE(memory, MAP_FAILED);
  ASSERT_EQ(mprotect(memory + page, page, PROT_NONE), 0);  // reading or writing here ends the test
  for (const cpu::Kernels* kernels : kernels_under_test()) {
    for (const DType dtype : {DType::f32, DType::bf16, DType::f16, DType::f64}) {
      for (const int64_t keys : {1, 7, 31, 64, 65, 200}) {
        AttentionCase c = AttentionCase::fixed(DType::bf16, {1, 3, keys, 1, 1, 16, 16});
        c.bias = HostTensor::full(dtype, {1, 1, 1, keys}, 0.0);
        Forward forward_call = c.forward_call();
        Backward backward_call = c.backward_call();
        backward_call.scores.bias.data = forward_call.scores.bias.data =
            memory + page - static_cast<std::size_t>(keys) * size_of(dtype);
        cpu::forward(make_problem(forward_call), *kernels);
        cpu::backward(make_problem(backward_call), *kernels);
        if (dtype != DType::f32) continue;
        // The gradient at the end of memory, and the bias where it was.
        backward_call.dbias.data = backward_call.scores.bias.data;
        backward_call.scores.bias = c.bias.tensor();
        cpu::backward(make_problem(backward_call), *kernels);
      }
    }
  }
  munmap(memory, 2 * page);
}

}  // namespace
}  // namespace flash_attn::test
