// sampled_gradient_: the selected entries of grad_output^T input, each a dot product of two columns over the tokens.
//
// Columns of a row-major matrix lie `width` elements apart, a sector of 32 bytes for 2 or 4 useful ones. So both
// matrices are first transposed, some tokens at a time: then a dot product reads two runs of consecutive elements, one
// warp each. Entries come in ascending order, so neighbours share the row of grad_output, which then is in L1.
//
// Bytes, b per element: (outputs + inputs) tokens b read and written once for the transposition (at most 32 MiB of
// scratch, which stays in the L2 of a large GPU), then up to 2 tokens b per entry, from L2 as a rule. A dense product
// on tensor cores does 2 tokens outputs inputs operations; this pays below some 0.2 % of the entries.

#include "launch.h"

namespace piece::cuda {
namespace {

constexpr int64_t kScratchBytes = int64_t{32} << 20;
constexpr int64_t kMinTokens = 64;
constexpr int kTile = 32;
constexpr int kRowsPerPass = 8;
constexpr int kWarps = kThreads / 32;

int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

// Tokens of one round, a multiple of a pack of 16 bytes of either type.
int64_t tokens_per_round(int64_t size, int64_t tokens, int64_t outputs, int64_t inputs) {
  const int64_t most = kScratchBytes / (size * (outputs + inputs + 1)) / kMinTokens * kMinTokens;
  const int64_t wanted = round_up(tokens, 8);
  const int64_t allowed = most < kMinTokens ? kMinTokens : most;
  return wanted < allowed ? wanted : allowed;
}

// transposed[c * padded + t] = source[t * width + c], and 0 for num_tokens <= t < padded.
template <typename T>
__global__ void __launch_bounds__(kTile* kRowsPerPass)
    transpose_kernel(const T* __restrict__ source, int64_t num_tokens, int64_t width, int64_t padded,
                     T* __restrict__ transposed) {
  __shared__ T tile[kTile][kTile + 1];  // one more: columns of the tile then lie in different banks
  const int64_t column_tiles = (width + kTile - 1) / kTile, token_tiles = (padded + kTile - 1) / kTile;
  for (int64_t number = blockIdx.x; number < column_tiles * token_tiles; number += gridDim.x) {
    const int64_t first_column = number % column_tiles * kTile, first_token = number / column_tiles * kTile;
    for (int row = threadIdx.y; row < kTile; row += kRowsPerPass) {
      const int64_t t = first_token + row, c = first_column + threadIdx.x;
      tile[row][threadIdx.x] = t < num_tokens && c < width ? source[t * width + c] : T{};
    }
    __syncthreads();
    for (int row = threadIdx.y; row < kTile; row += kRowsPerPass) {
      const int64_t t = first_token + threadIdx.x, c = first_column + row;
      if (t < padded && c < width) transposed[c * padded + t] = tile[threadIdx.x][row];
    }
    __syncthreads();  // before the next tile is read into it
  }
}

// One warp per entry. Lanes take packs of 16 bytes in turn; their sums are added in a tree of fixed shape.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    dot_kernel(const T* __restrict__ outputs_T, const T* __restrict__ inputs_T, int64_t padded, int64_t num_inputs,
               int64_t num_entries_of_weight, const int64_t* __restrict__ index, int64_t k, float scale,
               float* __restrict__ total) {
  constexpr int width = 16 / sizeof(T);
  const int lane = threadIdx.x % 32;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  for (int64_t j = first; j < k; j += static_cast<int64_t>(gridDim.x) * kWarps) {
    const int64_t entry = index[j];
    assert(entry >= 0 && entry < num_entries_of_weight && "piece_ds: a position in index lies outside of the weight");
    const T* a = outputs_T + entry / num_inputs * padded;
    const T* b = inputs_T + entry % num_inputs * padded;
    float sum = 0.0f;
    for (int64_t t = lane * width; t < padded; t += 32 * width) {
      const auto x = load<width>(a + t), y = load<width>(b + t);
#pragma unroll
      for (int i = 0; i < width; ++i) sum = add(sum, mul(to_float(x.v[i]), to_float(y.v[i])));
    }
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) {
      sum = add(sum, __shfl_xor_sync(0xffffffffu, sum, distance));
    }
    if (lane == 0) total[j] = add(total[j], mul(sum, scale));
  }
}

// The same for elements of 16 bits, two at a time on both sides: width is even and source on 4 bytes; padded is a multiple
// of 8. A tile is 64 tokens of 64 columns, a word of it two columns of a token; those of even and of odd tokens lie apart,
// so that a warp, which reads one word of each, meets 32 banks.
template <typename T>
__global__ void __launch_bounds__(kTile* kRowsPerPass)
    transpose_pairs_kernel(const T* __restrict__ source, int64_t num_tokens, int64_t width, int64_t padded,
                           T* __restrict__ transposed) {
  static_assert(sizeof(T) == 2, "two elements are a word");
  constexpr int kPairTile = 2 * kTile;
  __shared__ uint32_t tile[2][kTile][kTile + 1];
  const int64_t column_tiles = (width + kPairTile - 1) / kPairTile, token_tiles = (padded + kPairTile - 1) / kPairTile;
  for (int64_t number = blockIdx.x; number < column_tiles * token_tiles; number += gridDim.x) {
    const int64_t first_column = number % column_tiles * kPairTile, first_token = number / column_tiles * kPairTile;
    const int64_t column = first_column + 2 * threadIdx.x;
#pragma unroll
    for (int pass = 0; pass < kPairTile / kRowsPerPass; ++pass) {
      const int row = pass * kRowsPerPass + threadIdx.y;
      const int64_t t = first_token + row;
      uint32_t word = 0;
      if (t < num_tokens && column < width) word = bit_cast<uint32_t>(load<2>(source + t * width + column));
      tile[row % 2][row / 2][threadIdx.x] = word;
    }
    __syncthreads();
    const int64_t t = first_token + 2 * threadIdx.x;
#pragma unroll
    for (int pass = 0; pass < kTile / kRowsPerPass; ++pass) {
      const int pair = pass * kRowsPerPass + threadIdx.y;
      const int64_t c = first_column + 2 * pair;
      if (t >= padded || c >= width) continue;
      const uint32_t even = tile[0][threadIdx.x][pair], odd = tile[1][threadIdx.x][pair];
      store<2>(transposed + c * padded + t, bit_cast<Pack<T, 2>>((even & 0xffffu) | odd << 16));
      store<2>(transposed + (c + 1) * padded + t, bit_cast<Pack<T, 2>>(even >> 16 | (odd & 0xffff0000u)));
    }
    __syncthreads();  // before the next tile is read into it
  }
}

template <typename T>
cudaError_t transpose(const T* source, int64_t num_tokens, int64_t width, int64_t padded, T* transposed,
                      cudaStream_t stream) {
  if constexpr (sizeof(T) == 2) {
    if (width % 2 == 0 && reinterpret_cast<uintptr_t>(source) % 4 == 0) {
      const int64_t pair_tiles = ((width + 2 * kTile - 1) / (2 * kTile)) * ((padded + 2 * kTile - 1) / (2 * kTile));
      transpose_pairs_kernel<<<static_cast<unsigned>(grid_for(pair_tiles, 1)), dim3(kTile, kRowsPerPass), 0, stream>>>(
          source, num_tokens, width, padded, transposed);
      return cudaGetLastError();
    }
  }
  const int64_t tiles = ((width + kTile - 1) / kTile) * ((padded + kTile - 1) / kTile);
  transpose_kernel<<<static_cast<unsigned>(grid_for(tiles, 1)), dim3(kTile, kRowsPerPass), 0, stream>>>(
      source, num_tokens, width, padded, transposed);
  return cudaGetLastError();
}

}  // namespace

int64_t sampled_gradient_scratch(DType dtype, int64_t tokens, int64_t outputs, int64_t inputs) {
  const int64_t size = size_of(dtype);
  return tokens_per_round(size, tokens, outputs, inputs) * (outputs + inputs) * size;
}

cudaError_t sampled_gradient(DType dtype, const void* grad_output, const void* input, int64_t tokens, int64_t outputs,
                             int64_t inputs, const int64_t* index, int64_t k, float scale, float* total, void* scratch,
                             cudaStream_t stream) {
  if (k == 0 || tokens == 0) return cudaSuccess;
  cudaError_t error = cudaSuccess;
  const int64_t per_round = tokens_per_round(size_of(dtype), tokens, outputs, inputs);
  with_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    for (int64_t first = 0; first < tokens; first += per_round) {
      const int64_t num_tokens = tokens - first < per_round ? tokens - first : per_round;
      const int64_t padded = round_up(num_tokens, 8);
      T* outputs_T = static_cast<T*>(scratch);
      T* inputs_T = outputs_T + outputs * padded;  // padded is a multiple of 8: on 16 bytes as the scratch is
      error = transpose(static_cast<const T*>(grad_output) + first * outputs, num_tokens, outputs, padded, outputs_T,
                        stream);
      if (error != cudaSuccess) return;
      error = transpose(static_cast<const T*>(input) + first * inputs, num_tokens, inputs, padded, inputs_T, stream);
      if (error != cudaSuccess) return;
      dot_kernel<<<static_cast<unsigned>(grid_for(k, kWarps)), kThreads, 0, stream>>>(
          outputs_T, inputs_T, padded, inputs, outputs * inputs, index, k, scale, total);
      if ((error = cudaGetLastError()) != cudaSuccess) return;
    }
  });
  return error;
}

}  // namespace piece::cuda
