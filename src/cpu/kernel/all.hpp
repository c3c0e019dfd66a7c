// One instruction set's worth of kernels: included once by each src/cpu/isa/<isa>.cpp, which sets the three macros.
// No include guards below on purpose: these headers exist once per translation unit.
#include "cpu/kernels.hpp"

#include "cpu/simd.hpp"

#include "cpu/kernel/tile.hpp"

#include "cpu/kernel/pack.hpp"
#include "cpu/kernel/scores.hpp"
#include "cpu/kernel/softmax.hpp"

#include "cpu/kernel/dropout.hpp"

#include "cpu/kernel/finish.hpp"

#include "cpu/kernel/attend.hpp"
#include "cpu/kernel/in_place.hpp"

#include "cpu/kernel/gradients.hpp"

#include "cpu/kernel/backward.hpp"

#include "cpu/kernel/rms_norm.hpp"
#include "cpu/kernel/rotate.hpp"

#include "cpu/kernel/table.hpp"
