"""``python -m fastris``, the same as the console script ``fastris``."""

from __future__ import annotations

from fastris.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
