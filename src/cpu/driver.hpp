// The two passes, as the backend calls them.
#pragma once

#include <memory>

#include "core/problem.hpp"
#include "cpu/kernels.hpp"

namespace flash_attn::cpu {

/// The kernels for a problem: by its dtype, and where few rows make packing a waste, the one that reads keys in place.
const AttendKernel& attend_kernel(const Kernels& kernels, const Problem& problem);
const BackwardKernel& backward_kernel(const Kernels& kernels, DType dtype);

/// A forward in two steps. The constructor reserves all workspace, or throws out_of_memory; nothing is read or written.
/// Keys may join the cache in between, and queries be rotated into problem.q: should memory run out, the cache is as it
/// was.
class ForwardRun {
 public:
  /// `problem` is copied; `kernels` must outlive the object.
  ForwardRun(const Problem& problem, const Kernels& kernels);
  ~ForwardRun();
  ForwardRun(const ForwardRun&) = delete;
  ForwardRun& operator=(const ForwardRun&) = delete;

  /// Writes out and lse. Once.
  void attend();

 private:
  struct Memory;
  std::unique_ptr<Memory> memory_;
};

/// Both steps.
void forward(const Problem& problem, const Kernels& kernels);
void backward(const Problem& problem, const Kernels& kernels);

}  // namespace flash_attn::cpu
