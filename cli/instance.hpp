// A Case made concrete: memory and values for every tensor of its calls, in a dtype of choice.
#pragma once

#include <deque>
#include <map>
#include <string>
#include <vector>

#include "cases.hpp"
#include "core/problem.hpp"
#include "flash_attn/flash_attn.hpp"

namespace flash_attn::cli {

/// Floating values of a Case's inputs, by the tensor's name, in logical order; already rounded to the case's dtype,
/// so that the oracle in fp64 and a backend in 16 bits see the same numbers.
using Values = std::map<std::string, std::vector<double>>;
Values draw_values(const Case& c, DType dtype, uint64_t seed);

class Instance {
 public:
  Instance(const Case& c, DType dtype, const Values& values);
  Instance(const Instance&) = delete;
  Instance& operator=(const Instance&) = delete;

  Forward forward(const std::string& backend) const;
  Backward backward(const std::string& backend) const;

  /// Sets every byte of the results to 0xFF (a NaN): what a backend forgets to write shows.
  void spoil(Pass pass);
  /// Names of the results of a pass: out, lse; or dq, dk, dv, dbias, dsink, as far as the case has them.
  std::vector<std::string> results(Pass pass) const;
  /// The values of a tensor, in logical order.
  std::vector<double> read(const std::string& name) const;

 private:
  Tensor add(const std::string& name, DType dtype, std::vector<int64_t> shape, bool heads_first = false);
  void add_numbers(Tensor& t, const std::vector<int32_t>& values, int64_t cols = 0);

  const Case& case_;
  std::map<std::string, Tensor> tensors_;
  std::map<std::string, std::vector<unsigned char>> memory_;
  std::deque<std::vector<int32_t>> numbers_;
  Sequences sequences_{};
  Scores scores_{};
};

}  // namespace flash_attn::cli
