"""The `effkernels` command. Each subcommand is a function of a module of its own."""

from typing import Annotated

import typer

import effkernels
from effkernels.bench import bench
from effkernels.demo import demo
from effkernels.doctor import doctor
from effkernels.profile import profile
from effkernels.study import study

app = typer.Typer(help=effkernels.__doc__, no_args_is_help=True, add_completion=False)
app.command()(demo)
app.command()(doctor)
app.command()(study)
app.add_typer(bench, name="bench")
app.command()(profile)


def _print_version(requested: bool) -> None:
    if requested:
        typer.echo(effkernels.__version__)
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass
