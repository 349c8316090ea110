# SPDX-License-Identifier: Apache-2.0
from pathlib import Path

import pytest

from tests.unit.tiny_llama import write_tiny_llama
from tests.unit.tiny_tokenizer import write_tiny_tokenizer


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of random weights, with a tokenizer."""
    path = write_tiny_llama(tmp_path_factory.mktemp("tiny"))
    write_tiny_tokenizer(path)
    return path
