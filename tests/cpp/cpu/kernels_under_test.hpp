// Every kernel that can run here: those of each instruction set, and AMX on emulated tiles where there is AVX-512.
#pragma once

#include <string_view>
#include <vector>

#include "cpu/isa.hpp"

namespace flash_attn::test {

#if defined(__x86_64__)
extern const cpu::AttendKernel emulated_bf16, emulated_f16;
extern const cpu::BackwardKernel emulated_backward_bf16, emulated_backward_f16;
#endif

inline std::vector<const cpu::Kernels*> kernels_under_test() {
  std::vector<const cpu::Kernels*> all = cpu::usable_kernels();
#if defined(__x86_64__)
  for (const cpu::Kernels* k : all) {
    if (std::string_view(k->name) != "avx512") continue;
    static const cpu::Kernels emulated = [k] {
      cpu::Kernels copy = *k;
      copy.name = "emulated_amx";
      copy.attend_bf16 = &emulated_bf16, copy.attend_f16 = &emulated_f16;
      copy.backward_bf16 = &emulated_backward_bf16, copy.backward_f16 = &emulated_backward_f16;
      return copy;
    }();
    all.push_back(&emulated);
    break;
  }
#endif
  return all;
}

}  // namespace flash_attn::test
