"""Sectors and wavefronts of layouts whose numbers can be counted by hand."""

import pytest

from benchmarks.lib.memory_access import (
    Access,
    Blocked,
    Linear,
    Swizzled,
    accesses,
    scattered_words,
    sectors,
    wavefronts,
)

PLAIN = Swizzled(vector=1, per_phase=1, phases=1, fast=1)
ROWS_FIRST = Blocked((1, 16), (32, 1), (1, 1), (1, 0))
"""Each lane has 16 neighbouring elements of a row of its own."""
COLUMNS_FIRST = Blocked((1, 16), (4, 8), (1, 1), (1, 0))
"""Eight lanes share a row of 128."""


def access(layout, shape, memory=PLAIN, bits=8):
    return Access(shape, bits, layout.linear(shape), memory, True, False)


def test_lanes_on_neighbouring_bytes():
    """32 lanes of 16 bytes are 512: four wavefronts of 128, sixteen sectors of 32."""
    copy = access(COLUMNS_FIRST, (4, 128))
    assert wavefronts(copy) == (4, 4)
    assert sectors(copy) == (16, 16)


def test_lanes_on_rows_of_128_bytes_meet_in_the_same_banks():
    """Eight lanes at a time need the same four banks; half of every sector is not wanted."""
    copy = access(ROWS_FIRST, (32, 128))
    assert wavefronts(copy) == (8 * 32, 32)
    assert sectors(copy) == (8 * 32, 8 * 32)
    narrow = access(Blocked((1, 16), (32, 1), (1, 1), (1, 0)), (32, 16))
    assert sectors(narrow) == (32, 32), "16 bytes of a row cannot be less than a sector"


def test_two_warps_that_share_sectors():
    """A row of 32 bytes in two halves, a warp each: every sector is fetched twice."""
    halves = Blocked((1, 16), (32, 1), (1, 2), (1, 0))
    assert sectors(access(halves, (32, 32))) == (64, 64)
    scattered = Linear(
        register=((0, 1), (0, 2)),
        lane=((0, 64), (0, 128), (0, 256), (0, 512), (0, 1024)),
        warp=(),
    )
    assert sectors(Access((1, 2048), 8, scattered, None, True, False)) == (32, 4)


def test_a_swizzle_separates_rows():
    swizzle = Swizzled(vector=16, per_phase=1, phases=8, fast=1)
    assert wavefronts(access(ROWS_FIRST, (32, 128), swizzle)) == (32, 32)
    assert wavefronts(access(COLUMNS_FIRST, (4, 128), swizzle)) == (4, 4)


def test_lanes_that_want_the_same_word_share_it():
    same = Linear(register=((0, 0),), lane=((0, 0),) * 5, warp=())
    assert wavefronts(Access((1, 4), 32, same, PLAIN, False, False)) == (1, 1)


def test_eight_bytes_a_lane():
    """Sixteen lanes at a time: 128 bytes in one wavefront, or all of them in the same two banks."""
    assert wavefronts(access(Blocked((1, 1), (1, 32), (1, 1), (1, 0)), (1, 32), bits=64)) == (2, 2)
    column = Linear(((0, 0),), tuple((1 << bit, 0) for bit in range(5)), ())
    assert wavefronts(Access((32, 16), 64, column, PLAIN, False, False)) == (2 * 16, 2)


def test_a_blocked_layout_repeats_and_is_shared():
    layout = Blocked((1, 4), (16, 2), (2, 1), (1, 0)).linear((64, 8))
    assert layout.place(3, 0, 0) == (0, 3)
    assert layout.place(0, 1, 0) == (0, 4)
    assert layout.place(0, 2, 0) == (1, 0)
    assert layout.place(0, 0, 1) == (16, 0)
    assert layout.place(4, 0, 0) == (32, 0), "the block covers 32 rows"
    small = Blocked((1, 4), (16, 2), (4, 1), (1, 0)).linear((16, 8))
    assert small.place(0, 0, 1) == (0, 0), "warps beyond the tensor have the elements of others"


TTGIR = """\
#blocked = #ttg.blocked<{sizePerThread = [1, 16], threadsPerWarp = [4, 8], warpsPerCTA = [1, 1], \
order = [1, 0]}>
#linear = #ttg.linear<{register = [[0, 1], [0, 2]], lane = [[0, 4], [0, 8], [1, 0], [2, 0], \
[4, 0]], warp = [], block = []}>
#shared = #ttg.swizzled_shared<{vec = 16, perPhase = 1, maxPhase = 8, order = [1, 0]}>
#shared1 = #ttg.nvmma_shared<{swizzlingByteWidth = 64, transposed = false, elementBitWidth = 8}>
    %0 = tt.load %p : tensor<64x128x!tt.ptr<i8>, #blocked>
    %t = scf.for %i = %a to %b step %c iter_args(%arg = %cst) -> (tensor<16xf32>) : i32 {
      %1 = ttg.local_load %m token %k : !ttg.memdesc<8x16xi8, #shared, #smem, mutable> -> \
tensor<8x16xi8, #linear>
      %2 = ttg.async_copy_global_to_local %p, %m mask %n {contiguity = 16 : i32} : \
tensor<4x128x!tt.ptr<i8>, #blocked> -> <4x128xi8, #shared1, #smem, mutable>
      %3 = tt.load %q : tensor<4x128x!tt.ptr<i64>, #blocked>
    }
"""


def test_reading_intermediate_code():
    load, copy, indirect = accesses(TTGIR)
    assert (load.shape, load.bits, load.reads_global) == ((8, 16), 8, False)
    assert load.memory == Swizzled(16, 1, 8, 1)
    assert load.threads.place(1, 4, 0) == (1, 1)
    assert (copy.shape, copy.reads_global, copy.indirect) == ((4, 128), True, False)
    assert copy.memory == Swizzled(16, 2, 4, 1, tile=64)
    assert copy.memory.offset((2, 80), (4, 128)) == 4 * 64 + 2 * 64 + (1 ^ 1) * 16
    assert (indirect.memory, indirect.indirect) == (None, True)


@pytest.mark.parametrize(
    ("size", "pack", "kind", "found"),
    [
        ("[1, 1, 4]", 4, "i16", []),
        ("[1, 1, 4]", 2, "i16", []),
        ("[1, 1, 1]", 1, "i16", []),
        ("[1, 1, 1]", 2, "i16", ["2 of 8x4x8 in #mine"]),
        ("[1, 2, 1]", 2, "i16", ["2 of 8x4x8 in #mine"]),
        ("[1, 1, 2]", 4, "i8", ["4 of 8x4x8 in #mine"]),
        ("[1, 1, 1]", 4, "f32", []),  # each is a word
    ],
)
def test_words_of_elements_that_are_no_neighbours(size, pack, kind, found):
    code = f"""
#mine = #ttg.blocked<{{sizePerThread = {size}, threadsPerWarp = [1, 4, 8], warpsPerCTA = [4, 1, 1],\
 order = [2, 1, 0]}}>
  %y:2 = tt.elementwise_inline_asm "{{\\0Aand.b32 t, $2, 7;\\0A}}" {{constraints = "=r,=r,r",\
 packed_element = {pack} : i32, pure = true}} %x : tensor<8x4x8x{kind}, #mine> ->\
 tensor<8x4x8xi16, #mine>, tensor<8x4x8xi16, #mine> loc(#loc1)
"""
    assert scattered_words(code) == found


def test_code_without_a_loop():
    with pytest.raises(AssertionError, match="no loop"):
        accesses("")
