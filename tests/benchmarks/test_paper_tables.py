"""The rows of the paper, beside what is measured on a tiny model."""

import pytest
from typer.testing import CliRunner

from benchmarks.language import paper_tables
from benchmarks.language.paper_tables import ROWS


def test_all_rows_of_a_tiny_model(tiny_model, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("def f(a):\n    return a\n" * 400)
    found = paper_tables.measured(tiny_model(intermediate_size=256), text, 2, 96)
    head, nothing, *rows = paper_tables.table(found)
    assert len(rows) == len(ROWS)
    assert [cell for cell in head if "published" in cell] == head[3:6]
    assert "measured" in head[6]
    assert nothing[:3] == ["nothing", "FP16", "16"]
    kl = {(row[0], row[1]): row[7] for row in rows}
    values = {key: float(value.split(" ± ")[0]) for key, value in kl.items()}
    assert all(value > 0 for value in values.values())
    linear = "linear layers"
    assert values[linear, "BlockDialect-16"] < values[linear, "BlockDialect-64"]
    assert values[linear, "BlockDialect-64, down_proj 16"] < values[linear, "BlockDialect-64"]
    mixed = "BlockDialect-64, down_proj/Q/K 16"
    assert values["all products", mixed] > values[linear, "BlockDialect-64, down_proj 16"]


def test_faults_are_one_sentence(tmp_path):
    import typer

    app = typer.Typer()
    app.command()(paper_tables.main)
    done = CliRunner().invoke(app, [str(tmp_path / "absent")])
    assert done.exit_code == 1
    assert done.stderr.startswith("paper_tables: ")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.scope}, {row.method}")
def test_rows_name_formats_that_can_be_evaluated(row):
    from dialect_plugin.evaluation.options import FormatName

    if row.measured != paper_tables.MIXED:
        FormatName.parse(row.measured)
