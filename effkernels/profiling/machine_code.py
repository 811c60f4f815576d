"""What a file of NVIDIA machine code says of its kernels, read with the tools that come with Triton."""

import re
import subprocess
import tempfile
from typing import NamedTuple

import triton


class Chip(NamedTuple):
    """What a multiprocessor holds at a time (CUDA C++ Programming Guide, technical specifications)."""

    threads: int
    blocks: int
    shared: int  # bytes
    reserved: int = 1024  # of them, for each block
    registers: int = 65536


CHIPS = {
    "sm_75": Chip(1024, 16, 64 << 10, reserved=0),
    "sm_80": Chip(2048, 32, 164 << 10),
    "sm_86": Chip(1536, 16, 100 << 10),
    "sm_89": Chip(1536, 24, 100 << 10),
    "sm_90": Chip(2048, 32, 228 << 10),
    "sm_100": Chip(2048, 32, 228 << 10),
    "sm_120": Chip(1536, 24, 100 << 10),
}


class Kernel(NamedTuple):
    name: str  # mangled
    threads: int  # of a block, at most
    registers: int  # of a thread
    local: int  # instructions that load or store local memory: spilled registers, or arrays
    stack: int  # bytes of a thread
    shared: int  # bytes of a block that are known to the compiler
    load: int  # bits of the widest access to global memory
    store: int
    matrix: str  # the matrix instruction, if there is one


OPCODE = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)", re.MULTILINE)
MATRIX = re.compile(r"(?:[A-Z]G?|UTC\w*)MMA")


def kernels(code: bytes, arch: str) -> list[Kernel]:
    """The kernels of a cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(code)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", "-elf", "-sass", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    usage = dict(re.findall(r"^ Function (\S+):\n\s+(.+)$", text, re.MULTILINE))
    attributes = dict(re.findall(r"^\.nv\.info\.(\S+)\n((?:[^.].*\n)*)", text, re.MULTILINE))
    listings = dict(re.findall(r"^\s+Function : (\S+)\n((?:\s+[./].*\n)*)", text, re.MULTILINE))
    # From Hopper on, what is reserved is counted too, if there is anything.
    counted = CHIPS[arch].reserved if int(arch.removeprefix("sm_")) >= 90 else 0
    found = []
    for name, resources in usage.items():
        size = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", resources)}
        threads = re.search(r"EIATTR_(?:MAX_THREADS|REQNTID)\n.*\n\s*Value:\s+(\S+)", attributes[name])
        assert threads, f"{name} has no launch bounds"
        opcodes = OPCODE.findall(listings[name])
        found.append(
            Kernel(
                name=name,
                threads=int(threads[1], 16),
                registers=size["REG"],
                local=sum(opcode.startswith(("LDL", "STL")) for opcode in opcodes),
                stack=size["STACK"],
                shared=max(size["SHARED"] - counted, 0),
                load=_widest(opcodes, "LDG", "LD."),
                store=_widest(opcodes, "STG", "ST."),
                matrix=next((opcode.split(".")[0] for opcode in opcodes if MATRIX.match(opcode)), ""),
            )
        )
    return found


def _widest(opcodes: list[str], *names: str) -> int:
    """Bits of the widest of the accesses called `names`; 0 where there is none."""
    accesses = [opcode for opcode in opcodes if opcode.startswith(names)]
    widths = (re.search(r"\.[US]?(8|16|64|128|256)\b", access) for access in accesses)
    return max((int(width[1]) if width else 32 for width in widths), default=0)


def occupancy(chip: Chip, threads: int, registers: int, shared: int) -> int:
    """Percent of a multiprocessor's warps that blocks of this kind can fill."""
    warps = -(-threads // 32)
    per_warp = -(-registers * 32 // 256) * 256
    fitting = chip.registers // per_warp // 4 * 4  # warps, spread evenly over four schedulers
    blocks = min(chip.blocks, chip.threads // 32 // warps, fitting // warps)
    if shared:
        blocks = min(blocks, chip.shared // (shared + chip.reserved))
    return round(100 * blocks * warps * 32 / chip.threads)
