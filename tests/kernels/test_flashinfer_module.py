# SPDX-License-Identifier: Apache-2.0
"""`make flashinfer` says that it showed nothing where there is no nvcc, and finds its toolkit."""

from pathlib import Path

import pytest

from tests.kernels import flashinfer_module


def nvcc_in(folder: Path, script: str) -> str:
    nvcc = folder / "nvcc"
    nvcc.write_text(f"#!/bin/sh\n{script}\n")
    nvcc.chmod(0o755)
    return str(nvcc)


def test_without_nvcc_it_fails_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert flashinfer_module.main([]) == 2
    assert "nvcc is not on the PATH" in capsys.readouterr().out


def test_a_compiler_that_fails_is_not_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_HOME", raising=False)
    nvcc_in(tmp_path, "exit 1")
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    with pytest.raises(flashinfer_module.subprocess.CalledProcessError):
        flashinfer_module.main([])


def test_the_toolkit_behind_a_wrapper_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """nvcc says where it is; a script that calls it may be anywhere."""
    monkeypatch.delenv("CUDA_HOME", raising=False)
    toolkit = tmp_path / "toolkit"
    nvcc = nvcc_in(tmp_path, f"echo '#$ _HERE_=x' >&2; echo '#$ TOP={toolkit}/bin/..' >&2")
    (toolkit / "bin").mkdir(parents=True)
    assert flashinfer_module.cuda_home(nvcc) == toolkit
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert flashinfer_module.cuda_home(nvcc) == tmp_path


@pytest.mark.parametrize("head_dim", ["16", "80", "512"])
def test_a_head_dim_that_we_do_not_plan_is_refused(
    head_dim: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        flashinfer_module.main(["--head-dim", head_dim])
    assert ended.value.code == 2 and "64, 128, 256" in capsys.readouterr().err
