"""Settings of every test: threads, poisoned memory, and where the real problems lie."""

import os
from pathlib import Path

import pytest
import torch

os.environ.setdefault("TRITON_INTERPRET", "0" if torch.cuda.is_available() else "1")  # before triton is imported

from fastrl.base import faults  # noqa: E402
from support.interpreter import mend  # noqa: E402

if os.environ["TRITON_INTERPRET"] == "1":
    mend()
ROOT = Path(__file__).parent.parent
pytest_plugins = ["support.promises"]


def pytest_addoption(parser):
    parser.addoption("--data-dir", default=str(ROOT / ".." / "shared" / "data"), help="folder of real problems")
    parser.addoption("--real-model", default=str(ROOT / "build" / "real" / "model"), help="folder of a real model")


@pytest.fixture(scope="session")
def data_dir(request) -> Path:
    """The folder of real problems, or a skip that says where they were looked for."""
    folder = Path(request.config.getoption("--data-dir")).resolve()
    if not (folder / "gsm8k" / "test.jsonl").exists():
        pytest.skip(f"no problem files in {folder}; --data-dir names another folder")
    return folder


@pytest.fixture(scope="session")
def real_model(request) -> str:
    """The folder of a real model, or a skip that says how to get one."""
    folder = Path(request.config.getoption("--real-model")).resolve()
    if not (folder / "model.safetensors").exists():
        pytest.skip(f"no model in {folder}; `make real` puts one there")
    return str(folder)


@pytest.fixture(autouse=True)
def poison_uninitialized_memory():
    """torch.empty returns NaN under deterministic mode, so code that leaves an output unwritten fails its test."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def planned(monkeypatch):
    """Set FASTRL_FAULT for this process."""

    def plan(text: str, rank: int = 0) -> None:
        monkeypatch.setenv("FASTRL_FAULT", text)
        monkeypatch.setenv("RANK", str(rank))
        faults.from_environment.cache_clear()

    yield plan
    monkeypatch.undo()
    faults.from_environment.cache_clear()


@pytest.fixture
def float64_norms(monkeypatch):
    """transformers rounds inside its norms to float32 even in a float64 model; here nothing is rounded."""
    from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

    def forward(self, x):
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon)

    monkeypatch.setattr(Qwen2RMSNorm, "forward", forward)


@pytest.fixture
def run_fastrl(tmp_path):
    """Run `python -m fastrl.X ...`, in a folder of the test's own -> the finished process."""
    import subprocess

    from support.programs import Run

    def run(module: str, *args: object, cwd: Path = tmp_path, timeout: float = 200, **environment: str):
        started = Run(cwd, *args, module=f"fastrl.{module}", err=True, **environment)
        code = started.wait(timeout)
        errors = Path(started.err).read_text(errors="replace")
        return subprocess.CompletedProcess(args, code, stdout=started.text, stderr=errors)

    return run


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub on this machine that this process asks, with an empty cache."""
    from huggingface_hub import constants
    from huggingface_hub.utils import close_session

    from support.hub_server import serve

    with serve() as server:
        template = "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 1)
        yield server
        close_session()


@pytest.fixture
def offline(monkeypatch):
    """Call it, and this process has HF_HUB_OFFLINE set."""
    from huggingface_hub import constants

    return lambda: monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
