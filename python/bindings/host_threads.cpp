#include "host_threads.hpp"

#include <dlfcn.h>
#include <unistd.h>

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <string>

#include "cpu/system.hpp"
#include "flash_attn/flash_attn.hpp"

#if FLASH_ATTN_LINUX
#include <link.h>
#elif defined(__APPLE__)
#include <mach-o/dyld.h>
#endif

namespace flash_attn::python {
namespace {

/// The entry points that gcc's generated code calls; libomp and libiomp5 export them too.
struct OpenMp {
  void (*parallel)(void (*body)(void*), void* data, unsigned threads, unsigned flags) = nullptr;
  int (*max_threads)() = nullptr;
  int (*thread_num)() = nullptr;
  int (*team_size)() = nullptr;
  int (*in_parallel)() = nullptr;

  bool complete() const { return parallel && max_threads && thread_num && team_size && in_parallel; }
};

OpenMp openmp;
int threads_at_import = 0;        // torch's
int default_threads = 0;          // ours
std::atomic<int> followed{0};     // the number of torch's that was taken over last
std::atomic<bool> chosen{false};  // somebody said how many threads: torch is not followed

/// Takes the path of a loaded library if it is an OpenMP runtime; torch's own is preferred where another package
/// brought a second one.
void take_runtime(const std::string& path, std::string& best) {
  const std::string name = path.substr(path.rfind('/') + 1);
  for (const char* runtime : {"libgomp", "libomp", "libiomp5"}) {
    if (name.rfind(runtime, 0) != 0) continue;
    if (best.empty() || path.find("/torch") != std::string::npos) best = path;
  }
}

/// The path of the OpenMP runtime in this process; empty: there is none, or the system does not tell.
std::string loaded_runtime() {
  std::string best;
#if FLASH_ATTN_LINUX
  dl_iterate_phdr(
      [](dl_phdr_info* info, std::size_t, void* found) {
        take_runtime(info->dlpi_name ? info->dlpi_name : "", *static_cast<std::string*>(found));
        return 0;
      },
      &best);
#elif defined(__APPLE__)
  for (uint32_t i = 0; i < _dyld_image_count(); ++i) {
    const char* const path = _dyld_get_image_name(i);
    take_runtime(path ? path : "", best);
  }
#endif
  return best;
}

struct Region {
  int64_t n;
  const std::function<void(int64_t)>* task;
};

void run_share(void* data) {
  const auto& region = *static_cast<const Region*>(data);
  for (int64_t i = openmp.thread_num(); i < region.n; i += openmp.team_size()) (*region.task)(i);
}

}  // namespace

void adopt_host_threads() {
  const std::string path = loaded_runtime();
  void* const runtime = path.empty() ? nullptr : dlopen(path.c_str(), RTLD_LAZY | RTLD_NOLOAD);
  if (!runtime) return;
  const auto find = [&](auto& function, const char* name) {
    function = reinterpret_cast<std::remove_reference_t<decltype(function)>>(dlsym(runtime, name));
  };
  find(openmp.parallel, "GOMP_parallel");
  find(openmp.max_threads, "omp_get_max_threads");
  find(openmp.thread_num, "omp_get_thread_num");
  find(openmp.team_size, "omp_get_num_threads");
  find(openmp.in_parallel, "omp_in_parallel");
  if (!openmp.complete()) return;
  threads_at_import = openmp.max_threads();
  try {
    default_threads = num_threads();
  } catch (const Error&) {  // a malformed FLASH_ATTENTION_NUM_THREADS: whoever needs threads is told
  }
  chosen = std::getenv("FLASH_ATTENTION_NUM_THREADS") != nullptr;
  set_parallel_for([pid = getpid()](int64_t n, const std::function<void(int64_t)>& task) {
    // An OpenMP runtime does not survive fork(), and a region inside a region has one thread: both run here.
    if (getpid() != pid || openmp.in_parallel()) {
      for (int64_t i = 0; i < n; ++i) task(i);
      return;
    }
    Region region{n, &task};
    openmp.parallel(run_share, &region, static_cast<unsigned>(n), 0);
  });
}

void follow_host_threads() {
  if (!openmp.complete() || chosen.load(std::memory_order_relaxed)) return;
  const int now = openmp.max_threads();
  if (followed.exchange(now) == now) return;
  // torch's own default does not know cgroup quotas; ours does.
  const bool untouched = now == threads_at_import && now > default_threads;
  set_num_threads(untouched ? default_threads : now);
}

void choose_num_threads(int n) {
  set_num_threads(n);
  followed = 0;
  chosen = n > 0;
}

}  // namespace flash_attn::python
