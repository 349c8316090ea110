# SPDX-License-Identifier: Apache-2.0
"""The server process, with a fast stand-in for SGLang."""

import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from lava_sglang.tools.server_process import HOST, Server, ServerError, free_port, machine_options

FAKE = (sys.executable, str(Path(__file__).with_name("fake_server.py")))
StartFake = Callable[..., Server]


@pytest.fixture
def fake(tmp_path: Path) -> StartFake:
    """A Server, not started, with the stand-in's options; settings by name."""

    def make(*args: str, **settings: object) -> Server:
        options = {"log_path": tmp_path / "log", "command": FAKE, "stop_seconds": 5, **settings}
        return Server(args, **options)  # type: ignore[arg-type]

    return make


def pid_of(server: Server) -> int:
    assert server.process is not None
    return server.process.pid


def is_running(pid: int) -> bool:
    """Not gone, and not only waiting for its parent to look at its exit status."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in "ZX"


def assert_ends(pid: int) -> None:
    deadline = time.monotonic() + 10
    while is_running(pid):
        assert time.monotonic() < deadline, f"process {pid} is still running"
        time.sleep(0.05)


def test_it_waits_until_ready_and_answers(fake: StartFake) -> None:
    seen: list[tuple[float, str]] = []
    with fake("--polls", "2", progress=lambda *values: seen.append(values)) as server:
        assert server.running
        assert httpx.get(server.url, trust_env=False).status_code == 200
        assert server.server_info()["path"] == "/server_info"
        by_outcome = {sample.labels["outcome"]: sample.value for sample in server.metrics()}
        assert by_outcome == {"compressed": 3, "too_short": 1}
        server.flush_cache()
        assert "POST /flush_cache?timeout=60" in server.log_tail(1)
        pid = pid_of(server)
    assert len(seen) >= 2
    assert seen[-1][1] == "loading weights"
    assert [seconds for seconds, _ in seen] == sorted(seconds for seconds, _ in seen)
    assert not server.running
    assert_ends(pid)


def test_options_and_port_are_passed_on(fake: StartFake) -> None:
    port = free_port()
    server = fake("--polls", "1", port=port)
    assert server.command == [*FAKE, "--polls", "1", "--host", HOST, "--port", str(port)]
    assert server.url == f"http://{HOST}:{port}"


def test_environment_is_added_to_ours(fake: StartFake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAVA_TEST_OURS", "1")
    script = "import os; print(os.environ['LAVA_TEST_OURS'], os.environ['LAVA_TEST_ADDED'])"
    server = fake(command=(sys.executable, "-c", script), env={"LAVA_TEST_ADDED": "2"})
    with pytest.raises(ServerError, match=r"exit code 0(.|\n)*1 2"):
        server.start()


def test_death_at_start_is_reported_with_the_log(fake: StartFake) -> None:
    server = fake("--die", "3")
    with pytest.raises(ServerError) as caught:
        server.start()
    message = str(caught.value)
    assert "the server ended with exit code 3" in message
    assert str(server.log_path) in message
    assert message.endswith("  loading weights\n  RuntimeError: no such model")
    assert not server.running


def test_a_server_that_is_never_ready_is_stopped(fake: StartFake) -> None:
    server = fake("--polls", "1000", start_seconds=1.5)
    pids: list[int] = []
    server.progress = lambda *_: pids.append(pid_of(server))
    with pytest.raises(ServerError, match="not ready after 2 s"):
        server.start()
    assert_ends(pids[0])


def test_stop_ends_the_whole_group(fake: StartFake) -> None:
    with fake("--stubborn", stop_seconds=0.3) as server:
        (line,) = [line for line in server.log_tail() if line.startswith("child")]
        pids = [pid_of(server), int(line.split()[1])]
        assert all(is_running(pid) for pid in pids)
    for pid in pids:
        assert_ends(pid)
    server.stop()  # a second time: nothing to do


def test_an_error_in_the_block_stops_it(fake: StartFake) -> None:
    with pytest.raises(ValueError, match="mine"), fake() as server:
        pid = pid_of(server)
        raise ValueError("mine")
    assert_ends(pid)


@pytest.mark.parametrize("polls", ["0", "1000"], ids=["ready", "starting"])
def test_ctrl_c_stops_it(polls: str, tmp_path: Path) -> None:
    script = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from lava_sglang.tools.server_process import Server\n"
        "log, command = Path(sys.argv[1]), sys.argv[2].split('|')\n"
        "server = Server(sys.argv[3:], log_path=log, command=command)\n"
        "server.progress = lambda *_: print(server.process.pid, flush=True)\n"
        "with server:\n"
        "    print(server.process.pid, flush=True)\n"
        "    time.sleep(60)\n"
    )
    arguments = [str(tmp_path / "log"), "|".join(FAKE), "--polls", polls]
    ours = subprocess.Popen(
        [sys.executable, "-c", script, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert ours.stdout is not None
    pid = int(ours.stdout.readline())
    assert is_running(pid)
    ours.send_signal(signal.SIGINT)
    _, errors = ours.communicate(timeout=20)
    assert errors.rstrip().endswith("KeyboardInterrupt")
    assert_ends(pid)


def test_a_free_port_is_free() -> None:
    with socket.socket() as listener:
        listener.bind((HOST, free_port()))


@pytest.mark.parametrize(("engine", "device"), [("1", ["--device", "cpu"]), ("0", [])])
def test_options_of_this_machine(
    engine: str, device: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SGLANG_USE_CPU_ENGINE", engine)
    assert machine_options()[:2] == device
