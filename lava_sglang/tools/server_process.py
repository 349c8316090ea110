# SPDX-License-Identifier: Apache-2.0
"""A server in a child process: started, awaited, stopped. Does not import SGLang."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from lava_sglang.tools.client import ServerClient

if TYPE_CHECKING:
    from prometheus_client.samples import Sample

HOST = "127.0.0.1"
LAUNCH = (sys.executable, "-m", "sglang.launch_server")
_POLL_SECONDS = 0.25

Progress = Callable[[float, str], None]
"""Called while the server starts: seconds since its start, the last line of its log."""


class ServerError(RuntimeError):
    """The server died or was not ready in time. The message ends with its last log lines."""


def free_port() -> int:
    """A port of 127.0.0.1 that nothing listens on."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
        return port


def machine_options() -> list[str]:
    """The options of SGLang that a machine without an accelerator needs; none on others."""
    from lava_sglang.cpu_platform.platform import wants_cpu_engine

    if not wants_cpu_engine([], os.environ):
        return []
    # A CPU without AMX multiplies bfloat16 several times slower than float32.
    return ["--device", "cpu", "--dtype", "float32", "--sleep-on-idle"]


class Server:
    """`python -m sglang.launch_server ARGS` as a process group of its own, for a `with` block.

    Ctrl-C in a terminal reaches this process only, which then leaves the block and stops the
    server and all its children.

    Args:
        args: options of the server, without --host and --port.
        port: 0 picks a free one.
        log_path: gets stdout and stderr; the default is a new file in the temporary folder. It is
            kept in both cases.
        env: added to this process's environment.
        start_seconds: how long it may take to be ready.
        stop_seconds: how long it may take to finish by itself before it is killed.
        progress: called several times a second until the server is ready.
        command: what `args` are appended to.
    """

    def __init__(
        self,
        args: Sequence[str],
        *,
        port: int = 0,
        log_path: Path | None = None,
        env: Mapping[str, str] | None = None,
        start_seconds: float = 600,
        stop_seconds: float = 20,
        progress: Progress | None = None,
        command: Sequence[str] = LAUNCH,
    ):
        self.port = port or free_port()
        self.url = f"http://{HOST}:{self.port}"
        self.command = [*command, *args, "--host", HOST, "--port", str(self.port)]
        self.log_path = log_path or _new_log()
        self.env = {**os.environ, **(env or {})}
        self.start_seconds = start_seconds
        self.stop_seconds = stop_seconds
        self.progress = progress
        self.process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        if self.process is None:
            self.start()
        return self

    def start(self) -> None:
        """Raises ServerError if the server dies, or is not ready within `start_seconds`."""
        try:
            with self.log_path.open("wb") as log:
                self.process = subprocess.Popen(
                    self.command,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=self.env,
                    start_new_session=True,
                )
            self._wait_until_ready(self.process)
        except BaseException:
            self.stop()
            raise

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """End the server and every process of its group. Does nothing if it is not running."""
        process, self.process = self.process, None
        if process is None:
            return
        try:
            # To the main process only: it drains, then ends its children itself.
            process.terminate()
            process.wait(self.stop_seconds)
        except subprocess.TimeoutExpired:
            pass
        finally:
            _kill_group(process.pid)
            process.wait()

    @property
    def running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def log_tail(self, lines: int = 20) -> list[str]:
        """The last lines of the log, blank ones dropped."""
        text = self.log_path.read_text(encoding="utf-8", errors="replace")
        return [line.rstrip() for line in text.splitlines() if line.strip()][-lines:]

    def server_info(self) -> dict[str, Any]:
        """As `ServerClient.server_info`."""
        with ServerClient(self.url) as client:
            return client.server_info()

    def metrics(self) -> list[Sample]:
        """As `ServerClient.metrics`."""
        with ServerClient(self.url) as client:
            return client.metrics()

    def flush_cache(self) -> None:
        """As `ServerClient.flush_cache`."""
        with ServerClient(self.url) as client:
            client.flush_cache()

    def _wait_until_ready(self, process: subprocess.Popen[bytes]) -> None:
        started = time.monotonic()
        with ServerClient(self.url) as client:
            while True:
                seconds = time.monotonic() - started
                if process.poll() is not None:
                    raise self._error(f"the server ended with exit code {process.returncode}")
                if seconds > self.start_seconds:
                    raise self._error(f"the server was not ready after {seconds:.0f} s")
                if client.is_ready():
                    return
                if self.progress is not None:
                    self.progress(seconds, "".join(self.log_tail(1)))
                time.sleep(_POLL_SECONDS)

    def _error(self, what: str) -> ServerError:
        tail = "\n".join(f"  {line}" for line in self.log_tail())
        return ServerError(f"{what}. The last lines of {self.log_path}:\n{tail}")


def _new_log() -> Path:
    handle, name = tempfile.mkstemp(prefix="lava-sglang-server-", suffix=".log")
    os.close(handle)
    return Path(name)


def _kill_group(process_group: int) -> None:
    try:
        os.killpg(process_group, signal.SIGKILL)
    except ProcessLookupError:
        return  # none is left
