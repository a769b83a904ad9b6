"""Triton 3.6 with a newer numpy: its interpreter makes an int of an array of one element, which numpy 2.5 refuses."""

import importlib
import importlib.util


def mend() -> None:
    """Let the bound of a loop be read as later versions of Triton read it. Only the interpreter needs it."""
    if importlib.util.find_spec("triton") is None:
        return
    import triton

    if not triton.__version__.startswith("3.6."):
        return
    interpreter = importlib.import_module("triton.runtime.interpreter")
    patch = interpreter._patch_lang_tensor

    def patched(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patched
