// A cell of bench limit: a call of the library, measured in turns with a probe of the machine's limit.
#pragma once

#include <fmt/format.h>

#include <cstdint>
#include <string>

#include "dtype.hpp"

namespace flash_attn::cli {

struct Cell {
  std::string name;  // forward, backward, decode
  DType dtype;
  int64_t nheads, nheads_k, seqlen_q, seqlen_k, headdim;
  bool causal;
  int threads;

  std::string heads() const { return fmt::format("{}:{}", nheads, nheads_k); }
  std::string title() const {
    return fmt::format("{} {} headdim {} {} {} thread{}, heads {}", name, short_name(dtype), headdim,
                       causal ? "causal" : "full", threads, threads == 1 ? "" : "s", heads());
  }
  double flops() const {
    const double products = name == "backward" ? 10.0 : 4.0;
    return products * static_cast<double>(nheads * seqlen_q) * static_cast<double>(seqlen_k * headdim) *
           (causal ? 0.5 : 1.0);
  }
  double bytes() const {
    return 2.0 * static_cast<double>(nheads_k * seqlen_k * headdim) * static_cast<double>(size_of(dtype));
  }
};

struct Result {
  Cell cell;
  double seconds, rate, probe_rate;  // rate: operations, for decode bytes, per second
  int samples;
  double of_peak() const { return rate / probe_rate; }
};

/// For at least `budget` seconds.
Result measure(const Cell& cell, double budget);

}  // namespace flash_attn::cli
