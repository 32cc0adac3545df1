"""What the files interpreted_*.py need before they run kernels in Triton's interpreter."""

from typing import Any


def let_loops_run() -> None:
    """Let the interpreter of Triton 3.6 take loop bounds under any numpy.

    It makes int of arrays of one element and one dimension, which numpy refuses from 2.4 on. Its own replacement of
    ``tensor.__index__`` is made anew for each launch, so the function that makes it is wrapped.
    """
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor
    if getattr(patch, "takes_any_numpy", False):
        return

    def patched(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    patched.takes_any_numpy = True  # type: ignore[attr-defined]
    interpreter._patch_lang_tensor = patched
