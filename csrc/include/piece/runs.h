// A list of tensors as runs of memory; shared by the bindings and the kernels of every device.
#pragma once

#include <cstdint>

namespace piece {

// Positions [begin, begin + n) of a list: contiguous elements from data on.
struct Run {
  void* data;
  int64_t begin, n;
};

// Runs in ascending order; none is empty, no two of them could be one.
struct Runs {
  const Run* run;
  int64_t count;
  int64_t total;  // positions
};

}  // namespace piece
