// What a call must do at least, on any machine: operations and bytes, counted from the Problem.
#pragma once

#include <string>

#include "core/problem.hpp"

namespace flash_attn {

struct Work {
  double flops = 0;    // of the products: 2 (d + dv) a visible pair of query and key; backward 2 (3 d + 2 dv)
  double bytes = 0;    // every input element that is needed read once, every result written once
  bool bound = false;  // lengths lie on a device, where nobody has read them: at most so much
};

Work count_work(const Problem& problem);

/// "2.15 GFLOP, 8.39 MB: 256 FLOP a byte"; with "at most " before it if it is a bound.
std::string describe(const Work& work);

}  // namespace flash_attn
