"""The operators: one file each with its schema, fake kernel, autograd and choice of back end.

Importing this package registers all of them as ``torch.ops.fastris.*``.
"""

from importlib import import_module

from fastris.backend import NATIVE_OPERATORS

for _operator in NATIVE_OPERATORS:
    import_module(f"fastris.ops.{_operator}")
