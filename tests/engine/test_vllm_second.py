"""The second model runner of vLLM, which GPUs get, on a CPU: what is tested of the first holds there too."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed: make test-vllm")

from fastrl.base.versions import release
from fastrl.engine.vllm import installed_version

pytestmark = [pytest.mark.vllm, pytest.mark.slow]
ROOT = Path(__file__).parents[2]
# without those that sample too much for an interpreter
WANTED = "qwen2 and not stop_id"


@pytest.mark.skipif(
    release(installed_version())[:2] != (0, 32), reason="the interpreter is known to run the kernels of vLLM 0.32"
)
@pytest.mark.timeout(600)
def test_the_tests_of_the_engine_pass_on_the_second_runner():
    env = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST_", "VLLM_"))}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT / "tests"), env.get("PYTHONPATH")]))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "support.second_runner", "-p", "no:cacheprovider"]
    command += ["tests/engine/test_vllm.py", "-k", WANTED]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=580)
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-4000:] + done.stderr[-2000:]
