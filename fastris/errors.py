"""The one exception that user input raises."""

from __future__ import annotations


class InputError(ValueError):
    """Input that fastris cannot use: the message is one line and names the file or the argument."""
