"""docs/training_traffic.md is what its command prints, and within the budgets."""

import pathlib
import re
import runpy

ROOT = pathlib.Path(__file__).parents[1]


def test_the_table_is_up_to_date(capsys):
    runpy.run_path(str(ROOT / "benchmarks" / "training_traffic.py"))["main"]()
    printed = capsys.readouterr().out
    assert printed == (ROOT / "docs" / "training_traffic.md").read_text()
    tables = re.findall(r"Together ([\d.]+); the budget of passes is ([\d.]+)\.", printed)
    assert len(tables) == 2
    assert all(float(total) <= float(budget) for total, budget in tables)
