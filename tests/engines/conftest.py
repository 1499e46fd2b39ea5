"""Models and a server for the tests marked vllm."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny import save_tiny_checkpoint


@pytest.fixture(scope="session")
def real_model() -> str:
    path = os.environ.get("CLLM_TEST_MODEL")
    if not path:
        pytest.skip("CLLM_TEST_MODEL does not name a model; scripts/vllm_check.sh sets it")
    return path


@pytest.fixture(scope="session")
def random_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model on which nearly every guess fails; vLLM's attention needs heads of 32 channels."""
    pytest.importorskip("vllm", reason="no vLLM; scripts/vllm_check.sh makes an environment with it")
    return save_tiny_checkpoint(tmp_path_factory.mktemp("models") / "random", seed=3, hidden_size=128, max_position_embeddings=1024)


@pytest.fixture(scope="session")
def server(random_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of ``cllm serve --engine vllm`` of the random model, which is called ``random``."""
    folder = tmp_path_factory.mktemp("served")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "cllm", "serve", random_model, "--block_size", 8, "--engine", "vllm", "--port", port]
    words = [*map(str, command), "--", "--enforce-eager"]
    with open(folder / "log", "w+") as log:
        process = subprocess.Popen(words, stdout=log, stderr=log, env=environment, start_new_session=True)
        url = f"http://127.0.0.1:{port}"
        while subprocess.run(["curl", "-sf", f"{url}/health"], capture_output=True).returncode:
            assert process.poll() is None, (folder / "log").read_text()[-8000:]
            time.sleep(1)
        yield url
        written = (folder / "log").read_text()
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(timeout=120)
    assert "Traceback" not in written
