# SPDX-License-Identifier: Apache-2.0
"""What `cpu_platform` hands to the installed SGLang is there, and SGLang then is on its CPU."""

import pkgutil
import sys

import sglang.srt.utils as srt_utils
from sglang.srt.platforms import current_platform

from lava_sglang.cpu_platform import platform, sgl_kernel_stub


def test_the_platform_class_resolves() -> None:
    cls = pkgutil.resolve_name(platform.CPU_PLATFORM_CLASS)
    assert isinstance(cls, type) and cls.__name__ == "CpuSRTPlatform"


def test_sglang_runs_on_its_cpu_engine() -> None:
    assert srt_utils.is_cpu() is True
    assert current_platform.is_cpu()
    assert type(current_platform).__name__ == "CpuSRTPlatform"


def test_sglang_took_the_ops_that_it_imports_by_name() -> None:
    from sglang.srt.mem_cache import allocation

    taken = allocation.assign_req_to_token_pool_cpu
    assert callable(taken)
    assert taken is sgl_kernel_stub.assign_req_to_token_pool_cpu or (
        taken.__module__ != sgl_kernel_stub.__name__
    )


def test_activating_again_changes_nothing() -> None:
    before = sys.modules["sgl_kernel"]
    assert platform.activate() == platform.CPU_PLATFORM_CLASS
    assert sys.modules["sgl_kernel"] is before
