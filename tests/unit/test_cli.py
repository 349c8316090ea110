# SPDX-License-Identifier: Apache-2.0
"""The command `lava-sglang`: its subcommands, its exit statuses, the doctor's findings."""

import importlib.metadata
import io
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
from rich.console import Console

from lava_sglang import __version__
from lava_sglang.integration import refusals
from lava_sglang.integration.seams import SEAMS
from lava_sglang.tools import cli, doctor, serve
from lava_sglang.tools.demo import run as demo
from lava_sglang.tools.demo.comparison import ComparisonSettings
from lava_sglang.tools.server_process import ServerError


@pytest.fixture
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine where nothing is refused, without importing SGLang."""
    for name in ("SGLANG_PLUGINS", "SGLANG_PLATFORM", *refusals.ENVIRONMENT):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SGLANG_USE_CPU_ENGINE", "1")
    monkeypatch.setattr(refusals, "version_reasons", list)
    monkeypatch.setattr(refusals, "seam_reasons", list)


def report() -> tuple[int, str]:
    console = Console(file=io.StringIO(), width=200)
    status = doctor.run(console)
    assert isinstance(console.file, io.StringIO)
    return status, console.file.getvalue()


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--help"])
    out = capsys.readouterr().out
    assert all(name in out for name in ("doctor", "demo", "inspect", "plan", "serve"))
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--version"])
    assert capsys.readouterr().out == f"lava-sglang {__version__}\n"


@pytest.mark.parametrize("argv", [[], ["nonsense"], ["demo"], ["inspect"], ["serve"]])
def test_wrong_usage_exits_with_2(argv: list[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(argv)


def test_the_command_loads_without_torch_and_sglang() -> None:
    source = (
        "import sys\nfrom lava_sglang.tools import cli\n"
        "cli._parser()\n"
        "print([m for m in ('torch', 'sglang', 'transformers') if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True)
    assert (found.stdout.strip(), found.returncode) == ("[]", 0)


def test_demo_gets_its_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[ComparisonSettings, Path | None]] = []
    monkeypatch.setattr(demo, "run", lambda s, console, json_path: seen.append((s, json_path)))
    command = ["demo", "--model-path", "m", "--text-dir", "t", "--budget", "300", "--requests", "3"]
    assert cli.main([*command, "--json", "out.json", "--", "--page-size", "16"]) == 0
    ((settings, json_path),) = seen
    assert json_path == Path("out.json")
    assert settings == ComparisonSettings(
        model_path="m",
        text_dir=Path("t"),
        method="lava_span",
        budget=300,
        requests=3,
        prompt_tokens=2000,
        max_new_tokens=64,
        slots=4096,
        port=0,
        server_args=("--page-size", "16"),
    )


@pytest.mark.parametrize("budget", ["0", "-1", "1.5", "20", "nan"])
def test_demo_refuses_a_bad_budget(budget: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["demo", "--model-path", "m", f"--budget={budget}"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("lava-sglang demo: ") and "budget=" in error


def test_demo_reports_a_folder_without_texts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["demo", "--model-path", "m", "--text-dir", str(tmp_path)]) == 1
    assert f"{tmp_path}: holds no .txt file" in capsys.readouterr().err


def test_serve_passes_options_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(model_path: str, port: int, server_args: list[str]) -> None:
        assert (model_path, port, server_args) == ("m", 7, ["--kv-compression", "snapkv"])
        raise ServerError("the server ended with exit code 1")

    monkeypatch.setattr(serve, "run", run)
    options = ["--", "--kv-compression", "snapkv"]
    assert cli.main(["serve", "--model-path", "m", "--port", "7", *options]) == 1
    assert capsys.readouterr().err == "lava-sglang serve: the server ended with exit code 1\n"


def test_curl_line_is_one_command_with_valid_json() -> None:
    command = serve.curl("http://127.0.0.1:1")
    assert command.count("'") == 4
    assert "http://127.0.0.1:1/v1/chat/completions" in command


def test_interrupt_is_status_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(console: Console) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(doctor, "run", interrupt)
    assert cli.main(["doctor"]) == 130


def test_doctor_finds_nothing_wrong(clean_environment: None) -> None:
    status, text = report()
    assert status == 0
    assert f"Seams in SGLang: {len(SEAMS)} of {len(SEAMS)} ok" in text
    for seam in SEAMS:
        assert seam.target in text
    for feature in refusals.FEATURES:
        assert feature.name in text
    for name in ("python", "sglang", "torch", "triton", "flashinfer-python", "lava_cpu"):
        assert name in text
    assert "lava_sglang.integration.plugin:register" in text
    assert "CPU, no GPU is used" in text
    assert "Nothing here keeps a server from compressing." in text


def test_doctor_shows_changed_and_missing_seams(
    clean_environment: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed, gone = SEAMS[0].target, SEAMS[1].target
    reasons = [
        f"sglang.{changed} takes ('a',): expected ('b',)",
        f"sglang.{gone} is missing: no module",
    ]
    monkeypatch.setattr(refusals, "seam_reasons", lambda: reasons)
    section = doctor.seams()
    states = {check.detail: check.state for check in section.checks}
    assert states == {seam.target: "ok" for seam in SEAMS} | {changed: "changed", gone: "missing"}
    status, text = report()
    assert status == 1
    assert f"{len(SEAMS) - 2} of {len(SEAMS)} ok" in text
    assert all(f"- {reason}" in text for reason in reasons)


def test_doctor_survives_an_sglang_that_does_not_import(
    clean_environment: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> list[str]:
        raise OSError("libcuda.so.1: cannot open\nmore")

    monkeypatch.setattr(refusals, "seam_reasons", fail)
    status, text = report()
    assert status == 1
    assert "- SGLang cannot be imported: OSError: libcuda.so.1: cannot open\n" in text


def test_doctor_refuses_another_version(
    clean_environment: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(refusals, "version_reasons", lambda: ["sglang==0.5.22 is installed"])
    status, text = report()
    assert status == 1
    assert "wrong" in text and "- sglang==0.5.22 is installed" in text


@pytest.mark.parametrize(
    ("environ", "skipped", "reasons"),
    [
        ({}, set(), 0),
        ({"SGLANG_PLUGINS": "lava, lava_cpu"}, set(), 0),
        ({"SGLANG_PLUGINS": "other"}, {"lava", "lava_cpu"}, 2),
        ({"SGLANG_PLUGINS": "lava"}, {"lava_cpu"}, 1),
        ({"SGLANG_PLUGINS": "lava_cpu"}, {"lava"}, 1),
        ({"SGLANG_PLATFORM": "lava_cpu"}, set(), 0),
        ({"SGLANG_PLATFORM": "lava_cpu", "SGLANG_PLUGINS": "lava"}, set(), 0),
        ({"SGLANG_PLATFORM": "other"}, {"lava", "lava_cpu"}, 2),
    ],
    ids=str,
)
def test_doctor_sees_what_filters_the_plugin_out(
    environ: Mapping[str, str], skipped: set[str], reasons: int, clean_environment: None
) -> None:
    section = doctor.plugins(environ)
    entry_points = [check for check in section.checks if ": " in check.name]
    assert {check.name.split(": ")[1] for check in entry_points if check.state == "skipped"} == (
        skipped
    )
    assert len(section.reasons) == reasons
    values = {check.name: check.detail for check in section.checks}
    for name in ("SGLANG_PLUGINS", "SGLANG_PLATFORM"):
        assert values[name] == environ.get(name, "not set")


def test_doctor_does_not_need_the_cpu_platform_on_a_gpu(
    clean_environment: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SGLANG_USE_CPU_ENGINE", "0")
    assert doctor.plugins({"SGLANG_PLUGINS": "lava"}).reasons == []


def test_doctor_misses_an_entry_point(
    clean_environment: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda **_: ())
    section = doctor.plugins({})
    assert len(section.reasons) == 2
    assert "entry point lava of sglang.srt.plugins is missing" in section.reasons[0]


def test_doctor_refuses_a_variable(
    clean_environment: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SGLANG_RUST_SERVER", "1")
    status, text = report()
    assert status == 1
    assert "- the Rust server is not supported (SGLANG_RUST_SERVER=1)" in text
