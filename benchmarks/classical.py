"""Otsu and watershed: the classical pipeline that ``nuclei.py`` compares the shipped model with. Needs scikit-image."""

from __future__ import annotations

import numpy as np


def segment(
    image: np.ndarray, blur: float = 1.0, smooth: float = 1.0, min_distance: int = 5, min_area: int = 15
) -> np.ndarray:
    """Label the nuclei of an image; the defaults were chosen on the training split.

    Gaussian, Otsu, inversion where the background is the brighter part (more than half above the threshold),
    distance transform, its local maxima as seeds, watershed, small objects removed.

    Args:
        image: uint8 (H, W, 3).
        blur: sigma of the Gaussian on the grey image, pixels.
        smooth: sigma of the Gaussian on the distance transform, pixels.
        min_distance: least distance of two seeds, pixels.
        min_area: smaller objects are removed, pixels.

    Returns:
        int32 (H, W), 0 = background.
    """
    from scipy import ndimage
    from skimage.feature import peak_local_max
    from skimage.filters import threshold_otsu
    from skimage.segmentation import watershed

    grey = ndimage.gaussian_filter(image.astype(np.float32).mean(axis=2), blur)
    if grey.min() == grey.max():
        return np.zeros(grey.shape, np.int32)
    foreground = grey > threshold_otsu(grey)
    if foreground.mean() > 0.5:
        foreground = ~foreground
    distance = ndimage.gaussian_filter(ndimage.distance_transform_edt(foreground), smooth)
    parts = ndimage.label(foreground)[0]
    seeds = np.zeros(grey.shape, np.int32)
    peaks = peak_local_max(distance, min_distance=min_distance, labels=parts, exclude_border=False)
    seeds[tuple(peaks.T)] = np.arange(1, len(peaks) + 1)
    labels = watershed(-distance, seeds, mask=foreground)
    small = np.flatnonzero(np.bincount(labels.reshape(-1)) < min_area)
    return np.where(np.isin(labels, small), 0, labels).astype(np.int32)
