// A hosted backend answers for its capabilities like any other, and is never run from here.
#include "core/hosted.hpp"

#include <memory>
#include <utility>

#include "core/backend.hpp"

namespace flash_attn {
namespace {

class HostedBackend final : public Backend {
 public:
  explicit HostedBackend(Hosted hosted) : hosted_(std::move(hosted)) {}
  std::string_view name() const override { return hosted_.name; }
  std::string_view description() const override { return hosted_.description; }
  std::span<const int32_t> devices() const override { return hosted_.devices; }
  const Serves* serves(Pass pass) const override {
    const std::optional<Serves>& serves = pass == Pass::forward ? hosted_.forward : hosted_.backward;
    return serves ? &*serves : nullptr;
  }
  std::string unavailable() const override { return hosted_.unavailable; }
  bool automatic() const override { return hosted_.automatic; }
  bool hosted() const override { return true; }
  void forward(const Problem&) const override { run_elsewhere(); }
  void backward(const Problem&) const override { run_elsewhere(); }

 private:
  [[noreturn]] void run_elsewhere() const {
    throw Error(ErrorCode::internal, "backend \"" + hosted_.name + "\" runs in its host, not in the core");
  }
  Hosted hosted_;
};

}  // namespace

void register_hosted(Hosted backend, std::string_view before) {
  replace_backend(std::make_unique<HostedBackend>(std::move(backend)), before);
}

}  // namespace flash_attn
