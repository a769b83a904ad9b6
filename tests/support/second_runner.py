"""vLLM's second model runner on a CPU: a plugin, loaded before vLLM, that has Triton's interpreter run its kernels.

    PYTHONPATH=tests python -m pytest -p support.second_runner tests/engine/test_vllm.py

vLLM takes that runner on a CPU where its Triton compiles for one. Triton as it is published does not, but interprets.
"""

import os
from types import SimpleNamespace

os.environ["TRITON_INTERPRET"] = "1"

from triton.backends import backends

backends.setdefault("cpu", SimpleNamespace(driver=SimpleNamespace(is_active=lambda: False), compiler=None))
