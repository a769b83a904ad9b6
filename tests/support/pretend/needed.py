"""For tests of the pretended CUDA device: `cuda`, or a skip of their file that says how to get it."""

import sys

import pytest

from support.pretend import build

if "support.pretend.cuda" not in sys.modules:
    pytest.skip(build.missing() or "needs the pretended CUDA device: make test-pretend", allow_module_level=True)

cuda = sys.modules["support.pretend.cuda"]
