"""A block's passes over its maps: which launch reads and writes which of them, found in what was recorded."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from effkernels.profiling.launches import Launch
from effkernels.profiling.workload import BACKWARD


class Lane(NamedTuple):
    """The maps of a block of one shape on one side of its depthwise convolution, and their gradients."""

    shape: tuple[int, ...]  # [C, H, W]
    behind: bool


class Pass(NamedTuple):
    """A launch, and how often it goes over the maps of each lane."""

    launch: Launch
    reads: dict[Lane, float]
    writes: dict[Lane, float]


def passes_of(launches: Sequence[Launch]) -> list[Pass]:
    """Of the launches of one block, in order, those that touch a map."""
    lanes: dict[int, Lane] = {}  # of memory
    behind, passes = False, []
    for launch in launches:
        convolves, backward = launch.flops.depthwise > 0, launch.phase == BACKWARD
        found = Pass(launch, defaultdict(float), defaultdict(float))
        for touch in launch.touches:
            if touch.is_map and touch.memory not in lanes:
                # The convolution leads from one side to the other, and back.
                side = (touch.written > 0) != backward if convolves else behind
                lanes[touch.memory] = Lane(touch.shape[1:], side)
            if touch.memory in lanes:
                lane = lanes[touch.memory]
                found.reads[lane] += touch.read / touch.size
                found.writes[lane] += touch.written / touch.size
        if convolves:
            behind = not backward
        if found.reads or found.writes:
            passes.append(found)
    return passes


def lanes_of(passes: Iterable[Pass]) -> list[Lane]:
    """All lanes, from the input to the output."""
    found = dict.fromkeys(lane for launch in passes for lane in (*launch.reads, *launch.writes))
    return sorted(found, key=lambda lane: lane.behind)


def names_of(lanes: Sequence[Lane]) -> list[str]:
    """What an MBConv's maps are called, with their shapes; only these where there is no depthwise convolution."""
    shapes = ["x".join(map(str, lane.shape)) for lane in lanes]
    after = sum(lane.behind for lane in lanes)
    mbconv = {(1, 2): ["x", "E2", "y"], (2, 2): ["x", "E1", "E2", "y"]}
    names = mbconv.get((len(lanes) - after, after), [""] * len(lanes))
    return [f"{name}\n{shape}" if name else shape for name, shape in zip(names, shapes, strict=True)]
