#include "cpu/limits.hpp"

#include <algorithm>
#include <charconv>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <sstream>
#include <string>

#include "cpu/system.hpp"
#include "flash_attn/error.hpp"

namespace flash_attn::cpu {
namespace fs = std::filesystem;
namespace {

std::string first_line(const fs::path& path) {
  std::ifstream in(path);
  std::string line;
  std::getline(in, line);
  return line;
}

/// OMP_NUM_THREADS: the number, or the first of a list. What OpenMP would not understand counts as not set: the
/// variable is not ours to complain about.
int omp_threads() {
  const char* const value = std::getenv("OMP_NUM_THREADS");
  if (!value) return 0;
  const char* const end = value + std::strlen(value);
  int n = 0;
  const auto [stop, error] = std::from_chars(value, end, n);
  return error == std::errc() && (stop == end || *stop == ',') && n > 0 ? n : 0;
}

/// FLASH_ATTENTION_NUM_THREADS; 0 if it is not set, or empty.
int requested_threads() {
  const char* const value = std::getenv("FLASH_ATTENTION_NUM_THREADS");
  if (!value || !*value) return 0;
  const char* const end = value + std::strlen(value);
  int n = 0;
  const auto [stop, error] = std::from_chars(value, end, n);
  if (error == std::errc() && stop == end && n > 0 && n <= most_threads()) return n;
  throw Error(ErrorCode::invalid_argument, "FLASH_ATTENTION_NUM_THREADS: expected a whole number from 1 to " +
                                               std::to_string(most_threads()) + ", got \"" + value + "\"");
}

/// CPUs granted by "quota period" (cgroup v2's cpu.max, or v1's two files); 0 if unlimited.
double ratio(const std::string& quota, const std::string& period) {
  const double q = std::atof(quota.c_str()), p = std::atof(period.c_str());
  return q > 0 && p > 0 ? q / p : 0.0;
}

/// The tightest limit from this process's group up to the root of the hierarchy.
double cgroup_quota() {
  double tightest = 0;
  const auto take = [&](double cpus) {
    if (cpus > 0 && (tightest == 0 || cpus < tightest)) tightest = cpus;
  };
  std::ifstream in("/proc/self/cgroup");
  for (std::string line; std::getline(in, line);) {
    const auto a = line.find(':'), b = line.find(':', a + 1);
    if (b == std::string::npos) continue;
    const std::string controllers = line.substr(a + 1, b - a - 1);
    const bool v2 = controllers.empty();
    if (!v2 && ("," + controllers + ",").find(",cpu,") == std::string::npos) continue;
    const fs::path root = v2 ? "/sys/fs/cgroup" : "/sys/fs/cgroup/cpu";
    for (fs::path group = line.substr(b + 1);; group = group.parent_path()) {
      const fs::path folder = root / group.relative_path();
      if (v2) {
        std::istringstream max(first_line(folder / "cpu.max"));
        std::string quota, period;
        max >> quota >> period;
        take(ratio(quota, period));
      } else {
        take(ratio(first_line(folder / "cpu.cfs_quota_us"), first_line(folder / "cpu.cfs_period_us")));
      }
      if (!group.has_relative_path()) break;
    }
  }
  return tightest;
}

}  // namespace

int most_threads() { return std::max(1024, online_cpus()); }

ThreadLimits thread_limits() {
  ThreadLimits limits;
  limits.online = online_cpus();
  limits.affinity = allowed_cpus();
  limits.quota = cgroup_quota();
  limits.requested = requested_threads();
  limits.omp = omp_threads();
  return limits;
}

int default_threads(const ThreadLimits& limits) {
  if (limits.requested > 0) return limits.requested;
  int n = limits.affinity;
  if (limits.quota > 0) n = std::min(n, std::max(1, static_cast<int>(limits.quota + 0.5)));
  if (limits.omp > 0) n = std::min(n, limits.omp);
  return std::max(1, n);
}

}  // namespace flash_attn::cpu
