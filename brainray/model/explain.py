"""Where in a scan the evidence for each class lies: class activation maps.

ResNet's head averages the last features over their cells and multiplies them by its weights. Both
are linear, so they may be exchanged: weigh each cell first, then average. What is averaged is the
map, and it is exact: the mean over its cells is the class's logit. It needs no gradient.

A cell is :data:`STRIDE_PX` pixels apart from the next, and has seen beyond
them: the map is coarse, and says where evidence was found, not what it was.
"""

import numpy as np
from numpy.typing import NDArray

STRIDE_PX = 32
"""Pixels of the input from one cell of ResNet-50's last features to the next. Cell i is centred on
pixel 32 i, for every layer that halves the size keeps its first pixel: cells begin at the edge."""


def compute_class_maps(
    features: NDArray[np.float32], weight: NDArray[np.float32], bias: NDArray[np.float32]
) -> NDArray[np.float32]:
    """Compute the class activation map of every class.

    Parameters
    ----------
    features : ndarray of float32, shape (N, C, h, w)
        What the head averages.
    weight : ndarray of float32, shape (K, C)
        Of the head.
    bias : ndarray of float32, shape (K,)
        Of the head; every cell has it whole.

    Returns
    -------
    ndarray of float32, shape (N, K, h, w)
        In logits: the mean over (h, w) is the logit.

    References
    ----------
    .. [1] Zhou et al., Learning Deep Features for Discriminative Localization, CVPR 2016.
    """
    count, channels, height, width = features.shape
    cells = features.reshape(count, channels, height * width)
    maps: NDArray[np.float32] = weight @ cells + bias[:, None]
    return maps.reshape(count, len(weight), height, width)
