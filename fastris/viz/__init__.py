"""Pictures: overlays and panels."""

from fastris.viz.drawing import overlay
from fastris.viz.panels import FigureRow, contact_sheet, figure_panel, panel

__all__ = ["FigureRow", "contact_sheet", "figure_panel", "overlay", "panel"]
