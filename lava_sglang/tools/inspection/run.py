# SPDX-License-Identifier: Apache-2.0
"""`lava-sglang inspect`: prefill a prompt, ask the policy, print the report, write the picture."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.console import Console

from lava_sglang.config import KVCompressionConfig
from lava_sglang.layer_map import LayerMap
from lava_sglang.policy import method_of
from lava_sglang.tools.inspection.kept import KeptPrompt, kept_prompt
from lava_sglang.tools.inspection.report import report
from lava_sglang.tools.inspection.settings import InspectionError, InspectionSettings


def run(settings: InspectionSettings, console: Console) -> KeptPrompt:
    """Print and write what is kept, and return it.

    Raises InspectionError or KVCompressionError, and OSError for a file or model that is not there.
    """
    if find_spec("matplotlib") is None:
        raise InspectionError("matplotlib is not installed: pip install 'lava-sglang[plot]'")
    text = read_prompt(settings.prompt_file)
    check_output(settings.output)
    import torch
    from transformers import AutoConfig, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    from lava_sglang.tools.inspection.plot import save_plot
    from lava_sglang.tools.inspection.prefill import load_model, prefill

    disable_progress_bar()
    compression = settings.compression()
    tokenizer = AutoTokenizer.from_pretrained(settings.model_path)
    model_config = AutoConfig.from_pretrained(settings.model_path).get_text_config()
    layer = chosen_layer(settings.layer, model_config.num_hidden_layers)
    input_ids = tokenize(tokenizer, text, settings.chat_template)
    budget_of(compression, settings, len(input_ids))  # refused before the model is loaded
    with console.status(f"Prefilling {len(input_ids):,} tokens ..."):
        dtype = torch.float32 if settings.device == "cpu" else torch.bfloat16
        model = load_model(settings.model_path, dtype, settings.device)
        view = prefill(model, input_ids, compression.window_size).view(compression.window_size)
        budget = budget_of(compression, settings, len(input_ids), view.layers)
        kept = kept_prompt(method_of(compression), view, budget)
    console.print(
        report(kept, layer, lambda tokens: tokenizer.decode([input_ids[i] for i in tokens]))
    )
    save_plot(kept, layer, settings.output)
    console.print(f"\nThe picture is in {settings.output}")
    return kept


def check_output(path: Path) -> None:
    """Raises InspectionError for a picture that could not be written."""
    from matplotlib.backend_bases import FigureCanvasBase

    formats = sorted(FigureCanvasBase.get_supported_filetypes())
    if not path.parent.is_dir() or path.suffix[1:].lower() not in formats:
        raise InspectionError(
            f"--output={path}: accepts a file in an existing folder that ends in one of "
            f"{', '.join(formats)}"
        )


def read_prompt(path: Path) -> str:
    """Raises InspectionError if there is no text to read."""
    if not path.is_file():
        raise InspectionError(f"--prompt-file={path}: accepts a text file, there is none")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InspectionError(f"--prompt-file={path}: accepts UTF-8 text ({error})") from None
    if not text.strip():
        raise InspectionError(f"--prompt-file={path}: accepts a file with text, it is empty")
    return text


def tokenize(tokenizer: Any, text: str, chat_template: bool) -> list[int]:
    """Token ids of the prompt; a user's message, where wanted and where the model has such."""
    if chat_template and tokenizer.chat_template:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
        )
        ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
        return ids
    ids = tokenizer.encode(text)
    return ids


def chosen_layer(layer: int | None, num_layers: int) -> int:
    if layer is None:
        return num_layers // 2
    if not 0 <= layer < num_layers:
        raise InspectionError(f"--layer={layer}: accepts 0 to {num_layers - 1}")
    return layer


def budget_of(
    compression: KVCompressionConfig,
    settings: InspectionSettings,
    prompt_len: int,
    layers: LayerMap | None = None,
) -> int:
    """b, as a server with pages of one token computes it. Raises InspectionError where a server
    would not compress."""
    least = compression.window_size + 2
    if prompt_len < least:
        raise InspectionError(
            f"--prompt-file={settings.prompt_file}: holds {prompt_len} tokens, accepts {least} up "
            f"(window_size={compression.window_size}, and two to choose from)"
        )
    rungs = compression.rungs(prompt_len, 1, layers)
    if not rungs:
        raise InspectionError(
            f"--budget={settings.budget:g}: keeps all {prompt_len} tokens of the prompt, accepts "
            f"what keeps up to {prompt_len - 1}"
        )
    return rungs[0]
