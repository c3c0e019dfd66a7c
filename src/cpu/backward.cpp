#include "cpu/driver.hpp"
#include "flash_attn/error.hpp"
namespace flash_attn::cpu {
void backward(const Problem&) { throw Error(ErrorCode::not_supported, "backward"); }
}
