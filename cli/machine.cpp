#include "machine.hpp"

#include <dlfcn.h>
#include <fmt/format.h>
#include <sys/utsname.h>
#include <unistd.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <sstream>

namespace flash_attn::cli {
namespace fs = std::filesystem;
namespace {

std::string first_line(const fs::path& path) {
  std::ifstream in(path);
  std::string line;
  std::getline(in, line);
  return line;
}

/// The value of the first "name<spaces>: value" line of a /proc file.
std::string field(const fs::path& path, const std::string& name) {
  std::ifstream in(path);
  for (std::string line; std::getline(in, line);) {
    const auto colon = line.find(':');
    if (!line.starts_with(name) || colon == std::string::npos) continue;
    const auto value = line.find_first_not_of(" \t", colon + 1);
    return value == std::string::npos ? "" : line.substr(value);
  }
  return {};
}

/// "0-3,8" has five CPUs.
int count_list(const std::string& list) {
  int count = 0;
  std::istringstream in(list);
  for (std::string range; std::getline(in, range, ',');) {
    int lo = 0, hi = 0;
    const int fields = std::sscanf(range.c_str(), "%d-%d", &lo, &hi);
    if (fields >= 1) count += fields == 2 ? hi - lo + 1 : 1;
  }
  return count;
}

int64_t parse_size(const std::string& text) {
  std::size_t end = 0;
  if (text.empty() || !std::isdigit(static_cast<unsigned char>(text[0]))) return 0;
  const int64_t n = std::stoll(text, &end);
  if (end < text.size() && text[end] == 'K') return n << 10;
  if (end < text.size() && text[end] == 'M') return n << 20;
  return n;
}

}  // namespace

std::string cpu_model() {
  for (const char* name : {"model name", "Model", "cpu model"}) {
    std::string model = field("/proc/cpuinfo", name);
    if (!model.empty()) return model;
  }
  utsname name{};
  return uname(&name) == 0 ? name.machine : "unknown";
}

std::vector<Cache> caches() {
  std::vector<Cache> found;
  std::error_code none;
  for (const auto& entry : fs::directory_iterator("/sys/devices/system/cpu/cpu0/cache", none)) {
    const std::string type = first_line(entry.path() / "type");
    if (type != "Data" && type != "Unified") continue;
    const std::string level = first_line(entry.path() / "level");
    found.push_back({fmt::format("L{}{}", level, type == "Data" ? "d" : ""),
                     parse_size(first_line(entry.path() / "size")),
                     count_list(first_line(entry.path() / "shared_cpu_list"))});
  }
#ifdef _SC_LEVEL1_DCACHE_SIZE
  if (found.empty()) {
    const std::pair<const char*, int> names[] = {
        {"L1d", _SC_LEVEL1_DCACHE_SIZE}, {"L2", _SC_LEVEL2_CACHE_SIZE}, {"L3", _SC_LEVEL3_CACHE_SIZE}};
    for (const auto& [name, key] : names) {
      if (const long bytes = sysconf(key); bytes > 0) found.push_back({name, bytes, 0});
    }
  }
#endif
  std::sort(found.begin(), found.end(), [](const Cache& a, const Cache& b) { return a.name < b.name; });
  return found;
}

Gpus gpus() {
  Gpus gpus;
  std::error_code none;
  for (const auto& entry : fs::directory_iterator("/proc/driver/nvidia/gpus", none)) {
    const std::string model = field(entry.path() / "information", "Model");
    gpus.found.push_back(
        fmt::format("{} ({})", model.empty() ? "NVIDIA GPU" : model, entry.path().filename().string()));
  }
  for (const char* name : {"libcuda.so.1", "libcuda.so"}) {
    if (void* library = dlopen(name, RTLD_LAZY | RTLD_LOCAL)) {
      gpus.driver = true;
      dlclose(library);
      break;
    }
  }
  return gpus;
}

}  // namespace flash_attn::cli
