// The kernels on tiles, and what they are made of: included as all.hpp is, for an instruction set that has AMX or is
// told to emulate it.
#include "cpu/kernels.hpp"

#include "cpu/simd.hpp"

#include "cpu/kernel/tile.hpp"

#include "cpu/kernel/pack.hpp"
#include "cpu/kernel/scores.hpp"
#include "cpu/kernel/softmax.hpp"

#include "cpu/kernel/dropout.hpp"

#include "cpu/kernel/tiles.hpp"

#include "cpu/kernel/attend_tiles.hpp"
#include "cpu/kernel/gradients.hpp"

#include "cpu/kernel/backward_tiles.hpp"
