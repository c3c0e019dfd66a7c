// Values of options, checked in words: "--threads: expected an integer of at least 1, got 0". The checks see the text
// before CLI11 converts it, so that a word is refused as well as a number out of range.
#pragma once

#include <CLI/CLI.hpp>

#include <cstdint>

namespace flash_attn::cli {

/// An integer from `low` to 2^31 - 1: no length, and no number of heads, is larger.
CLI::Validator integer_from(int64_t low);
CLI::Validator positive_number();
/// In [0, 1).
CLI::Validator probability();

/// What to say of a command line that CLI11 refuses: names the word, and what it may have been meant for.
std::string words_for(const CLI::App& app, const CLI::Error& error);

}  // namespace flash_attn::cli
