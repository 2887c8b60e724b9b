"""`python -m benchmarks` runs all benchmarks, `python -m benchmarks NAME` one, `--help` lists them.

They use this machine's loopback alone, and end by themselves.
"""

from __future__ import annotations

import click

from benchmarks import churn, goals, outage, storm, stuck


@click.group(invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]})
@click.pass_context
def main(context: click.Context) -> None:
    """What chatd costs, measured beside the plain way of doing the same. Without a name: all of them."""
    if context.invoked_subcommand is None:
        click.echo(f"Benchmarks: {', '.join(main.commands)}. --help tells more.\n")
        for command in main.commands.values():
            context.invoke(command)


for module in (goals, outage, stuck, storm, churn):
    main.add_command(module.command)

if __name__ == "__main__":
    main(prog_name="python -m benchmarks")
