#include "cpu/system.hpp"

#include <unistd.h>

#if FLASH_ATTN_LINUX
#include <sched.h>
#include <sys/mman.h>
#endif

namespace flash_attn::cpu {

int online_cpus() { return static_cast<int>(sysconf(_SC_NPROCESSORS_ONLN)); }

#if FLASH_ATTN_LINUX

int allowed_cpus() {
  cpu_set_t set;
  CPU_ZERO(&set);
  // Of the process, not of the thread that happens to ask first: a host may have pinned that one.
  return sched_getaffinity(getpid(), sizeof set, &set) == 0 ? CPU_COUNT(&set) : online_cpus();
}

void advise_huge_pages(void* begin, std::size_t bytes) { madvise(begin, bytes, MADV_HUGEPAGE); }

#else

int allowed_cpus() { return online_cpus(); }
void advise_huge_pages(void*, std::size_t) {}

#endif

}  // namespace flash_attn::cpu
