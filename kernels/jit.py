"""triton.jit, of no type: its own says that constants are tl.constexpr, and knows no arguments of a launch."""

from typing import Any

import triton

jit: Any = triton.jit
