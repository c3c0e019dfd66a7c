// parallel_for over a small pool of our own (a second OpenMP runtime beside torch's is a known trap).
#pragma once

#include <cstdint>
#include <functional>

namespace flash_attn::cpu {

/// Which tasks are started first.
enum class Order {
  rising,   ///< task i before task i + 1, whoever takes it: for tasks sorted by weight
  by_place  ///< every worker begins with neighbours: tasks 0 .. n / workers - 1 for worker 0, and so on
};

/// Runs task(i, worker) for i in [0, n), worker in [0, workers). No worker runs two at once. Returns after the last;
/// the first exception is rethrown. One task, or one worker: inline, nothing is woken. Fewer tasks
/// than workers: as many workers as tasks.
void parallel_for(int64_t n, int workers, const std::function<void(int64_t i, int worker)>& task,
                  Order order = Order::rising);
/// The number of workers to ask for.
int max_workers();

}  // namespace flash_attn::cpu
