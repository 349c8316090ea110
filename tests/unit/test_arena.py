# SPDX-License-Identifier: Apache-2.0
import gc
import mmap

import pytest
import torch

from lava_sglang.mem_cache.arena import HUGE_PAGE, create_arena, layer_views


def test_cpu_arena_is_zeros_on_a_huge_page_boundary() -> None:
    arena = create_arena(3, 65, 2, 64, torch.bfloat16, "cpu")
    gc.collect()  # the arena alone holds the mapping
    assert arena.shape == (3, 2, 65, 2, 64) and arena.dtype == torch.bfloat16
    assert arena.is_contiguous() and arena.data_ptr() % HUGE_PAGE == 0
    assert not arena.any()
    arena.fill_(1)
    assert arena.double().sum() == arena.numel()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float8_e4m3fn, torch.uint8], ids=str)
def test_every_storage_dtype(dtype: torch.dtype) -> None:
    arena = create_arena(1, 3, 2, 16, dtype, torch.device("cpu"))
    assert arena.dtype == dtype and arena.shape == (1, 2, 3, 2, 16)


def test_layer_views_are_the_arena() -> None:
    arena = create_arena(2, 8, 1, 16, torch.float32, "cpu")
    keys, values = layer_views(arena, rows=7)
    keys[1][6], values[0][2] = 3.0, 4.0
    assert (arena[1, 0, 6] == 3.0).all() and (arena[0, 1, 2] == 4.0).all()
    assert keys[0].shape == (7, 1, 16)
    assert arena.count_nonzero() == 32


def test_without_huge_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(mmap, "MADV_HUGEPAGE", raising=False)
    assert not create_arena(1, 8, 1, 16, torch.float32, "cpu").any()


def test_kernel_that_refuses_huge_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mmap, "MADV_HUGEPAGE", 4096, raising=False)  # no such advice: EINVAL
    assert not create_arena(1, 8, 1, 16, torch.float32, "cpu").any()
