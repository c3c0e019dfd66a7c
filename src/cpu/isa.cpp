#include "cpu/isa.hpp"

#include <cstdlib>

#include "flash_attn/flash_attn.hpp"

namespace flash_attn {
namespace cpu {

#if defined(__x86_64__)
namespace avx512 {
extern const Kernels kernels;
}
namespace avx2 {
extern const Kernels kernels;
}
namespace baseline {
extern const Kernels kernels;
}
#elif defined(__aarch64__)
namespace neon {
extern const Kernels kernels;
}
#else
namespace baseline {
extern const Kernels kernels;
}
#endif

std::vector<const Kernels*> usable_kernels() {
  std::vector<const Kernels*> all;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2_runs =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (avx2_runs && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    all.push_back(&avx512::kernels);
  if (avx2_runs) all.push_back(&avx2::kernels);
  all.push_back(&baseline::kernels);
#elif defined(__aarch64__)
  all.push_back(&neon::kernels);
#else
  all.push_back(&baseline::kernels);
#endif
  return all;
}

static const Kernels* choose_kernels() {
  const auto all = usable_kernels();
  const char* wanted = std::getenv("FLASH_ATTENTION_CPU_ISA");
  if (!wanted || !*wanted) return all.front();
  std::string names;
  for (const Kernels* k : all) {
    if (std::string(wanted) == k->name) return k;
    names += (names.empty() ? "" : ", ") + std::string(k->name);
  }
  throw Error(ErrorCode::invalid_argument,
              "FLASH_ATTENTION_CPU_ISA: expected one of " + names + " on this processor, got \"" + wanted + "\"");
}

const Kernels& active_kernels() {
  static const Kernels* const chosen = choose_kernels();  // a throw leaves it unset: the next call tries again
  return *chosen;
}

}  // namespace cpu

std::string cpu_isa() { return cpu::active_kernels().name; }

std::vector<std::string> cpu_isas() {
  std::vector<std::string> names;
  for (const cpu::Kernels* k : cpu::usable_kernels()) names.emplace_back(k->name);
  return names;
}

}  // namespace flash_attn
