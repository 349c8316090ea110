# SPDX-License-Identifier: Apache-2.0
"""EleutherAI's harness on a server: the settings that its command names reach every request."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from lava_sglang.tools.server_process import Server
from tests.unit.tiny_tokenizer import write_tiny_tokenizer

pytest.importorskip("lm_eval", reason="pip install 'lava-sglang[test]'")

FAKE = (sys.executable, str(Path(__file__).with_name("fake_server.py")))
README = Path(__file__).parents[2] / "benchmarks" / "fidelity" / "README.md"
TASK = """
task: tiny
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: [], max_gen_toks: 7}}
metric_list: [{{metric: exact_match}}]
"""


def test_the_documents_command_sends_the_settings(tmp_path: Path) -> None:
    """On a task of two local rows; the stand-in for a server answers with what it was asked."""
    rows = [{"question": f"Is {number} even?", "answer": "yes"} for number in (2, 4)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "tiny.yaml").write_text(TASK.format(data=tmp_path / "rows.jsonl"))
    write_tiny_tokenizer(tmp_path)
    settings = {"method": "lava_span", "budget": 0.25}
    assert json.dumps(settings) in README.read_text()
    with Server([], log_path=tmp_path / "log", command=FAKE) as server:
        command = [sys.executable, "-m", "lm_eval", "run", "--model", "sglang-generate"]
        command += ["--include_path", str(tmp_path), "--tasks", "tiny", "--log_samples"]
        command += ["--apply_chat_template", "--output_path", str(tmp_path / "results")]
        model = f"base_url={server.url}/generate,model={tmp_path},num_concurrent=2,max_length=512"
        command += ["--model_args", model]
        command += ["--gen_kwargs", json.dumps({"custom_params": {"kv_compression": settings}})]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    (samples,) = (tmp_path / "results").rglob("samples_tiny_*.jsonl")
    answers = [json.loads(line)["resps"][0][0] for line in samples.read_text().splitlines()]
    assert len(answers) == 2
    for body in map(json.loads, answers):
        sampling = body["sampling_params"]
        assert sampling["custom_params"] == {"kv_compression": settings}
        assert (sampling["max_new_tokens"], sampling["temperature"]) == (7, 0)
        assert body["input_ids"]
