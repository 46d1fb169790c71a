// The range kernels for any processor.
#include "vec_scalar.h"

#include "range_kernels.h"

namespace piece::cpu {
extern const Kernels kScalar = kernels_named("scalar");
}
