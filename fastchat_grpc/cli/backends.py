"""`fastchat-grpc backends`: what is installed here, and what each can do."""

from __future__ import annotations

import click

from fastchat_grpc.backends.capabilities import TRAITS, Feature, Traits

COLUMNS = ("backend", "installed", "runs on", "reads", "without")


@click.command()
@click.argument("name", required=False, type=click.Choice(list(TRAITS)))
@click.option("--markdown", is_flag=True, help="Print the table as Markdown.")
def backends(name: str | None, markdown: bool) -> None:
    """List the backends and what each supports; with NAME, one of them in full."""
    if name is not None:
        _print_one(name, TRAITS[name])
    elif markdown:
        click.echo(markdown_table())
    else:
        _print_all()


def markdown_table() -> str:
    """The table of the documentation: the same on every machine, so without what is installed."""
    rows = [(COLUMNS[0], *COLUMNS[2:]), ("---",) * 4]
    rows += [(f"[{name}]({name}.md)", *_row(traits)) for name, traits in TRAITS.items()]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _row(traits: Traits) -> tuple[str, str, str]:
    without = ", ".join(feature.value for feature in traits.refuses)
    return ", ".join(traits.devices), ", ".join(traits.formats) or "-", without or "-"


def _print_all() -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(*COLUMNS, box=None, header_style="bold", pad_edge=False)
    for name, traits in TRAITS.items():
        table.add_row(name, "yes" if traits.installed else escape(f"no: [{traits.extra}]"), *_row(traits))
    Console().print(table)
    click.echo(
        "\nWhat is not listed under `without` is supported; fastchat-grpc backends NAME says why not."
        "\nA name in brackets is the extra to install, as in pip install 'fastchat-grpc[openvino]'."
    )


def _print_one(name: str, traits: Traits) -> None:
    click.echo(f"{name}: {traits.summary}")
    click.echo(f"  installed: {'yes' if traits.installed else _hint(traits)}")
    click.echo(f"  runs on:   {', '.join(traits.devices)}")
    click.echo(f"  reads:     {', '.join(traits.formats) or '-'}")
    for feature in Feature:
        reason = traits.refuses.get(feature)
        click.echo(f"  {'no ' if reason else 'yes'}  {feature.value}" + (f": {reason}" if reason else ""))


def _hint(traits: Traits) -> str:
    return f"no: pip install 'fastchat-grpc[{traits.extra}]'"
