"""Pictures: overlays, panels, the steps of a prediction (Pillow), the curves of a training run (matplotlib)."""

from fastris.viz.curves import save_training_curves, training_curves
from fastris.viz.drawing import overlay
from fastris.viz.panels import FigureRow, contact_sheet, figure_panel, panel
from fastris.viz.steps import step_strip

__all__ = [
    "FigureRow",
    "contact_sheet",
    "figure_panel",
    "overlay",
    "panel",
    "save_training_curves",
    "step_strip",
    "training_curves",
]
