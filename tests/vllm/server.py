"""vLLM's server in a process of its own, from a virtual environment of its own."""

from __future__ import annotations

import os
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PYTHON = ROOT / os.environ.get("SLQ_VLLM_PYTHON", ".venv-vllm/bin/python")
NAME = "slq"
START_S = 240.0
SETTINGS = {
    # The plugin of this checkout, wherever the installed one is.
    "PYTHONPATH": os.pathsep.join([str(ROOT / ".ci" / "vllm"), str(ROOT / "integrations" / "vllm-slq")]),
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}
"""The environment of vLLM."""


@dataclass
class Process:
    """A started server.

    Args:
        url: Its address.
        log: What it has printed.
        code: Its exit code, if it has ended.
    """

    url: str
    log: Path
    code: int | None = None


@contextmanager
def vllm(folder: Path, log: Path, *flags: str, plugin: bool = True, threads: str = "1") -> Iterator[Process]:
    """Run a server until it answers, or until it has ended by itself.

    Args:
        folder: The model.
        log: Where its output goes.
        *flags: Further arguments of ``vllm serve``.
        plugin: Whether it loads plugins.
        threads: How many each of its processes computes with.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = {**SETTINGS, "OMP_NUM_THREADS": threads, "VLLM_CACHE_ROOT": str(log.parent / "cache")}
    environment = {key: value for key, value in os.environ.items() if key != "VLLM_PLUGINS"} | settings
    if not plugin:
        environment["VLLM_PLUGINS"] = ""
    command = [str(PYTHON), "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), "--port", str(port)]
    command += ["--host", "127.0.0.1", "--served-model-name", NAME, *flags]
    with log.open("w") as output:
        # A session of its own, so that the engine, a process of the server, ends with it.
        running = subprocess.Popen(command, env=environment, stdout=output, stderr=output, start_new_session=True)
        process = Process(f"http://127.0.0.1:{port}", log)
        try:
            deadline = time.monotonic() + START_S
            while (code := running.poll()) is None and not _answers(process.url):
                if time.monotonic() > deadline:
                    raise TimeoutError(f"vLLM has not started in {START_S:g} s:\n{log.read_text()[-3000:]}")
                time.sleep(0.5)
            process.code = code
            yield process
        finally:
            running.terminate()
            with suppress(subprocess.TimeoutExpired):
                running.wait(30)
            with suppress(ProcessLookupError):  # its engine may outlive it
                os.killpg(running.pid, 9)
            running.wait()


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5):
            return True
    except (urllib.error.URLError, OSError):
        return False
