"""The table of compiled GPU kernels: what reads machine code reads it right."""

import importlib
import pathlib
import subprocess

import pytest

from effkernels import ops

triton = pytest.importorskip("triton", reason="triton is not installed")

from effkernels.profiling import compiled  # noqa: E402
from effkernels.profiling.machine_code import CHIPS, kernels, occupancy  # noqa: E402

PTX = """
.version 8.0
.target {arch}
.address_size 64
.visible .entry planted(.param .u64 x) .maxntid 96, 1, 1 {{
  .reg .b32 %r<9>; .reg .b64 %d<4>; .reg .b16 %h; .local .align 4 .b8 array[1024]; .shared .b32 slot[8];
  ld.param.u64 %d1, [x];
  cvta.to.global.u64 %d1, %d1;
  ld.global.v4.u32 {{%r1, %r2, %r3, %r4}}, [%d1];
  mma.sync.aligned.m16n8k8.row.col.f16.f16.f16.f16 {{%r5, %r6}}, {{%r1, %r2}}, {{%r3}}, {{%r1, %r4}};
  st.shared.u32 [slot], %r5;
  mov.u64 %d2, array;
  and.b32 %r7, %r6, 255;
  mul.wide.u32 %d3, %r7, 4;
  add.u64 %d2, %d2, %d3;
  st.local.u32 [%d2], %r5;
  mov.u64 %d2, array;
  and.b32 %r7, %r5, 255;
  mul.wide.u32 %d3, %r7, 4;
  add.u64 %d2, %d2, %d3;
  ld.local.u32 %r8, [%d2];
  cvt.u16.u32 %h, %r8;
  st.global.u16 [%d1], %h;
  ret;
}}
"""


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_machine_code_is_read_right(arch, tmp_path):
    source, cubin = tmp_path / "planted.ptx", tmp_path / "planted.cubin"
    source.write_text(PTX.format(arch=arch))
    subprocess.run([triton.knobs.nvidia.ptxas.path, f"-arch={arch}", source, "-o", cubin], check=True)
    (kernel,) = kernels(cubin.read_bytes(), arch)
    assert (kernel.name, kernel.threads, kernel.shared, kernel.matrix) == ("planted", 96, 32, "HMMA")
    assert (kernel.load, kernel.store) == (128, 16)
    assert kernel.local >= 2
    assert kernel.stack >= 1024
    assert 8 <= kernel.registers <= 32


@pytest.mark.parametrize(
    "arch, threads, registers, shared, percent",
    [
        ("sm_80", 256, 32, 0, 100),
        ("sm_80", 256, 65, 0, 38),  # 72 registers: 28 warps, of which blocks of 8 take 24
        ("sm_80", 32, 16, 0, 50),  # 32 blocks
        ("sm_90", 128, 255, 0, 12),
        ("sm_86", 128, 32, 48 << 10, 17),  # two blocks in 100 KB
        ("sm_75", 128, 32, 32 << 10, 25),
    ],
)
def test_occupancy(arch, threads, registers, shared, percent):
    assert occupancy(CHIPS[arch], threads, registers, shared) == percent


def test_every_triton_kernel_is_launched():
    defined = set()
    for file in pathlib.Path(ops.__file__).parent.rglob("*triton.py"):
        name = ".".join(file.relative_to(pathlib.Path(ops.__file__).parent).with_suffix("").parts)
        module = importlib.import_module(f"effkernels.ops.{name}")
        defined |= {
            value.__name__ for value in vars(module).values() if getattr(value, "__name__", "").endswith("_kernel")
        }
    assert defined == {kernel for kernel, _ in compiled.triton_launches("sm_80")}


def test_every_file_and_function_that_is_compiled_counts():
    launch = next(
        launch for (kernel, _), launch in compiled.triton_launches("sm_80").items() if kernel == "dwconv_kernel"
    )
    texts = "".join(compiled._with_callees(launch["fn"]))
    assert "def dwconv_kernel" in texts
    assert "def chan_reduce" in texts  # called by what it calls
    source = next(source for source in compiled._build.sources("dwconv/cuda_kernel.cu"))
    files = {path.name for path in compiled._with_headers(source)}
    assert files >= {"cuda_kernel.cu", "kernel.cuh", "plan.h", "moments.h", "activation.h"}
    assert not files & {"vec.h", "cpu_kernel.h"}


def test_table_is_up_to_date():
    table = compiled.read()
    if f"triton {triton.__version__}" not in {row.compiler for row in table}:
        pytest.skip("the table was made with another version of Triton")
    assert compiled.out_of_date(table) == [], "run `python -m effkernels.profiling.compiled`"
    assert compiled.SUMMARY.read_text() == compiled.summary(table)


def test_no_kernel_uses_local_memory():
    assert [row for row in compiled.read() if row.local or row.stack] == []
