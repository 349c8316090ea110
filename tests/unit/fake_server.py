# SPDX-License-Identifier: Apache-2.0
"""A stand-in for `python -m sglang.launch_server`: its routes, started and stopped in no time.

Two prompts decode at a time, as in a pool with room for two; the others wait.
"""

import argparse
import json
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

STEP_SECONDS = 0.05
DECODING = threading.Semaphore(2)
SLOTS_PER_REQUEST = 100
COMPRESSED = {
    "status": "compressed",
    "prompt_tokens": 20,
    "shared_prefix_tokens": 0,
    "kept_tokens": 5,
    "slots_freed": 15,
}
METRICS = """# TYPE sglang:kv_compression_requests counter
sglang:kv_compression_requests_total{outcome="compressed"} 3.0
sglang:kv_compression_requests_total{outcome="too_short"} 1.0
"""

active = 0
prefill_us = 0
health_polls = 0


class Handler(BaseHTTPRequestHandler):
    options: argparse.Namespace

    def do_GET(self) -> None:
        global health_polls
        if self.path == "/health_generate":
            health_polls += 1
            self.answer(b"", 200 if health_polls > self.options.polls else 503)
        elif self.path == "/metrics":
            self.answer(METRICS.encode())
        elif self.path.startswith("/v1/loads"):
            self.answer_json({"loads": [self.load()]})
        elif self.path == "/v1/models":
            self.answer_json({"data": [{"id": "fake"}]})
        elif self.path == "/server_info":
            self.answer_json({"path": self.path, "kv_compression_config": {"scope": "prompt"}})
        else:
            self.answer_json({"path": self.path})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.path == "/generate":
            self.generate(json.loads(body))
        elif self.path == "/v1/chat/completions":
            self.chat(json.loads(body))
        else:
            print("POST", self.path, flush=True)
            self.answer(b"")

    def generate(self, body: dict[str, Any]) -> None:
        """The first token id says how it goes: 400, 1 (an error event), 2 (an abort), or well."""
        global active
        if not body.get("stream"):  # what was asked for comes back as the text
            return self.answer_json({"text": json.dumps(body), "meta_info": {}})
        kind = body["input_ids"][0]
        if kind == 400:
            return self.answer(b'{"error": "too long"}', 400)
        self.send_response(200)
        self.end_headers()
        if kind == 1:
            return self.event({"error": {"message": "budget=7: accepts a fraction"}})
        sampling = body["sampling_params"]
        with DECODING:
            active += 1
            for tokens in range(1, sampling["max_new_tokens"] + 1):
                last = tokens == sampling["max_new_tokens"]
                reason = {"type": "abort", "message": "aborted"} if kind == 2 else None
                meta = {"completion_tokens": tokens, "num_retractions": 1, "finish_reason": reason}
                if last:
                    meta["kv_compression"] = (
                        sampling.get("custom_params") or {"kv_compression": COMPRESSED}
                    )["kv_compression"]
                self.event({"text": "word " * tokens, "meta_info": meta})
                time.sleep(STEP_SECONDS)
            active -= 1
        self.wfile.write(b"data: [DONE]\n\n")

    def chat(self, body: dict[str, Any]) -> None:
        """A token a step; what was sent comes back as the first word of the answer."""
        global active, prefill_us
        if not body.get("stream"):
            return self.answer_json({"choices": [{"message": {"content": "word"}}]})
        self.send_response(200)
        self.end_headers()
        prompt = sum(len(message["content"].split()) for message in body["messages"])
        tokens = body["max_completion_tokens"]
        with DECODING:
            active += 1
            prefill_us += 1000 * prompt
            for token in range(tokens):
                word = json.dumps(body.get("custom_params")) if token == 0 else "word"
                self.event({"choices": [{"delta": {"content": f"{word} "}}]})
                time.sleep(STEP_SECONDS)
            active -= 1
        usage = {"prompt_tokens": prompt, "completion_tokens": tokens}
        self.event({"choices": [], "usage": usage})
        self.wfile.write(b"data: [DONE]\n\n")

    def load(self) -> dict[str, Any]:
        return {
            "num_running_reqs": active,
            "num_used_tokens": active * SLOTS_PER_REQUEST,
            "max_total_num_tokens": 2 * SLOTS_PER_REQUEST,
            "total_prefill_busy_us": prefill_us,
            "total_prefill_uncached_tokens": prefill_us // 1000,
            "decode_moments": None,
        }

    def event(self, value: dict[str, Any]) -> None:
        self.wfile.write(b"data: " + json.dumps(value).encode() + b"\n\n")
        self.wfile.flush()

    def answer_json(self, value: dict[str, Any]) -> None:
        self.answer(json.dumps(value).encode(), kind="application/json")

    def answer(self, body: bytes, status: int = 200, kind: str = "text/plain") -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: Any) -> None:
        pass


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--host")
    parser.add_argument("--port", type=int)
    parser.add_argument("--polls", type=int, default=0, help="health checks to answer with 503")
    parser.add_argument("--die", type=int, help="exit at once with this status")
    parser.add_argument("--stubborn", action="store_true", help="ignore SIGTERM, have such a child")
    Handler.options = parser.parse_args()
    print("loading weights", flush=True)
    if Handler.options.die is not None:
        print("RuntimeError: no such model", file=sys.stderr)
        sys.exit(Handler.options.die)
    if Handler.options.stubborn:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        print(f"child {child.pid}", flush=True)
    ThreadingHTTPServer((Handler.options.host, Handler.options.port), Handler).serve_forever()


if __name__ == "__main__":
    main()
