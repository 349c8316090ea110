# SPDX-License-Identifier: Apache-2.0
"""The options of `lava-sglang inspect`, checked before any weight is loaded."""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass, fields
from pathlib import Path

from lava_sglang.config import KVCompressionConfig, KVCompressionError
from lava_sglang.methods import METHOD_CHOICES


class InspectionError(ValueError):
    """A prompt or an option that cannot be inspected. Names it, its value and what is accepted."""


@dataclass(frozen=True)
class InspectionSettings:
    """Raises KVCompressionError for a bad method, budget or further setting."""

    model_path: str  # folder or Hugging Face model id
    prompt_file: Path
    method: str
    budget: float
    config: str  # JSON of further settings
    layer: int | None  # whose kept text is shown; None: the middle one
    chat_template: bool  # whether the prompt is a user's message
    output: Path  # of the picture
    device: str  # of torch

    def __post_init__(self) -> None:
        self.compression()

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        """One option per setting."""
        add = parser.add_argument
        add("--model-path", required=True, help="folder or Hugging Face model id")
        add("--prompt-file", required=True, type=Path, help="UTF-8 text of the prompt")
        add(
            "--method",
            choices=METHOD_CHOICES[1:],
            default="lava",
            help="what to keep (%(default)s)",
        )
        add(
            "--budget",
            type=float,
            default=0.25,
            help="a part of the prompt up to 1, or tokens (%(default)s)",
        )
        add("--config", default="{}", help="further settings as JSON, see --kv-compression-config")
        add("--layer", type=int, help="layer whose kept tokens are shown (the middle one)")
        add(
            "--chat-template",
            action=argparse.BooleanOptionalAction,
            default=True,
            help="make the prompt a user's message, where the model has a chat template (yes)",
        )
        add("--output", type=Path, default=Path("kept.png"), help="picture to write (%(default)s)")
        add("--device", default="cpu", help="where the model runs: cpu, cuda (%(default)s)")

    @classmethod
    def from_arguments(cls, arguments: argparse.Namespace) -> InspectionSettings:
        """From what `add_arguments` has parsed; other attributes are ignored."""
        return cls(**{field.name: getattr(arguments, field.name) for field in fields(cls)})

    def compression(self) -> KVCompressionConfig:
        """The settings a server with these options would have."""
        try:
            further = json.loads(self.config)
        except json.JSONDecodeError as error:
            raise KVCompressionError(
                [f"--config={self.config!r}: accepts a JSON object ({error})"]
            ) from None
        if not isinstance(further, dict):
            raise KVCompressionError([f"--config={self.config!r}: accepts a JSON object"])
        own = {"method": self.method, "budget": self.budget}
        doubled = [f"--config {name}: set --{name} instead" for name in own if name in further]
        if doubled:
            raise KVCompressionError(doubled)
        return KVCompressionConfig.parse(
            {**further, **own}, lambda name: f"--{name}" if name in own else f"--config {name}"
        )
