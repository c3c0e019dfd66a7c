// verify's judgement: the results of a backend beside the oracle's and beside those of plain arithmetic.
//
// The oracle computes in fp64 on the same numbers. The bound of each result x is
//
//   orders * max(error of the plain arithmetic, u max|x|) + 2^-24 * largest term
//
// plain:   plain.cpp's arithmetic; the larger error of its two ways to get at the probabilities of the backward.
// u:       the unit roundoff of the result's dtype: the error of writing the exact value down.
// orders:  1 for 16-bit results. 2 for fp32 ones: there both are fp32 sums in different orders, two draws from one
//          distribution, and the larger of two such draws is ours half of the time.
// term:    one fp32 rounding of the largest term that the sums can have, for results whose exact value cancels to 0.
#pragma once

#include <string>
#include <vector>

#include "cases.hpp"
#include "core/backend.hpp"
#include "flash_attn/tensor.hpp"

namespace flash_attn::cli {

constexpr const char* kOracle = "reference";

struct Judged {
  std::string result;  // "out", "dq", ...
  double error, plain, bound;
};

struct Outcome {
  std::string feature, backend;
  DType dtype;
  Pass pass;
  std::string refused, failed;  // empty: neither
  std::vector<Judged> judged;
};

/// While one lives, the plain arithmetic is registered as two backends.
class Judge {
 public:
  explicit Judge(std::vector<std::string> backend_names);
  ~Judge();
  Judge(const Judge&) = delete;
  Judge& operator=(const Judge&) = delete;

  /// Runs one case through the oracle, the plain arithmetic and every backend.
  void take(const Case& c, DType dtype, uint64_t seed);
  const std::vector<Outcome>& outcomes() const { return outcomes_; }

 private:
  std::vector<std::string> backends_;
  std::vector<Outcome> outcomes_;
};

}  // namespace flash_attn::cli
