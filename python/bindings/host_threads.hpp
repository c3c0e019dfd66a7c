// Runs the kernels on torch's own OpenMP threads, without linking any OpenMP.
//
// After a parallel region libgomp's workers spin for milliseconds. Our own pool beside them would fight for the same
// cores whenever attention follows a matrix product, that is, always (measured: -15 % on two cores). So the runtime
// that torch has loaded is looked up, and asked to run our tasks through its stable entry points.
#pragma once

namespace flash_attn::python {

/// At import: adopts the OpenMP runtime of this process, if there is one. Otherwise the library's own pool serves.
void adopt_host_threads();
/// Before a call: torch.set_num_threads counts, unless set_num_threads or FLASH_ATTENTION_NUM_THREADS decided.
void follow_host_threads();
/// flash_attn.set_num_threads: n <= 0 goes back to following.
void choose_num_threads(int n);

}  // namespace flash_attn::python
