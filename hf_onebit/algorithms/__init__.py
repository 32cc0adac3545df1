"""Algorithms choose the bits: pure functions in their papers' letters, importing torch only.

``closed_form`` is the one-shot solution of one layer; ``onebit`` wraps it, module by module, in two dataclasses.
Every other file here improves on a closed form or fits another format; import it by its own name.
"""

from hf_onebit.algorithms.onebit import Onebit, OnebitResult

__all__ = ["Onebit", "OnebitResult"]
