# SPDX-License-Identifier: Apache-2.0
"""Which backend decodes: ours for a ragged method on a GPU, else the user's."""

from typing import Any

import pytest
from sglang.srt.arg_groups.model_override_base import resolving_view
from sglang.srt.model_executor.cuda_graph_config import (
    Phase,
    default_cuda_graph_config,
    with_phase,
)
from sglang.srt.server_args import prepare_server_args

from lava_sglang.integration.args import LavaServerArgs, choose_decode_backend, config_of
from lava_sglang.methods import RAGGED_METHODS, UNIFORM_METHODS
from tests.contract.resolving import start_reasons

pytestmark = pytest.mark.usefixtures("plugin_installed")


def resolved_backends(model: str, method: str, device: str, **options: Any) -> tuple[Any, Any]:
    """Prefill and decode backend after the hook; SGLang's own step is the user's choice."""
    args = LavaServerArgs(model_path=model, device=device, kv_compression=method, **options)
    stepped: list[Any] = []
    choose_decode_backend(args, stepped.append)
    assert stepped == [args]
    view = resolving_view(args)
    return view.prefill_attention_backend, view.decode_attention_backend


@pytest.mark.parametrize("method", RAGGED_METHODS)
@pytest.mark.parametrize("chosen", [None, "triton"])
def test_a_ragged_method_decodes_on_our_backend(
    model: str, method: str, chosen: str | None
) -> None:
    backends = resolved_backends(model, method, "cuda", prefill_attention_backend=chosen)
    assert backends == (chosen, "lava")


@pytest.mark.parametrize(
    ("method", "device"),
    [(method, "cuda") for method in ("none", *UNIFORM_METHODS)]
    + [(method, "cpu") for method in RAGGED_METHODS],
)
def test_other_methods_and_a_cpu_decode_on_the_users_backend(
    model: str, method: str, device: str
) -> None:
    backends = resolved_backends(model, method, device, decode_attention_backend="triton")
    assert backends == (None, "triton")


@pytest.mark.parametrize("name", ["lava", "lava_flashinfer"])
def test_our_backends_can_be_named_on_the_command_line(model: str, name: str) -> None:
    args = prepare_server_args(
        ["--model-path", model, "--device", "cpu", "--decode-attention-backend", name]
    )
    assert args.decode_attention_backend == name


@pytest.mark.parametrize("graph", ["full", "disabled"])
def test_flashinfer_decodes_without_a_graph(
    model: str, graph: str, caplog: pytest.LogCaptureFixture
) -> None:
    """As in SGLang's own step, whose backends without a graph disable it with a warning."""
    args = LavaServerArgs(
        model_path=model, device="cuda", kv_compression="lava",
        kv_compression_config={"decode_kernel": "flashinfer"},
        cuda_graph_config=with_phase(default_cuda_graph_config(), Phase.DECODE, backend=graph),
    )  # fmt: skip
    choose_decode_backend(args, lambda server_args: None)
    view = resolving_view(args)
    assert view.decode_attention_backend == "lava_flashinfer"
    assert view.cuda_graph_config.decode.backend == "disabled"
    assert view.cuda_graph_config.prefill == default_cuda_graph_config().prefill
    assert ("decode_kernel='flashinfer' plans on the host" in caplog.text) is (graph == "full")


def test_a_bad_decode_kernel_is_left_to_the_validation(model: str) -> None:
    settings = {"decode_kernel": "cuda"}
    assert resolved_backends(model, "lava", "cuda", kv_compression_config=settings) == (None, None)
    (reason,) = start_reasons(model, kv_compression="lava", kv_compression_config=settings)
    assert reason.startswith("--kv-compression-config decode_kernel='cuda': accepts 'triton' or")


def test_flashinfer_on_a_cpu_is_refused_with_what_else_is_wrong(model: str) -> None:
    found = start_reasons(
        model,
        kv_compression="lava",
        kv_compression_config={"decode_kernel": "flashinfer"},
        enable_mixed_chunk=True,
    )
    assert ["mixed chunks" in found[0], "this server runs on cpu" in found[1]] == [True, True]


def test_an_unused_decode_kernel_is_not_refused(model: str) -> None:
    args = LavaServerArgs(
        model_path=model, device="cpu", kv_compression_config={"decode_kernel": "flashinfer"}
    )
    args.resolve_once()
    assert config_of(args).enabled is False


@pytest.mark.parametrize("method", RAGGED_METHODS)
def test_a_ragged_method_is_accepted_at_start(model: str, method: str) -> None:
    args = LavaServerArgs(
        model_path=model, device="cpu", attention_backend="torch_native", kv_compression=method
    )
    args.resolve_once()
    assert config_of(args).method == method
