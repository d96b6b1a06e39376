"""Tables on a device: each made once, and all of them known to whoever must write them again."""

import ast
from pathlib import Path

import torch

import dialect_kernels
from dialect_kernels import quantize
from dialect_kernels.device_tables import kept_tables, tables_on

CPU = torch.device("cpu")


def test_a_table_is_made_once_and_known():
    made = []

    @kept_tables
    def table(value: int, device: torch.device) -> torch.Tensor:
        made.append(value)
        return torch.full((3,), value, device=device)

    first = table(7, CPU)
    assert table(7, CPU) is first
    assert table(8, device=CPU) is not first
    assert made == [7, 8]
    assert any(kept is first for kept in tables_on(CPU))
    assert not tables_on(torch.device("meta"))
    count = len(tables_on(CPU))
    del table, first
    assert len(tables_on(CPU)) == count - 2, "they live as long as somebody holds them"


def test_a_table_that_is_first_needed_for_inference_can_be_written_later():
    @kept_tables
    def table(device: torch.device) -> torch.Tensor:
        return torch.zeros(3, device=device)

    with torch.inference_mode():
        made = table(CPU)
    made.fill_(1)
    assert made.tolist() == [1, 1, 1]


def test_values_come_back_with_the_tables():
    p = quantize(torch.randn(8, 64))
    want = p.dequantize()
    held = [(table, table.clone()) for table in tables_on(CPU)]
    try:
        for table, _ in held:
            table.view(torch.uint8).fill_(0x5A)
        assert not torch.equal(p.dequantize(), want)
    finally:
        for table, values in held:
            table.copy_(values)
    assert torch.equal(p.dequantize(), want)


def test_no_tensor_is_kept_in_another_way():
    """A cached function that returns a tensor, but not by `kept_tables`, would not be found."""
    found = []
    for path in Path(dialect_kernels.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.FunctionDef) or node.returns is None:
                continue
            decorators = {ast.unparse(each).partition("(")[0] for each in node.decorator_list}
            if {"cache", "lru_cache"} & decorators and "Tensor" in ast.unparse(node.returns):
                found.append(f"{path.name}: {node.name}")
    assert found == ["device_tables.py: kept"]
