"""docs/training_traffic.md is what its command prints, and within the budget."""

import pathlib
import re
import runpy

ROOT = pathlib.Path(__file__).parents[1]


def test_the_table_is_up_to_date(capsys):
    runpy.run_path(str(ROOT / "benchmarks" / "training_traffic.py"))["main"]()
    printed = capsys.readouterr().out
    assert printed == (ROOT / "docs" / "training_traffic.md").read_text()
    total, budget = map(float, re.search(r"Together ([\d.]+); the budget of passes is ([\d.]+)\.", printed).groups())
    assert total <= budget
