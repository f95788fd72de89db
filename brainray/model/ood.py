"""Out-of-distribution detection: how far an image's features are from the training images'."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class ClassGaussian:
    """Gaussian model of one stage's features, with a mean for each class.

    All classes share one covariance: a variance along each of the first principal components and
    one variance for all other directions [1]_, because there are more features than images to
    estimate a full covariance from.

    References
    ----------
    .. [1] Tipping and Bishop, Probabilistic principal component analysis, J. R. Statist. Soc. B
       61, 1999.
    """

    means: NDArray[np.float32]
    """Class means, shape (K, C)."""
    components: NDArray[np.float32]
    """Orthonormal principal components, shape (D, C)."""
    variances: NDArray[np.float32]
    """Variance along each component, then in any other direction, shape (D + 1,)."""

    def compute_squares(self, features: NDArray[np.float32]) -> NDArray[np.float32]:
        """Compute the squared Mahalanobis distance of features, (N, C), to the nearest class."""
        projected, centres = (values @ self.components.T for values in (features, self.means))
        nearest = np.full(len(features), np.inf, np.float32)
        for mean, centre in zip(self.means, centres, strict=True):
            along = (projected - centre) ** 2
            rest = np.maximum(((features - mean) ** 2).sum(1) - along.sum(1), 0)
            squares = np.column_stack([along, rest]) / self.variances
            nearest = np.minimum(nearest, squares.sum(1))
        return nearest


@dataclass(frozen=True, slots=True)
class OODDetector:
    """Distance of an image from the training images, summed over stages of the network [1]_.

    Earlier stages respond to texture. They detect photographs and blurred slices whose features in
    the last stage look like those of a brain slice.

    References
    ----------
    .. [1] Lee et al., A simple unified framework for detecting out-of-distribution samples and
       adversarial attacks, NeurIPS 2018.
    """

    gaussians: tuple[ClassGaussian, ...]
    """One for each of the network's last stages, in their order."""

    def compute_distances(self, features: NDArray[np.float32]) -> NDArray[np.float32]:
        """Compute distances: the square root of the stages' summed squared distances.

        Parameters
        ----------
        features : ndarray of float32, shape (N, C)
            Pooled features of all stages side by side; the columns of stages without a Gaussian
            come first.

        Returns
        -------
        ndarray of float32, shape (N,)
            About the square root of the number of stages for a training image.
        """
        values = take_square_roots(features)
        squares = np.zeros(len(values), np.float32)
        stop = values.shape[1]
        for gaussian in reversed(self.gaussians):
            start = stop - gaussian.means.shape[1]
            squares += gaussian.compute_squares(values[:, start:stop])
            stop = start
        return np.sqrt(squares)

    def to_arrays(self) -> dict[str, NDArray[np.float32]]:
        """Return the arrays of all stages, named ``means.0``, ``components.0`` and so on."""
        # safetensors writes memory as it lies, whatever the strides say.
        return {
            f"{name}.{number}": np.ascontiguousarray(getattr(gaussian, name))
            for number, gaussian in enumerate(self.gaussians)
            for name in ClassGaussian.__slots__
        }

    @classmethod
    def from_arrays(cls, arrays: dict[str, NDArray[np.float32]]) -> "OODDetector":
        """Return the detector whose :meth:`to_arrays` gave these arrays."""
        by_number: dict[int, dict[str, Any]] = {}
        for full_name, values in arrays.items():
            name, _, number = full_name.partition(".")
            by_number.setdefault(int(number), {})[name] = values
        return cls(tuple(ClassGaussian(**by_number[number]) for number in sorted(by_number)))


def take_square_roots(features: NDArray[np.float32]) -> NDArray[np.float32]:
    """Take square roots: means of non-negative activations are skewed, their roots nearly Gaussian.

    Rounding may leave a mean just below 0; it counts as 0.
    """
    roots: NDArray[np.float32] = np.sqrt(np.maximum(features, 0))
    return roots
