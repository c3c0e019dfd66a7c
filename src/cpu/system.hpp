// What Linux tells and takes, and what stands for it on other systems. FLASH_ATTN_PORTABLE builds the latter on Linux
// too, for tests.
#pragma once

#include <cstddef>

#if defined(__linux__) && !defined(FLASH_ATTN_PORTABLE)
#define FLASH_ATTN_LINUX 1
#else
#define FLASH_ATTN_LINUX 0
#endif

namespace flash_attn::cpu {

/// CPUs that are switched on.
int online_cpus();

/// Those of them that this process may use; without a way to know, all.
int allowed_cpus();

/// Advice only: memory of 2 MiB pages has fewer page faults and TLB misses. Nothing where it cannot be given.
void advise_huge_pages(void* begin, std::size_t bytes);

}  // namespace flash_attn::cpu
