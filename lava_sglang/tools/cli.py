# SPDX-License-Identifier: Apache-2.0
"""The command `lava-sglang`. Its modules are imported by the subcommand that needs them."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lava_sglang import __version__
from lava_sglang.config import KVCompressionError
from lava_sglang.tools import plan
from lava_sglang.tools.demo.comparison import ComparisonSettings
from lava_sglang.tools.inspection.settings import InspectionError, InspectionSettings


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand; returns the exit status: 0, 1 when refused or failed, 130 on Ctrl-C."""
    args = _parser().parse_args(argv)
    try:
        status: int = args.run(args)
    except KeyboardInterrupt:
        print("lava-sglang: interrupted", file=sys.stderr)
        return 130
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lava-sglang", description="KV-cache compression for SGLang: checks and a demo."
    )
    parser.add_argument("--version", action="version", version=f"lava-sglang {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_doctor(commands)
    _add_demo(commands)
    _add_inspect(commands)
    _add_serve(commands)
    _add_plan(commands)
    return parser


def _add_doctor(commands: Any) -> None:
    help_text = "show what a server here would run with, and what it would refuse"
    parser = commands.add_parser("doctor", help=help_text, description=help_text)
    parser.set_defaults(run=_doctor)


def _add_demo(commands: Any) -> None:
    parser = commands.add_parser(
        "demo",
        help="serve long prompts with and without compression and compare",
        description="Start a server, send long real prompts at the same time with compression on "
        "and off, print the answers and how many requests decoded at once, stop the server.",
    )
    ComparisonSettings.add_arguments(parser)
    parser.add_argument("--json", type=Path, help="write the numbers to this file too")
    parser.set_defaults(run=_demo)


def _add_inspect(commands: Any) -> None:
    parser = commands.add_parser(
        "inspect",
        help="show what a method keeps of a prompt, without a server",
        description="Prefill a prompt with transformers and show what the method keeps of it: a "
        "table of layers, the kept text of one layer, and a picture of both.",
    )
    InspectionSettings.add_arguments(parser)
    parser.set_defaults(run=_inspect)


def _add_serve(commands: Any) -> None:
    parser = commands.add_parser(
        "serve",
        help="start a server and say how to ask it",
        description="Run `python -m sglang.launch_server` in the foreground, with the options a "
        "machine without a GPU needs, and print a curl line once it is ready.",
    )
    parser.add_argument("--model-path", required=True, help="folder or Hugging Face model id")
    parser.add_argument("--port", type=int, default=30000, help="port of 127.0.0.1 (%(default)s)")
    parser.add_argument(
        "server_args", nargs="*", metavar="-- OPTION", help="further options of the server"
    )
    parser.set_defaults(run=_serve)


def _add_plan(commands: Any) -> None:
    help_text = "estimate how many requests a budget lets decode at once, and the throughput"
    parser = commands.add_parser("plan", help=help_text, description=plan.__doc__)
    plan.add_arguments(parser)
    parser.set_defaults(run=_plan)


def _doctor(args: argparse.Namespace) -> int:
    from rich.console import Console

    from lava_sglang.tools import doctor

    return doctor.run(Console())


def _serve(args: argparse.Namespace) -> int:
    from lava_sglang.tools import serve
    from lava_sglang.tools.server_process import ServerError

    _stop_on_sigterm()
    try:
        serve.run(args.model_path, args.port, args.server_args)
    except (ServerError, OSError) as error:
        return _fail("serve", error)
    return 0


def _demo(args: argparse.Namespace) -> int:
    import httpx
    from rich.console import Console

    from lava_sglang.tools.demo import run as demo
    from lava_sglang.tools.load import LoadError
    from lava_sglang.tools.passages import PassageError
    from lava_sglang.tools.server_process import ServerError

    _stop_on_sigterm()
    try:
        demo.run(ComparisonSettings.from_arguments(args), Console(), args.json)
    except (
        KVCompressionError,
        PassageError,
        ServerError,
        LoadError,
        OSError,
        httpx.HTTPError,
    ) as error:
        return _fail("demo", error)
    return 0


def _inspect(args: argparse.Namespace) -> int:
    from rich.console import Console

    from lava_sglang.tools.inspection import run as inspection

    try:
        inspection.run(InspectionSettings.from_arguments(args), Console())
    except (KVCompressionError, InspectionError, OSError, NotImplementedError) as error:
        return _fail("inspect", error)
    return 0


def _plan(args: argparse.Namespace) -> int:
    from rich.console import Console

    try:
        plan.run(args, Console())
    except (KVCompressionError, plan.PlanError, OSError) as error:
        return _fail("plan", error)
    return 0


def _stop_on_sigterm() -> None:
    """Leave by an exception, so that the server is stopped."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


def _fail(command: str, error: Exception) -> int:
    print(f"lava-sglang {command}: {error}", file=sys.stderr)
    return 1
