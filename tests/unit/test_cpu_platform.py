# SPDX-License-Identifier: Apache-2.0
"""The CPU platform: when it is on, which `sgl_kernel` stays, what the stand-in does."""

import ctypes
import importlib
import importlib.util
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch

from lava_sglang.cpu_platform import platform, sgl_kernel_stub
from lava_sglang.cpu_platform.sgl_kernel_stub import MissingCpuKernelError


def loaded_sgl_kernel_modules() -> dict[str, object]:
    return {n: m for n, m in sys.modules.items() if n.partition(".")[0] == "sgl_kernel"}


@pytest.fixture(autouse=True)
def clean_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A process that has not decided yet: no `sgl_kernel`, none of our variables, no arguments."""
    before = loaded_sgl_kernel_modules()
    with mock.patch.dict(os.environ):
        for name in (platform.CPU_ENGINE_ENV, platform._NOTICE_ENV, *platform._DEFAULTS):
            os.environ.pop(name, None)
        for module in before:
            del sys.modules[module]
        monkeypatch.setattr(sys, "argv", ["serve"])
        monkeypatch.setattr(platform, "accelerator_visible", lambda: False)
        yield
        for module in loaded_sgl_kernel_modules():
            del sys.modules[module]
        sys.modules.update(before)  # type: ignore[arg-type]


def install_sgl_kernel(directory: Path, monkeypatch: pytest.MonkeyPatch, source: str) -> None:
    package = directory / "sgl_kernel"
    package.mkdir()
    (package / "__init__.py").write_text(source)
    (package / "part.py").write_text("")
    monkeypatch.syspath_prepend(str(directory))


@pytest.fixture
def broken_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = "import sgl_kernel.part\nraise ImportError('\\nno libcuda.so.1\\nmore lines')\n"
    install_sgl_kernel(tmp_path, monkeypatch, source)


@pytest.fixture
def cuda_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = "def rmsnorm(): return 'real'\ndef fill_bonus_tokens_cpu(): return 'real'\n"
    install_sgl_kernel(tmp_path, monkeypatch, source)


@pytest.mark.parametrize(
    ("arguments", "engine_variable", "accelerator", "expected"),
    [
        ([], None, False, True),
        ([], None, True, False),
        (["--device", "cpu"], None, True, True),
        (["--device=cpu"], None, True, True),
        (["--device", "cuda"], None, False, False),
        (["--device", "cuda", "--device", "cpu"], None, True, True),
        (["--device"], None, True, False),
        ([], "1", True, True),
        ([], "0", False, False),
        (["--device", "cpu"], "0", False, False),
        (["--device", "cuda"], "1", True, True),
    ],
)
def test_when_the_cpu_engine_is_wanted(
    arguments: list[str],
    engine_variable: str | None,
    accelerator: bool,
    expected: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(platform, "accelerator_visible", lambda: accelerator)
    environ = {} if engine_variable is None else {platform.CPU_ENGINE_ENV: engine_variable}
    assert platform.wants_cpu_engine(["serve", *arguments], environ) is expected


@pytest.mark.parametrize(
    ("arguments", "environ"),
    [(["--device", "cpu"], {}), (["--device", "cuda"], {}), ([], {platform.CPU_ENGINE_ENV: "1"})],
)
def test_devices_are_not_asked_where_the_user_decided(
    arguments: list[str], environ: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = mock.Mock(return_value=True)
    monkeypatch.setattr(platform, "accelerator_visible", asked)
    platform.wants_cpu_engine(arguments, environ)
    asked.assert_not_called()


def test_nothing_changes_on_a_machine_with_an_accelerator(
    cuda_library: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(platform, "accelerator_visible", lambda: True)
    environ = dict(os.environ)
    assert platform.activate() is None
    assert dict(os.environ) == environ
    assert loaded_sgl_kernel_modules() == {}


def test_activation_sets_the_engine_and_respects_the_users_settings(broken_library: None) -> None:
    os.environ["OMP_WAIT_POLICY"] = "active"
    assert platform.activate() == platform.CPU_PLATFORM_CLASS
    assert os.environ[platform.CPU_ENGINE_ENV] == "1"
    assert os.environ["OMP_WAIT_POLICY"] == "active"
    assert os.environ["GOMP_SPINCOUNT"] == "0"


def test_the_ranks_of_a_cpu_engine_do_not_look_for_nccl(broken_library: None) -> None:
    platform.activate()
    with pytest.raises(OSError, match="not-used-on-a-cpu"):
        ctypes.CDLL(os.environ["SGLANG_NCCL_SO_PATH"])


def test_the_real_library_stays_where_it_loads(
    cuda_library: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sys, "argv", ["serve", "--device", "cpu"])
    platform.activate()
    library = importlib.import_module("sgl_kernel")
    assert library.__file__ is not None
    assert library.rmsnorm() == "real"
    assert library.fill_bonus_tokens_cpu() == "real"
    assert caplog.records == []
    with pytest.raises(MissingCpuKernelError, match="verify_tree_greedy_cpu"):
        library.verify_tree_greedy_cpu()


def test_the_stand_in_leaves_no_half_imported_modules(broken_library: None) -> None:
    platform.activate()
    assert list(loaded_sgl_kernel_modules()) == ["sgl_kernel"]
    stand_in = importlib.import_module("sgl_kernel")
    assert stand_in.__version__ == sgl_kernel_stub.STAND_IN_VERSION
    assert importlib.util.find_spec("sgl_kernel") is stand_in.__spec__
    with pytest.raises(ModuleNotFoundError, match=r"sgl_kernel\.part"):
        importlib.import_module("sgl_kernel.part")


def test_a_missing_op_imports_and_raises_when_called(broken_library: None) -> None:
    platform.activate()
    op = importlib.import_module("sgl_kernel").copy_all_layer_kv_cache_cpu
    with pytest.raises(MissingCpuKernelError) as raised:
        op(torch.zeros(1), strides=torch.zeros(1))
    assert isinstance(raised.value, NotImplementedError)
    assert raised.value.op == "copy_all_layer_kv_cache_cpu"
    assert "sgl_kernel.copy_all_layer_kv_cache_cpu" in str(raised.value)
    assert "speculative decoding" in str(raised.value)


def test_models_that_take_missing_torch_ops_import(broken_library: None) -> None:
    platform.activate()
    op = torch.ops.sgl_kernel.fused_sigmoid_mul_cpu
    with pytest.raises(MissingCpuKernelError, match="fused_sigmoid_mul_cpu"):
        op(torch.zeros(1), torch.zeros(1))
    assert not hasattr(torch.ops.sgl_kernel, "rmsnorm_cpu")


def test_a_gpu_op_is_absent(broken_library: None) -> None:
    platform.activate()
    with pytest.raises(ImportError, match="rmsnorm"):
        exec("from sgl_kernel import rmsnorm")


def test_the_notice_is_given_once_in_a_process_tree(
    broken_library: None, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        platform.activate()
        del sys.modules["sgl_kernel"]  # a child process: same environment, no modules
        platform.activate()
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "no libcuda.so.1" in caplog.text
    assert "more lines" not in caplog.text


def test_activating_twice_keeps_the_stand_in(broken_library: None) -> None:
    platform.activate()
    first = sys.modules["sgl_kernel"]
    platform.activate()
    assert sys.modules["sgl_kernel"] is first


def test_the_entry_point_imports_neither_torch_nor_sglang() -> None:
    code = (
        "import sys, lava_sglang.cpu_platform.platform as p\n"
        "assert not p.wants_cpu_engine(['serve', '--device', 'cuda'], {})\n"
        "print([m for m in ('torch', 'sglang', 'sgl_kernel') if m in sys.modules])\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (result.stdout, result.returncode) == ("[]\n", 0), result.stderr


def test_assign_req_to_token_pool_writes_each_requests_slots_into_its_row() -> None:
    pool = torch.full((5, 10), -1, dtype=torch.int32)
    starts, ends = torch.tensor([2, 7, 0]), torch.tensor([6, 7, 3])
    slots = torch.arange(100, 110)  # 7 are used: 4, 0 and 3
    sgl_kernel_stub.assign_req_to_token_pool_cpu(
        torch.tensor([3, 1, 0]), pool, starts, ends, slots, pool.shape[1]
    )
    expected = torch.full((5, 10), -1, dtype=torch.int32)
    expected[3, 2:6] = torch.tensor([100, 101, 102, 103])
    expected[0, 0:3] = torch.tensor([104, 105, 106])
    assert torch.equal(pool, expected)


def test_assign_req_to_token_pool_is_part_of_the_stand_in(broken_library: None) -> None:
    platform.activate()
    op = importlib.import_module("sgl_kernel").assign_req_to_token_pool_cpu
    assert op is sgl_kernel_stub.assign_req_to_token_pool_cpu
