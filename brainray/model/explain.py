"""Where in a scan the evidence for each class lies: class activation maps.

ResNet's head averages the last features over their cells and multiplies them by its weights. Both
are linear, so they may be exchanged: weigh each cell first, then average. What is averaged is the
map. It needs no gradient.

The last features are coarse: a cell for every 32 pixels. So the last two stages are computed once
more without their strides, and with holes in their later kernels, so that each cell sees the same
pixels through the same weights as before [1]_. That gives a cell for every 8 pixels. Every fourth
cell along each axis is the network's own, and the mean over these is the class's logit. A cell has
seen far beyond its 8 pixels: the map says where evidence was found, not what it was.

References
----------
.. [1] The algorithme à trous: Chen et al., DeepLab, IEEE TPAMI 40, 2018, section 3.1.
"""

import numpy as np
from numpy.typing import NDArray

from brainray.model.resnet50 import DENSITY

STRIDE_PX = 32 // DENSITY
"""Pixels of the input from one cell of the dense features to the next. Cell i is centred on pixel
i times this, for every layer that halves the size keeps its first pixel: cells begin at the edge.
"""


def count_cells(size_px: int) -> int:
    """Return how many cells a side of the dense features has for a side of the input."""
    return -(-size_px // STRIDE_PX)


def compute_class_maps(
    features: NDArray[np.float32], weight: NDArray[np.float32], bias: NDArray[np.float32]
) -> NDArray[np.float32]:
    """Compute the class activation map of every class.

    Parameters
    ----------
    features : ndarray of float32, shape (N, C, h, w)
        Dense features, of which the head averages every :data:`DENSITY`-th along each axis.
    weight : ndarray of float32, shape (K, C)
        Of the head.
    bias : ndarray of float32, shape (K,)
        Of the head; every cell has it whole.

    Returns
    -------
    ndarray of float32, shape (N, K, h, w)
        In logits: the mean over ``[..., ::DENSITY, ::DENSITY]`` is the logit.

    References
    ----------
    .. [1] Zhou et al., Learning Deep Features for Discriminative Localization, CVPR 2016.
    """
    count, channels, height, width = features.shape
    cells = features.reshape(count, channels, height * width)
    maps: NDArray[np.float32] = weight @ cells + bias[:, None]
    return maps.reshape(count, len(weight), height, width)
