"""`effkernels bench compare`: what changed between two saved runs of the benchmarks."""

import json
import pathlib
import statistics
from typing import Annotated, Any, NamedTuple

import typer
from rich import box
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from effkernels.profiling import Spread

bench = typer.Typer(help="What to do with runs of the benchmarks.", no_args_is_help=True)
_File = Annotated[
    pathlib.Path, typer.Argument(exists=True, dir_okay=False, help="JSON of `pytest --benchmark-json FILE`.")
]


class Measured(NamedTuple):
    """What an implementation took in a case, in milliseconds or MiB."""

    unit: str
    spread: Spread


class Change(NamedTuple):
    """A measurement of both runs."""

    name: str
    before: Measured
    after: Measured

    @property
    def ratio(self) -> float:
        return self.after.spread.median / self.before.spread.median

    @property
    def exceeds_spread(self) -> bool:
        """Whether no half of the one run's samples about its median meets that of the other."""
        before, after = self.before.spread, self.after.spread
        return after.low > before.high or after.high < before.low


@bench.callback()
def _group() -> None:
    pass  # keeps `compare` a subcommand while it is the only one


@bench.command()
def compare(
    before: _File,
    after: _File,
    everything: Annotated[bool, typer.Option("--all", help="Also show what changed less than its spread.")] = False,
) -> None:
    """Show what changed between two runs: ratios of medians, quartiles, and what only one of them has."""
    console = Console()
    runs = json.loads(before.read_text()), json.loads(after.read_text())
    measured = [measurements(run) for run in runs]
    if not all(measured):
        console.print("compare: a file holds no samples of this project's benchmarks", style="red")
        raise typer.Exit(1)
    for fact, values in _differences(*runs).items():
        console.print(f"[yellow]not the same {fact}:[/] {values[0]} before, {values[1]} after", highlight=False)
    both = [Change(name, old, measured[1][name]) for name, old in measured[0].items() if name in measured[1]]
    changed = [change for change in both if change.exceeds_spread]
    if shown := both if everything else changed:
        console.print(_table(shown))
    console.print(
        f"{len(changed)} of {len(both)} changed by more than their spread: the quartiles of the two runs do not meet."
    )
    ratios = [change.ratio for change in both if change.before.unit == "ms" and " eager" in change.name]
    if ratios:
        slower = statistics.median(ratios)
        console.print(f"Eager PyTorch itself took {slower:.2f} times as long after as before (median of its cases).")
    for title, own, other in (("before", *measured), ("after", *measured[::-1])):
        for name in own:
            if name not in other:
                console.print(Text(f"only {title}: {name}"))


def measurements(run: dict[str, Any]) -> dict[str, Measured]:
    """The samples of a saved run, by case and implementation."""
    return {
        f"{case['name'].removeprefix('test_')} {implementation}": Measured(info["unit"], _spread(samples))
        for case in run["benchmarks"]
        if "samples" in (info := case["extra_info"])
        for implementation, samples in info["samples"].items()
    }


def _spread(samples: list[float]) -> Spread:
    return Spread.of(samples if len(samples) > 1 else 2 * samples)


def _differences(before: dict[str, Any], after: dict[str, Any]) -> dict[str, tuple[str, str]]:
    """What both runs depend on and have not in common."""
    old, new = (run["machine_info"].get("effkernels", {}) for run in (before, after))
    changing = ("clocks", "temperature", "power")
    names = [name for name in dict.fromkeys([*old, *new]) if not name.startswith(changing)]
    pairs = {name: (old.get(name, "unknown"), new.get(name, "unknown")) for name in names}
    pairs["commit"] = _commit(before), _commit(after)
    return {name: values for name, values in pairs.items() if values[0] != values[1]}


def _commit(run: dict[str, Any]) -> str:
    info = run["commit_info"]
    return f"{info.get('id', 'unknown')[:10]}{' and uncommitted changes' if info.get('dirty') else ''}"


def _table(changes: list[Change]) -> Table:
    numbers = ("before", "quartiles", "after", "quartiles", "after / before", "")
    columns = [Column("", overflow="fold"), *(Column(name, justify="right", no_wrap=True) for name in numbers)]
    table = Table(*columns, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for change in sorted(changes, key=lambda change: change.ratio):
        cells: list[str] = []
        for unit, spread in (change.before, change.after):
            cells += [f"{spread.median:.3g} {unit}", f"{spread.low:.3g}-{spread.high:.3g}"]
        mark = ("[green]less" if change.ratio < 1 else "[red]more") if change.exceeds_spread else ""
        table.add_row(Text(change.name), *cells, f"{change.ratio:.2f}", mark)
    return table
