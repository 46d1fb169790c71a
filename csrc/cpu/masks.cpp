// Between positions and packed bits, and the check that every position is inside.
#include <cstring>

#include "ops.h"
#include "parallel.h"

namespace piece::cpu {

IndexFacts check_index(const int64_t* index, int64_t n, int64_t limit) {
  std::atomic<bool> in_range{true}, ascending{true};
  for_blocks(num_blocks(n), [&](int64_t block) {
    const int64_t first = block * kBlock, last = std::min(first + kBlock, n);
    const IndexFacts facts = active().check_index(index + first, last - first, limit);
    if (!facts.in_range) in_range = false;
    if (!facts.ascending || (first > 0 && index[first - 1] >= index[first])) ascending = false;
  });
  return {in_range, ascending};
}

void index_to_mask(const int64_t* index, int64_t n_index, uint8_t* bits, int64_t n) {
  const int64_t bytes = mask_bytes(n);
  for_blocks(num_blocks(bytes), [&](int64_t block) {
    std::memset(bits + block * kBlock, 0, std::min(kBlock, bytes - block * kBlock));
  });
  // One thread: positions may come in any order, and two of them may share a byte.
  for (int64_t i = 0; i < n_index; ++i) bits[mask_byte(index[i])] |= static_cast<uint8_t>(mask_bit(index[i]));
}

std::vector<int64_t> mask_to_index(const uint8_t* bits, int64_t num_bytes) {
  std::vector<int64_t> positions;
  for_blocks_in_order(
      num_blocks(num_bytes), [] { return std::vector<int64_t>(); },
      [&](int64_t block, std::vector<int64_t>& found) {
        found.clear();
        const int64_t last = std::min((block + 1) * kBlock, num_bytes);
        for (int64_t byte = block * kBlock; byte < last;) {
          const int64_t size = std::min<int64_t>(8, last - byte);
          uint64_t word = 0;
          if (size == 8) {
            std::memcpy(&word, bits + byte, 8);
          } else {
            std::memcpy(&word, bits + byte, size);
          }
          if (__BYTE_ORDER__ == __ORDER_BIG_ENDIAN__) word = __builtin_bswap64(word);
          for (; word; word &= word - 1) found.push_back(8 * byte + __builtin_ctzll(word));
          byte += size;
        }
      },
      [&](int64_t, const std::vector<int64_t>& found) {
        positions.insert(positions.end(), found.begin(), found.end());
      });
  return positions;
}

}  // namespace piece::cpu
