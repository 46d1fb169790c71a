// Selected entries of grad_output^T input: sampled dense-dense matrix multiplication.
//
// Both matrices come with tokens first, so one entry's columns are strided over all of memory. A tile of tokens is
// turned round once (a panel of `input`, all the columns that are needed, and some rows of grad_output at a time, which
// ascending positions visit once); then an entry is a dot product of two contiguous runs. Tiles are added in their
// order, so the result does not depend on the number of threads.
#include <memory>

#include "ops.h"
#include "parallel.h"

namespace piece::cpu {
namespace {

constexpr int64_t kGroup = 32;   // columns of input turned round together where one of them is needed
constexpr int64_t kRows = 256;   // rows of grad_output turned round at a time: a panel of 64 KiB

struct Matrix {
  const char* data;
  int64_t width, element_size;

  // Turn columns [first, first + columns) of a tile of tokens round.
  void turn(DType dtype, int64_t token, int64_t tokens, int64_t first, int64_t columns, float* panel) const {
    active().transpose[dtype](data + (token * width + first) * element_size, width, std::min(columns, width - first),
                              tokens, panel);
  }
};

// A thread's panels and its sums over one tile.
struct Workspace {
  std::unique_ptr<float[]> input_panel, output_panel, partial;
};

// Entries up to `end`, from the last group on, that lie in the kRows rows from first_row: one group per panel of rows
// where positions ascend.
struct RowGroup {
  int64_t first_row, end;
};

// The columns of input that have an entry, as runs of whole groups.
struct Run {
  int64_t first, columns;
};

std::vector<Run> needed_columns(const std::vector<Entry>& entries, int64_t width) {
  std::vector<uint8_t> needed(num_blocks(width, kGroup));
  for (const Entry& entry : entries) needed[entry.column / kGroup] = 1;
  std::vector<Run> runs;
  for (size_t group = 0; group < needed.size(); ++group) {
    if (!needed[group]) continue;
    if (group > 0 && needed[group - 1]) {
      runs.back().columns += kGroup;
    } else {
      runs.push_back({static_cast<int64_t>(group) * kGroup, kGroup});
    }
  }
  return runs;
}

}  // namespace

void sampled_gradient(DType dtype, const void* grad_output, const void* input, int64_t tokens, int64_t out,
                      int64_t in, const int64_t* index, int64_t n, float scale, float* total) {
  if (n == 0) return;
  const int64_t element_size = dtype == kFloat32 ? 4 : 2;
  const Matrix output_TO{static_cast<const char*>(grad_output), out, element_size};
  const Matrix input_TI{static_cast<const char*>(input), in, element_size};
  std::vector<Entry> entries(n);
  std::vector<RowGroup> groups;
  for (int64_t i = 0; i < n; ++i) {
    const int64_t row = index[i] / in, first_row = row / kRows * kRows;
    entries[i] = {static_cast<int32_t>(row - first_row), static_cast<int32_t>(index[i] - row * in)};
    if (groups.empty() || groups.back().first_row != first_row) groups.push_back({first_row, i});
    groups.back().end = i + 1;
  }
  const std::vector<Run> columns = needed_columns(entries, in);
  std::vector<float> sum(n, 0.0f);
  for_blocks_in_order(
      num_blocks(tokens, kTile),
      [&] {
        return Workspace{std::unique_ptr<float[]>(new float[in * kTile]),
                         std::unique_ptr<float[]>(new float[kRows * kTile]), std::unique_ptr<float[]>(new float[n])};
      },
      [&](int64_t tile, Workspace& own) {
        const int64_t token = tile * kTile, size = std::min(kTile, tokens - token);
        for (const Run& run : columns) {
          input_TI.turn(dtype, token, size, run.first, run.columns, own.input_panel.get() + run.first * kTile);
        }
        int64_t first = 0;
        for (const RowGroup& group : groups) {
          output_TO.turn(dtype, token, size, group.first_row, kRows, own.output_panel.get());
          active().dots(own.output_panel.get(), own.input_panel.get(), entries.data() + first, group.end - first,
                        own.partial.get() + first);
          first = group.end;
        }
      },
      [&](int64_t, const Workspace& own) {
        for (int64_t i = 0; i < n; ++i) sum[i] = add(sum[i], own.partial[i]);
      });
  for (int64_t i = 0; i < n; ++i) total[i] = add(total[i], mul(sum[i], scale));
}

}  // namespace piece::cpu
