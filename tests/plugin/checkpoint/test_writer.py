"""Writing safetensors files in pieces: any reader finds what was given."""

import io
import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load

from dialect_plugin.checkpoint.writer import ShardWriter, StoredTensor

DTYPES = {
    "U8": torch.uint8,
    "I8": torch.int8,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
}

tensors = st.dictionaries(
    st.text(min_size=1).filter(lambda name: name != "__metadata__"),
    st.tuples(st.sampled_from(sorted(DTYPES)), st.lists(st.integers(0, 5), max_size=3)),
    max_size=8,
)


def described(shapes):
    return {
        name: StoredTensor(dtype, tuple(shape), math.prod(shape) * DTYPES[dtype].itemsize)
        for name, (dtype, shape) in shapes.items()
    }


@given(shapes=tensors, piece=st.integers(1, 50), data=st.data())
def test_the_library_reads_what_was_written(shapes, piece, data):
    header = described(shapes)
    contents = {
        name: data.draw(st.binary(min_size=t.nbytes, max_size=t.nbytes))
        for name, t in header.items()
    }
    file = io.BytesIO()
    writer = ShardWriter(file, header)
    for begin in range(0, max((t.nbytes for t in header.values()), default=0), piece):
        for name, content in contents.items():  # interleaved, as codes and meta bytes are
            writer.append(name, content[begin : begin + piece])
    writer.finish()
    read = load(file.getvalue())
    assert read.keys() == header.keys()
    for name, tensor in read.items():
        assert tensor.dtype == DTYPES[header[name].dtype]
        assert tuple(tensor.shape) == header[name].shape
        stored = tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()
        assert stored == contents[name]
    length = int.from_bytes(file.getvalue()[:8], "little")
    for name, entry in json.loads(file.getvalue()[8 : 8 + length]).items():
        if name in read and read[name].numel():  # aligned in memory-mapped files
            assert (8 + length + entry["data_offsets"][0]) % DTYPES[entry["dtype"]].itemsize == 0


def test_too_many_or_too_few_bytes():
    writer = ShardWriter(io.BytesIO(), {"a": StoredTensor("U8", (3,), 3)})
    writer.append("a", b"xy")
    with pytest.raises(ValueError, match="a: 1 of its bytes were not written"):
        writer.finish()
    with pytest.raises(ValueError, match="a: got more bytes"):
        writer.append("a", b"xy")
