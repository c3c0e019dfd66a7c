// The forward where a key head has many rows: waves of heads are packed, then tasks attend to them (plan.hpp).
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/arena.hpp"
#include "cpu/attend_rows.hpp"

namespace flash_attn::cpu {

/// Some heads of a forward. All memory but lists of tasks is taken by the constructor.
class ManyRows {
 public:
  /// A worker's memory.
  struct Worker {
    Worker(Arena& arena, const Plan& plan, const AttendKernel& kernel);
    SoftmaxSums sums;
    AttendRows rows;
  };
  /// The packs of a wave.
  static std::vector<Pack> take_packs(Arena& arena, const Plan& plan, const AttendKernel& kernel);

  ManyRows(const ForwardPass& pass, std::vector<Head> heads, Arena& arena);
  /// Returns the indices of the heads that the kernel cannot treat.
  std::vector<int64_t> attend();

 private:
  void pack(const std::vector<Head>& wave, RedoMarks& redo);
  void attend_wave(const std::vector<Head>& wave, RedoMarks& redo);

  const ForwardPass& pass_;
  std::vector<Head> heads_;
  std::vector<Pack> packs_;
  std::vector<Worker> workers_;
};

}  // namespace flash_attn::cpu
