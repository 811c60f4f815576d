import re

import torch
from typer.testing import CliRunner

import effkernels
from effkernels import _native
from effkernels.cli import app


def test_version():
    result = CliRunner().invoke(app, ["--version"])
    assert (result.exit_code, result.output) == (0, f"{effkernels.__version__}\n")


def test_doctor_names_every_backend_and_why_it_does_not_run():
    result = CliRunner().invoke(app, ["doctor"], env={"COLUMNS": "300"})
    assert result.exit_code == 0, result.output
    assert f"torch        │ {torch.__version__}" in result.output
    runs = dict(re.findall(r"│ (cpp|cuda|triton|eager) +│ (yes|no) ", result.output))
    assert runs.keys() == {"cpp", "cuda", "triton", "eager"}
    assert runs["eager"] == "yes"
    assert runs["cpp"] == ("no" if _native.MISSING["cpp"] else "yes")
    for reason in filter(None, _native.MISSING.values()):
        assert reason in result.output
