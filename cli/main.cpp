// flash-attn: what this machine is (info), what a call would do (explain), whether it is right (verify) and how close
// to the machine's limit it runs (bench).
//
// Exit status: 0 well; 1 verify found an error too large; 2 the command line, or the machine, does not allow it.
#include <fmt/format.h>

#include <cstdio>
#include <exception>
#include <new>

#include "commands.hpp"
#include "flash_attn/flash_attn.hpp"
#include "options.hpp"

int main(int argc, char** argv) {  // NOLINT(bugprone-exception-escape): only out of memory, before anything is done
  using namespace flash_attn;
  int exit_status = 0;
  CLI::App app{"Exact attention on whatever hardware you have."};
  app.set_version_flag("--version", version());
  app.require_subcommand(1);
  app.failure_message([&app](const CLI::App*, const CLI::Error& e) { return cli::words_for(app, e) + "\n"; });
  cli::add_info(app);
  cli::add_explain(app);
  cli::add_verify(app, exit_status);
  cli::add_bench(app);
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& e) {
    return app.exit(e) == 0 ? 0 : 2;
  } catch (const std::bad_alloc&) {
    fmt::print(stderr, "flash-attn: out of memory\n");
    return 2;
  } catch (const std::exception& e) {
    std::fflush(stdout);
    fmt::print(stderr, "flash-attn: {}\n", e.what());
    return 2;
  }
  return exit_status;
}
