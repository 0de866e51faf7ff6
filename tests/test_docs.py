"""The examples of docs/predict.md run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from PIL import Image

from fastris.commands.demo import sample_pairs

PAGE = Path(__file__).resolve().parent.parent / "docs" / "predict.md"


def test_the_python_of_the_page_on_prediction(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pycocotools")
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 3
    image, _ = sample_pairs()[0]
    Image.open(image).save(tmp_path / "cells.png")
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for block in blocks:
        exec(block, names)
    assert Path("overlay.png").stat().st_size > 0
    assert Path("results.json").read_text(encoding="utf-8").startswith("[{")
