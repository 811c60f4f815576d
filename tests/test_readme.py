"""README's Python examples run as they stand, one after another."""

import pathlib
import re

README = pathlib.Path(__file__).parents[1] / "README.md"


def test_examples_run(capsys):
    text = README.read_text()
    examples = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(examples) >= 2
    namespace: dict[str, object] = {}
    for example in examples:
        exec(compile(example, README.name, "exec"), namespace)
    output = capsys.readouterr().out
    assert "fused: 18 blocks" in output
    assert "torch.Size([2, 10])" in output


def test_links_to_files_of_the_repository_are_not_broken():
    for target in re.findall(r"\]\(([^)#:]+)\)", README.read_text()):
        assert (README.parent / target).exists(), target
