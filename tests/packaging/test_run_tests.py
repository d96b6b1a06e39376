"""The last line of `make test`, and what it is made of."""

from collections import Counter

import pytest

from tests.support.scripts import load_script


@pytest.fixture(scope="module")
def run_tests():
    return load_script("run_tests")


def test_the_last_line_is_pytests(run_tests):
    line = run_tests.last_line(Counter(passed=3192, skipped=178), 958.2)
    assert line.strip("= ") == "3192 passed, 178 skipped in 958.20s (0:15:58)"
    line = run_tests.last_line(Counter(failed=2, passed=5), 9.0)
    assert line.strip("= ") == "2 failed, 5 passed in 9.00s (0:00:09)"


def test_outcomes_of_a_report(run_tests, tmp_path):
    report = tmp_path / "junit.xml"
    report.write_text('<testsuites><testsuite tests="9" failures="1" errors="2" skipped="3"/>'
                      "</testsuites>")  # fmt: skip
    assert run_tests.outcomes(report) == Counter(failed=3, skipped=3, passed=3)
    assert run_tests.outcomes(tmp_path / "none.xml") == Counter()


def test_every_folder_of_a_stage_is_there(run_tests):
    arguments = [argument for _, _, given in run_tests.STAGES for argument in given]
    folders = [argument for argument in arguments if argument.startswith("tests")]
    folders.append(run_tests.INTERPRETED.removeprefix("--ignore="))
    assert len(folders) == 3
    assert all(list((run_tests.ROOT / folder).glob("test_*.py")) for folder in folders)
