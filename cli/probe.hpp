// The machine's own limits: how many floating-point operations, and how many bytes read, an instruction set can reach.
#pragma once

#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

namespace flash_attn::cli {

/// A team of threads for the probes: run(work) calls work(t) on each of them and returns after the last.
class Team {
 public:
  explicit Team(int threads);
  ~Team();
  Team(const Team&) = delete;
  Team& operator=(const Team&) = delete;
  int size() const { return static_cast<int>(threads_.size()) + 1; }
  void run(const std::function<void(int thread)>& work);

 private:
  void serve(int thread);

  std::mutex mutex_;
  std::condition_variable start_, done_;
  const std::function<void(int)>* work_ = nullptr;
  uint64_t round_ = 0;
  int running_ = 0;
  bool stop_ = false;
  std::vector<std::thread> threads_;
};

/// Loops in one instruction set. Both keep enough independent chains in flight to hide all latency.
struct Probe {
  /// Multiply-adds on registers only; returns the floating-point operations done (two per multiply-add).
  double (*multiply_add)(int64_t rounds);
  /// Reads `floats` floats (a multiple of 1024, 64-byte aligned); the result depends on all of them.
  float (*read)(const float* data, int64_t floats);
};

/// For a name of cpu_isas(); an instruction set that has no probe of its own gets the best one below it.
const Probe& probe_for(const std::string& isa);

}  // namespace flash_attn::cli
