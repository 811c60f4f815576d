"""Tiles of CUDA launches: those that heuristics choose, and what is asked for in place of these."""

import ctypes
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch.utils._python_dispatch import TorchDispatchMode

from effkernels import _native

Tile = tuple[int, ...]

_OF_ROWS = ("group", "strips", "width")
# Of each op, what the numbers of its tiles are.
NUMBERS: dict[str, Sequence[str]] = {
    "expand_dwconv": _OF_ROWS,
    "expand_dwconv_backward": _OF_ROWS,
    "dwconv": _OF_ROWS,
    "dwconv_backward": _OF_ROWS,
    "pointwise_inference": ("pixels", "channels"),
}
# Tiles by problem, or of all problems of an op by its name; and the function that asked for each.
asked_for: dict[str, tuple[Tile, str]] = {}


def op_of(problem: str) -> str:
    return problem.partition(" ")[0]


class Launch(NamedTuple):
    """One that was recorded: the problem in words, the tile taken, and those of the heuristic, the cheapest first."""

    problem: str
    tile: Tile
    tiles: tuple[Tile, ...]

    def __str__(self) -> str:
        return ", ".join(f"{name} {n}" for name, n in zip(NUMBERS[self.op], self.tile, strict=True))

    @property
    def op(self) -> str:
        return op_of(self.problem)

    @property
    def by(self) -> str:
        """Who asked for the tile; "" if the heuristic chose it."""
        return (asked_for.get(self.op) or asked_for.get(self.problem) or ((), ""))[1]


def ask(name: str, tile: Tile, by: str) -> None:
    """For a tile of a problem, or of all problems of an op; of no numbers: for the heuristic's."""
    assert _native.launchers
    _native.launchers.effkernels_ask_for_tile(name.encode(), (ctypes.c_int * len(tile))(*tile), len(tile))
    if tile:
        asked_for[name] = tile, by
    else:
        asked_for.pop(name, None)


@contextmanager
def asking(name: str, tile: Tile, by: str) -> Iterator[None]:
    before = asked_for.get(name, ((), ""))
    ask(name, tile, by)
    try:
        yield
    finally:
        ask(name, *before)


@contextmanager
def use_tile(launches: str, **tile: int) -> Iterator[None]:
    """Set the tile of CUDA launches inside a `with` block, whatever their heuristic or `effkernels.autotune` chose.

    >>> with effkernels.ops.use_tile("expand_dwconv", group=32, strips=1, width=14):
    ...     y = block(x)

    A launch that the tile does not fit raises ValueError, which tells what fits. A block is expanded inside the kernel
    of expand_dwconv if a tile of that is set. The setting belongs to the process, not to a thread.

    Args:
        launches: of an op: expand_dwconv, dwconv, expand_dwconv_backward, dwconv_backward or pointwise_inference; or
            of one of its problems, as `effkernels.autotune` names it.
        tile: its numbers, group, strips and width (a group of channels by strips of seven rows by columns; backward
            with stride 2, a strip is eight rows of the input and a column two); of pointwise_inference pixels and
            channels.

    Raises:
        ValueError: there is no such op, or its tiles have other numbers, or one is not positive.
        RuntimeError: there are no CUDA kernels.
    """
    op = op_of(launches)
    if op not in NUMBERS:
        raise ValueError(f"use_tile: launches must be of one of {', '.join(NUMBERS)}, got {launches!r}")
    names = NUMBERS[op]
    if {*tile} != {*names} or not all(isinstance(n, int) and 0 < n < 2**31 for n in tile.values()):
        raise ValueError(f"use_tile: a tile of {op} is {', '.join(names)}, positive integers, got {tile}")
    if _native.launchers is None:
        raise RuntimeError(f"use_tile: there are no CUDA kernels: {_native.MISSING['cuda']}")
    with asking(launches, tuple(tile[name] for name in names), "use_tile"):
        yield


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """The launches of what runs inside the block; the list is filled at its end."""
    assert _native.launchers
    record = _native.launchers.effkernels_record_launches
    record.restype = ctypes.c_char_p
    launches: list[Launch] = []
    record(True)
    try:
        yield launches
    finally:
        for problem, tile, tiles in json.loads(record(False)):
            launches.append(Launch(problem, tuple(tile), tuple(dict.fromkeys(map(tuple, tiles)))))


class Watch(TorchDispatchMode):
    """Calls told(run, launches) after each op of ours under it; run() calls that once more."""

    def __init__(self, told: Callable[[Callable[[], Any], list[Launch]], None]) -> None:
        super().__init__()
        self._told = told

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def run() -> Any:
            return func(*args, **(kwargs or {}))

        if func.namespace != "effkernels" or _native.launchers is None:
            return run()
        with recorded() as launches:
            result = run()
        self._told(run, launches)
        return result
