// info: the machine, and what the library makes of it.
#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>

#include "commands.hpp"
#include "cpu/limits.hpp"
#include "flash_attn/flash_attn.hpp"
#include "machine.hpp"
#include "terminal.hpp"

namespace flash_attn::cli {
namespace {

/// Which of the limits gives the number of threads in use.
std::string what_decides(const cpu::ThreadLimits& limits, int threads) {
  if (limits.requested > 0) return "FLASH_ATTENTION_NUM_THREADS";
  const double granted = limits.quota > 0 ? std::min<double>(limits.quota, limits.affinity) : limits.affinity;
  if (limits.omp > 0 && limits.omp < granted) return "OMP_NUM_THREADS";
  if (limits.quota > 0 && limits.quota < limits.affinity && threads < limits.affinity) return "the cgroup's CPU quota";
  if (limits.affinity < limits.online) return "the affinity mask";
  return "the number of CPUs";
}

std::string gpu_text(const Gpus& gpus) {
  if (!gpus.found.empty()) return fmt::format("{}", fmt::join(gpus.found, ", "));
  return gpus.driver ? "none listed, though the CUDA driver's library loads" : "none found (no NVIDIA driver)";
}

void info(const JsonOption& json) {
  const std::vector<Cache> cache_list = caches();
  const cpu::ThreadLimits limits = cpu::thread_limits();
  const Gpus gpu = gpus();
  const int threads = num_threads();
  const std::string decides = what_decides(limits, threads), isa = cpu_isa();
  const std::vector<std::string> isas = cpu_isas();

  // A vendor backend that this build does not have is listed all the same, with the reason: people look for it.
  std::vector<BackendInfo> backend_list = backends();
  const auto named = [](const char* name) { return [name](const BackendInfo& b) { return b.name == name; }; };
  if (std::none_of(backend_list.begin(), backend_list.end(), named("cuda"))) {
    const char* machine = gpu.driver || !gpu.found.empty() ? "" : "; and no NVIDIA driver was found on this machine";
    backend_list.push_back({"cuda", "native kernels for NVIDIA GPUs",
                            fmt::format("this version has no CUDA kernels{}", machine), "nothing", "nothing"});
  }

  if (json.tables()) {
    const auto line = [](const char* name, const std::string& value) {
      fmt::print("{} {}\n", painted(fmt::format("{:<12}", name), Colour::bold), value);
    };
    line("version", version());
    line("cpu", cpu_model());
    line("isa", fmt::format("{} in use; this machine can run {}", isa, fmt::join(isas, ", ")));
    std::vector<std::string> texts;
    for (const Cache& c : cache_list) {
      texts.push_back(fmt::format("{} {}{}", c.name, bytes_text(static_cast<double>(c.bytes)),
                                  c.shared_by > 1 ? fmt::format(" (shared by {})", c.shared_by) : ""));
    }
    line("caches", texts.empty() ? "the system does not say" : fmt::format("{}", fmt::join(texts, ", ")));
    line("threads",
         fmt::format("{}, decided by {} (online {}, affinity {}, cgroup quota {})", threads, decides, limits.online,
                     limits.affinity, limits.quota > 0 ? fmt::format("{:.3g}", limits.quota) : "none"));
    line("gpus", gpu_text(gpu));
    fmt::print("\n");
    Table table({"backend", "state", "what it is", "forward serves", "backward serves"});
    for (const BackendInfo& b : backend_list) {
      const bool usable = b.unavailable.empty();
      table.add({b.name,
                 {usable ? "usable" : "missing: " + b.unavailable, usable ? Colour::green : Colour::yellow},
                 b.description,
                 b.forward,
                 b.backward});
    }
    table.print();
  }

  std::vector<Json> cache_json, backend_json;
  for (const Cache& c : cache_list) {
    cache_json.push_back(Json::object({{"name", c.name}, {"bytes", c.bytes}, {"shared_by", c.shared_by}}));
  }
  for (const BackendInfo& b : backend_list) {
    backend_json.push_back(Json::object({{"name", b.name},
                                         {"description", b.description},
                                         {"forward", b.forward},
                                         {"backward", b.backward},
                                         {"usable", b.unavailable.empty()},
                                         {"unavailable", b.unavailable.empty() ? Json() : Json(b.unavailable)}}));
  }
  json.write(
      Json::object({{"version", version()},
                    {"cpu", cpu_model()},
                    {"isa", isa},
                    {"isas", isas},
                    {"caches", Json::array(cache_json)},
                    {"threads", Json::object({{"default", threads},
                                              {"decided_by", decides},
                                              {"online", limits.online},
                                              {"affinity", limits.affinity},
                                              {"cgroup_quota", limits.quota > 0 ? Json(limits.quota) : Json()}})},
                    {"gpus", gpu.found},
                    {"cuda_driver", gpu.driver},
                    {"backends", Json::array(backend_json)}},
                   true));
}

}  // namespace

void add_info(CLI::App& app) {
  CLI::App* command =
      app.add_subcommand("info", "This machine: CPU, instruction sets, caches, threads, GPUs, backends");
  const auto json = JsonOption::add_to(*command);
  command->callback([json] { info(*json); });
}

}  // namespace flash_attn::cli
