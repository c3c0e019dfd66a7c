#include "host_threads.hpp"

#include <dlfcn.h>
#include <link.h>
#include <unistd.h>

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <string>

#include "flash_attn/flash_attn.hpp"

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

/// Path of a loaded OpenMP runtime; torch's own is preferred where another package brought a second one.
int find_runtime(dl_phdr_info* info, std::size_t, void* found) {
  const std::string path = info->dlpi_name ? info->dlpi_name : "";
  const std::string name = path.substr(path.rfind('/') + 1);
  for (const char* runtime : {"libgomp", "libomp", "libiomp5"}) {
    if (name.rfind(runtime, 0) != 0) continue;
    auto& best = *static_cast<std::string*>(found);
    if (best.empty() || path.find("/torch") != std::string::npos) best = path;
  }
  return 0;
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
  std::string path;
  dl_iterate_phdr(find_runtime, &path);
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
