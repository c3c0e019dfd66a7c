#include "cpu/isa.hpp"

#include <cstdlib>

#include "cpu/system.hpp"
#include "flash_attn/flash_attn.hpp"

#if defined(__x86_64__)
#include <cpuid.h>
#if FLASH_ATTN_LINUX
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace flash_attn {
namespace cpu {

#if defined(__x86_64__)
namespace amx {
extern const AttendKernel attend_bf16, attend_f16;
extern const BackwardKernel backward_bf16, backward_f16;
}  // namespace amx
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

#if defined(__x86_64__)
/// By its bit: clang 14 does not know the name. Whether the system saves the registers is what "avx2" asks.
static bool has_f16c() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid(1, &a, &b, &c, &d) && (c >> 29 & 1);
}

/// AMX: the processor has tiles of bf16, and the system lets this process use them (Linux asks to be asked).
static bool amx_runs() {
#if FLASH_ATTN_LINUX
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  const bool amx_bf16 = d >> 22 & 1, amx_tile = d >> 24 & 1;
  if (!amx_bf16 || !amx_tile || !__get_cpuid_count(7, 1, &a, &b, &c, &d) || !(a >> 5 & 1)) return false;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

/// AVX-512 with 16-bit numbers on tiles.
static const Kernels* amx_kernels() {
  static const Kernels kernels = [] {
    Kernels k = avx512::kernels;
    k.name = "amx";
    k.attend_bf16 = &amx::attend_bf16, k.attend_f16 = &amx::attend_f16;
    k.backward_bf16 = &amx::backward_bf16, k.backward_f16 = &amx::backward_f16;
    return k;
  }();
  return &kernels;
}
#endif

std::vector<const Kernels*> usable_kernels() {
  std::vector<const Kernels*> all;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2_runs = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
  const bool avx512_runs = avx2_runs && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx512_runs && amx_runs()) all.push_back(amx_kernels());
  if (avx512_runs) all.push_back(&avx512::kernels);
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
