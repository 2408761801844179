"""`anyfabric demo`: complete applications to watch; each one's options live with the application."""

from __future__ import annotations

import importlib

import click

__all__ = ["demo"]

DEMOS = {"kv": "anyfabric.demo.kv:kv_command"}


class _Demos(click.Group):
    """Imports a demo when it is asked for: demos may need torch, the command line must not."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - click's signature
        return sorted(DEMOS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        if cmd_name not in DEMOS:
            return None
        module, name = DEMOS[cmd_name].split(":")
        command = getattr(importlib.import_module(module), name)
        return command if isinstance(command, click.Command) else None


@click.group(cls=_Demos)
def demo() -> None:
    """Run a complete application between processes of this machine."""
