# SPDX-License-Identifier: Apache-2.0
"""The optional patches against the installed SGLang: they fit it, and they do what they say.

Patched copies are used: the installed package is never changed.
"""

import argparse
import ast
import importlib.util
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sglang.srt.plugins

from lava_sglang.tools import patching
from lava_sglang.tools.patching import PatchSeries, PatchState, SGLangInstall

INSTALL = SGLangInstall.find()
SERIES = PatchSeries.load(INSTALL.version)
BENCHMARKS = [patch.target for patch in SERIES.patch if patch.target.startswith("benchmark/")]


class Parsing(Exception):
    """Raised in place of parsing the command line."""


@pytest.fixture
def pristine(tmp_path: Path) -> SGLangInstall:
    """Copies of the targets as SGLang released them, whatever state the installed ones are in."""
    copies = SGLangInstall(tmp_path / "sglang", INSTALL.version)
    for entry in patching.status(SERIES, INSTALL):
        path = copies.package_dir / entry.patch.target
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(entry.path, path)
    patching.revert(SERIES, copies)
    return copies


@pytest.fixture
def patched(pristine: SGLangInstall) -> SGLangInstall:
    patching.apply(SERIES, pristine)
    return pristine


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What happened, in order; `load_plugins` only writes its name here."""
    seen: list[str] = []
    monkeypatch.setattr(sglang.srt.plugins, "load_plugins", lambda: seen.append("load_plugins"))
    yield seen


def load_serve(install: SGLangInstall) -> Any:
    spec = importlib.util.spec_from_file_location("serve", install.package_dir / "cli/serve.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_benchmark_cli(install: SGLangInstall, target: str, events: list[str]) -> None:
    """Run only `cli_main` of a benchmark: its module needs a GPU to import."""

    class ServerArgs:
        @staticmethod
        def add_cli_args(parser: argparse.ArgumentParser) -> None:
            events.append("parse")
            raise Parsing

    tree = ast.parse((install.package_dir / target).read_text(encoding="utf-8"))
    tree.body = [
        node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "cli_main"
    ]
    scope: dict[str, Any] = {"argparse": argparse, "ServerArgs": ServerArgs}
    exec(compile(tree, target, "exec"), scope)
    with pytest.raises(Parsing):
        scope["cli_main"]()


def test_installed_sglang_can_be_patched_or_is() -> None:
    states = {entry.state for entry in patching.status(SERIES, INSTALL)}
    assert states in ({PatchState.PRISTINE}, {PatchState.APPLIED})


def test_patched_files_have_their_hash_and_compile(patched: SGLangInstall) -> None:
    for entry in patching.status(SERIES, patched):
        assert entry.found_sha256 == entry.patch.patched_sha256
        compile(entry.path.read_bytes(), str(entry.path), "exec")


@pytest.mark.parametrize("model_type", [[], ["--model-type", "llm"]], ids=["auto", "llm"])
def test_serve_loads_plugins_before_help(
    patched: SGLangInstall, events: list[str], model_type: list[str]
) -> None:
    serve = load_serve(patched)
    serve._print_llm_help = lambda request: events.append("help")
    serve._print_diffusion_help = lambda request: None
    serve.serve(None, [*model_type, "--help"])
    assert events == ["load_plugins", "help"]


def test_serve_loads_plugins_before_the_server(patched: SGLangInstall, events: list[str]) -> None:
    serve = load_serve(patched)
    serve._run_llm = lambda request: events.append("run")
    serve.kill_process_tree = lambda *args, **kwargs: None
    serve.serve(None, ["--model-type", "llm", "--model-path", "model"])
    assert events == ["load_plugins", "run"]


@pytest.mark.parametrize("target", BENCHMARKS)
def test_benchmark_loads_plugins_before_parsing(
    patched: SGLangInstall, events: list[str], target: str
) -> None:
    run_benchmark_cli(patched, target, events)
    assert events == ["load_plugins", "parse"]


def test_patches_are_still_needed(pristine: SGLangInstall, events: list[str]) -> None:
    serve = load_serve(pristine)
    serve._print_llm_help = lambda request: events.append("help")
    serve.serve(None, ["--model-type", "llm", "--help"])
    assert events == ["help"]
    for target in BENCHMARKS:
        events.clear()
        run_benchmark_cli(pristine, target, events)
        assert events == ["parse"]
