"""Tiles of CUDA launches, chosen by time."""

import statistics
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from effkernels import _cache, _native, verify
from effkernels.nn.graphs import check_inference
from effkernels.ops import _tiles
from effkernels.ops._tiles import Launch, Tile

CONTENDERS = 5
ROUNDS, CALLS = 10, 10  # each contender's turns, and what is timed in each


def autotune(model: nn.Module, example: Tensor) -> dict[str, tuple[int, ...]]:
    """Find the fastest tiles of a model's CUDA launches in inference, and take them in this process from now on.

    The model is run once. Of each of its launches' problems (op, shapes, dtype) the five tiles that are cheapest by the
    heuristic are timed; that takes a second or so. The fastest is kept in the user's cache too, by GPU and version of
    the kernels, so that the next process that calls this for the same problem times nothing.

    Tiles differ in speed only, not in what is computed: sums are added up in another order. A graph that was captured
    before keeps those that it has. `effkernels.explain` tells which launches have tuned tiles.

    Args:
        model: on a CUDA device, in eval mode, converted or not.
        example: an input, of the shape, dtype and memory layout that the model is to be fast on.

    Returns:
        The tile of each problem, as `effkernels.ops.use_tile` takes it; none where no CUDA C++ kernel ran.

    Raises:
        TypeError: `model` is not an `nn.Module`, or `example` not a tensor.
        ValueError: `example` is not on a CUDA device, or `model` is in training mode.
        RuntimeError: there are no CUDA kernels, a CUDA graph is being captured, or `use_tile` holds a tile.
    """
    check_inference("autotune", model, example)
    if _native.MISSING["cuda"] is not None:
        raise RuntimeError(f"autotune: there are no CUDA kernels: {_native.MISSING['cuda']}")
    if verify.is_capturing():
        raise RuntimeError("autotune: a CUDA graph is being captured; call it before")
    held = [name for name, (_, by) in _tiles.asked_for.items() if by == "use_tile"]
    if held:
        raise RuntimeError(f"autotune: use_tile holds a tile of {', '.join(held)}; call it outside of that block")
    place = "tiles", verify.device_name(str(example.device)), verify.version()
    known = _cache.load(*place) or {}
    found: dict[str, Tile] = {}

    def tune(run: Callable[[], Any], launches: list[Launch]) -> None:
        for launch in launches:
            if launch.problem not in found:
                found[launch.problem] = launch.tile if launch.by else _fastest(run, launch, known)
                _tiles.ask(launch.problem, found[launch.problem], "autotune")

    with torch.no_grad(), torch.cuda.device_of(example), _tiles.Watch(tune):
        model(example)
    if any(known.get(problem) != [*tile] for problem, tile in found.items()):
        _cache.save(known | found, "the tiles that autotune found", *place)
    return found


def _fastest(run: Callable[[], Any], launch: Launch, known: dict[str, Any]) -> Tile:
    """The tile of a launch inside `run`: the `known` one, if it is one for this problem, else it is timed."""
    tiles = launch.tiles[:CONTENDERS]
    for tile in tiles:
        if [*tile] == known.get(launch.problem):
            return tile
    if len(tiles) == 1:
        return tiles[0]

    def with_tile(tile: Tile) -> None:
        with _tiles.asking(launch.problem, tile, "autotune"):
            run()

    times = _times([partial(with_tile, tile) for tile in tiles])
    return min(zip(times, tiles, strict=True), key=lambda timed: timed[0])[1]


def _times(runs: Sequence[Callable[[], Any]]) -> list[float]:
    """What each takes the GPU, in milliseconds, in turns.

    Calls are captured in graphs: the host launches small kernels more slowly than the GPU runs them.
    """
    graphs = [torch.cuda.CUDAGraph() for _ in runs]
    for run, graph in zip(runs, graphs, strict=True):
        with torch.cuda.graph(graph):
            for _ in range(CALLS):
                run()
        graph.replay()
    turns: list[list[tuple[torch.cuda.Event, torch.cuda.Event]]] = [[] for _ in runs]
    for _ in range(ROUNDS):
        for graph, events in zip(graphs, turns, strict=True):
            start = _event()
            graph.replay()
            events.append((start, _event()))
    torch.cuda.synchronize()
    return [statistics.median(start.elapsed_time(end) for start, end in events) / CALLS for events in turns]


def _event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event
