"""Device functions that several kernels share: the arithmetic of one element, as in csrc/include/piece/scalar.h."""

import triton
import triton.language as tl

FLT_MAX = tl.constexpr(3.4028234663852886e38)


@triton.jit
def positions_of_block(n_elements, BLOCK: tl.constexpr):
    """Return the positions of this program's elements, int64, and which of them exist."""
    # 64 bits from the start: a parameter may have more than 2^31 elements.
    position = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    return position, position < n_elements


@triton.jit
def to_float(x):
    """Return x in fp32.

    bf16 is converted by its bits. This is exact for denormals too, and in Triton's interpreter, whose own cast is not.
    """
    if x.dtype == tl.bfloat16:
        # bf16 is the upper half of an fp32.
        return (x.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        return x.to(tl.float32)


@triton.jit
def from_float(x, DTYPE: tl.constexpr):
    """Return x in DTYPE, rounded to nearest even; bf16 by its bits, as in to_float()."""
    if DTYPE == tl.bfloat16:  # noqa: SIM300
        bits = x.to(tl.int32, bitcast=True)
        # Half of the last place, less one unless the kept part is odd: ties go to even.
        rounded = bits + 0x7FFF + ((bits >> 16) & 1)
        # Rounding could turn a NaN into an infinity.
        bits = tl.where(x != x, 0x7FC00000, rounded)
        return (bits >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(DTYPE)


@triton.jit
def bits_of(x):
    """Return the bits of x as an integer of the same size."""
    if x.dtype == tl.float32:
        return x.to(tl.int32, bitcast=True)
    else:
        return x.to(tl.int16, bitcast=True)


@triton.jit
def is_finite(x):
    # An exponent of all ones is infinity or NaN.
    return (x.to(tl.int32, bitcast=True) & 0x7F800000) != 0x7F800000


@triton.jit
def score_of(total, square, lam, WITH_SUM: tl.constexpr):
    """Return the score: |sum| / sqrt(square sum + lam), or the square sum if there is no sum.

    It is never NaN and never -0. Square root and division are IEEE's, so all providers give the same bits.
    """
    if WITH_SUM:
        # Clear the sign bit.
        magnitude = (total.to(tl.int32, bitcast=True) & 0x7FFFFFFF).to(tl.float32, bitcast=True)
        value = tl.div_rn(magnitude, tl.sqrt_rn(square + lam))
    else:
        value = square
    # 0 / 0 gives NaN, which no comparison could place.
    value = tl.where(value != value, 0.0, value)
    value = tl.where(value < -FLT_MAX, -FLT_MAX, value)
    # Keys are the bits of scores, so there may be only one zero.
    return tl.where(value == 0.0, 0.0, value)


@triton.jit
def load_score(sum_ptr, square_ptr, lam, position, mask, WITH_SUM: tl.constexpr):
    square = tl.load(square_ptr + position, mask=mask, other=0.0)
    if WITH_SUM:
        total = tl.load(sum_ptr + position, mask=mask, other=0.0)
    else:
        total = square
    return score_of(total, square, lam, WITH_SUM)


@triton.jit
def append(found, score, index, candidate_score_ptr, candidate_index_ptr, num_candidates_ptr, capacity):
    """Append candidates where found is true. Candidates without room are only counted.

    Each program makes one atomic addition, so the order of programs in the list is not fixed.
    """
    count = tl.sum(found.to(tl.int32))
    if count > 0:
        first = tl.atomic_add(num_candidates_ptr, count.to(tl.int64), sem="relaxed")
        # Each found element gets its place behind the program's first one.
        place = first + tl.cumsum(found.to(tl.int32)) - 1
        has_room = found & (place < capacity)
        tl.store(candidate_score_ptr + place, score, mask=has_room)
        tl.store(candidate_index_ptr + place, index, mask=has_room)


@triton.jit
def load_position(index_ptr, j, mask, limit):
    """Return index[j], and whether it exists and lies in [0, limit). Outside of it, the kernel stops with a message."""
    position = tl.load(index_ptr + j, mask=mask, other=0)
    inside = (position >= 0) & (position < limit)
    tl.device_assert(inside, "piece_ds: a position in index lies outside of its tensor", mask=mask)
    return position, mask & inside
