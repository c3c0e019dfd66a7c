// The subcommands. Each adds itself to the app; its callback prints, sets the exit status, or throws Error.
#pragma once

#include <CLI/CLI.hpp>

namespace flash_attn::cli {

void add_info(CLI::App& app);
void add_explain(CLI::App& app);
void add_verify(CLI::App& app, int& exit_status);
void add_bench(CLI::App& app);

}  // namespace flash_attn::cli
