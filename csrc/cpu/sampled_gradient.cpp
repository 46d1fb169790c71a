// Selected entries of grad_output^T input: sampled dense-dense matrix multiplication.
//
// Both matrices come with tokens first, so one entry's columns are strided over all of memory. A tile of tokens is
// turned round once (a panel of `input`, all the columns that are needed, and 16 rows of grad_output at a time, which
// ascending positions visit once); then an entry is a dot product of two contiguous runs. Tiles are added in their
// order, so the result does not depend on the number of threads.
#include <memory>

#include "ops.h"
#include "parallel.h"

namespace piece::cpu {
namespace {

constexpr int64_t kTile = 64;   // tokens: a panel of 4096 columns is 1 MiB
constexpr int64_t kGroup = 16;  // columns turned round together: a cache line of fp32

struct Matrix {
  const char* data;
  int64_t width, element_size;

  const char* at(int64_t token, int64_t column) const { return data + (token * width + column) * element_size; }
};

struct Entry {
  int32_t row, column;
};

// A thread's panels and its sums over one tile.
struct Workspace {
  std::unique_ptr<float[]> input_panel, output_panel, partial;
};

void turn_round(DType dtype, Matrix matrix, int64_t first_token, int64_t tokens, int64_t group, float* panel) {
  const int64_t column = group * kGroup, columns = std::min(kGroup, matrix.width - column);
  active().transpose[dtype](matrix.at(first_token, column), matrix.width, columns, tokens, kTile, panel);
}

}  // namespace

void sampled_gradient(DType dtype, const void* grad_output, const void* input, int64_t tokens, int64_t out,
                      int64_t in, const int64_t* index, int64_t n, float scale, float* total) {
  if (n == 0) return;
  const int64_t element_size = dtype == kFloat32 ? 4 : 2;
  const Matrix output_TO{static_cast<const char*>(grad_output), out, element_size};
  const Matrix input_TI{static_cast<const char*>(input), in, element_size};
  const int64_t groups = num_blocks(in, kGroup);
  std::vector<uint8_t> needed(groups);
  std::vector<Entry> entries(n);
  for (int64_t i = 0; i < n; ++i) {
    entries[i] = {static_cast<int32_t>(index[i] / in), static_cast<int32_t>(index[i] % in)};
    needed[entries[i].column / kGroup] = 1;
  }
  std::vector<float> sum(n, 0.0f);
  for_blocks_in_order(
      num_blocks(tokens, kTile),
      [&] {
        return Workspace{std::unique_ptr<float[]>(new float[groups * kGroup * kTile]),
                         std::unique_ptr<float[]>(new float[kGroup * kTile]), std::unique_ptr<float[]>(new float[n])};
      },
      [&](int64_t tile, Workspace& own) {
        const int64_t first = tile * kTile, size = std::min(kTile, tokens - first);
        for (int64_t group = 0; group < groups; ++group) {
          if (needed[group]) {
            turn_round(dtype, input_TI, first, size, group, own.input_panel.get() + group * kGroup * kTile);
          }
        }
        int64_t present = -1;  // the group of rows in output_panel
        for (int64_t i = 0; i < n; ++i) {
          const Entry entry = entries[i];
          if (entry.row / kGroup != present) {
            present = entry.row / kGroup;
            turn_round(dtype, output_TO, first, size, present, own.output_panel.get());
          }
          own.partial[i] = active().dot(own.output_panel.get() + entry.row % kGroup * kTile,
                                        own.input_panel.get() + entry.column * kTile, kTile);
        }
      },
      [&](int64_t, const Workspace& own) {
        for (int64_t i = 0; i < n; ++i) sum[i] = add(sum[i], own.partial[i]);
      });
  for (int64_t i = 0; i < n; ++i) total[i] = add(total[i], mul(sum[i], scale));
}

}  // namespace piece::cpu
