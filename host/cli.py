"""The `typebar` command."""

from __future__ import annotations

import io
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from typebar.host import cli_check, cli_doctor, cli_explore, cli_model, cli_report, cli_rtl, cli_tools
from typebar.host.cli_errors import guarded

app = typer.Typer(
    name="typebar",
    help="Compile GPT and T5 models to accelerator images, simulate them to the bit and the cycle, and generate text.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

for _command in (
    cli_check.check,
    cli_model.compile_,
    cli_model.run,
    cli_model.simulate,
    cli_report.report,
    cli_explore.explore,
    cli_check.compare,
    cli_tools.disasm,
    cli_tools.asm,
    cli_tools.opt,
    cli_tools.machines,
    cli_tools.models,
    cli_tools.unary_errors,
    cli_rtl.rtl,
    cli_doctor.doctor,
):
    app.command(name=_command.__name__.rstrip("_").replace("_", "-"))(_command)


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        from importlib.metadata import version as installed

        print(f"typebar {installed('typebar')}")
    elif context.invoked_subcommand is None:
        print(context.get_help())


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status (see `cli_errors`)."""

    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # generated text may not fit the terminal's encoding

    def run() -> int:
        if sys.stdout is None:  # closed by the caller, as `>&-` does
            raise OSError("standard output is closed: send it somewhere, for example to /dev/null")
        status = app(args=arguments, prog_name="typebar", standalone_mode=False)
        sys.stdout.flush()
        return status if isinstance(status, int) else 0

    return guarded(run)


if __name__ == "__main__":
    sys.exit(main())
