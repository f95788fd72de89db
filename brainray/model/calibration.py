"""Calibrated probabilities, out-of-distribution detection, and when an image gets no class.

:mod:`brainray.model.fit_calibration` fits them after training. They are part of the classifier
bundle, so every entry point gives the same probabilities and abstains on the same images.
"""

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from brainray.errors import ClassifierError, ConfigError

UNLIKE_TRAINING = "unlike_training"
LOW_CONFIDENCE = "low_confidence"
NO_CLASS_REASONS: dict[str, str] = {
    UNLIKE_TRAINING: "The image is unlike those that the classifier was trained on.",
    LOW_CONFIDENCE: "No class is probable enough for the risk that was allowed.",
}
"""Stable code to one sentence: why an image that could be read gets no class."""

ABSTAIN_ALWAYS = 2.0
"""A minimum confidence that no prediction reaches."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CalibrationOptions:
    """How probabilities are calibrated, and how often an image gets no class."""

    calibrate: bool = True
    """Scale the logits to the validation images, so that probabilities match observed rates."""
    max_risk: float = 1.0
    """Share of wrong classes allowed among the validation images that get a class (0 to 1). The
    classifier abstains below the confidence that keeps it. 1 never abstains."""
    pass_rate: float = 0.99
    """Share of validation images that the out-of-distribution detector passes (0 to 1). 1 rejects
    none."""

    def __post_init__(self) -> None:
        for name in ("max_risk", "pass_rate"):
            if not 0 < getattr(self, name) <= 1:
                raise ConfigError(f"{name} must be in (0, 1], got {getattr(self, name)}.")


@dataclass(frozen=True, slots=True)
class Outputs:
    """Raw outputs of the network for some images."""

    logits: NDArray[np.float32]
    """Shape (N, K)."""
    features: NDArray[np.float32]
    """Each stage's activations averaged over the cells, stages side by side, shape (N, C). The last
    stage's are the input of the classification head."""


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

        ``features``, (N, C), are the pooled features of all stages side by side; the columns of
        stages without a Gaussian come first. A training image's distance is about the square root
        of the number of stages.
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


@dataclass(frozen=True, slots=True)
class Calibration:
    """Turns logits into probabilities, and decides which images get no class."""

    scale: NDArray[np.float32]
    """Factor of each class's logit, shape (K,)."""
    shift: NDArray[np.float32]
    """Added to each scaled logit, shape (K,)."""
    min_confidence: float = 0.0
    """Probability below which the classifier abstains."""
    ood_detector: OODDetector | None = None
    max_distance: float = math.inf
    """Distance from the training images above which an image is rejected."""
    facts: dict[str, Any] = field(default_factory=dict)
    """How it was fitted, ready for JSON."""

    @classmethod
    def identity(cls, num_classes: int) -> "Calibration":
        """Return the calibration of an uncalibrated classifier: softmax, and always a class."""
        return cls(np.ones(num_classes, np.float32), np.zeros(num_classes, np.float32))

    def calibrate(self, logits: NDArray[np.float32]) -> NDArray[np.float32]:
        """Turn logits into probabilities, shape (N, K)."""
        scaled = logits * self.scale + self.shift
        powers = np.exp(scaled - scaled.max(axis=1, keepdims=True))
        probs: NDArray[np.float32] = powers / powers.sum(axis=1, keepdims=True)
        return probs

    def compute_distances(self, features: NDArray[np.float32]) -> NDArray[np.float32]:
        """Compute distances from the training images, shape (N,); 0 without a detector."""
        if self.ood_detector is None:
            return np.zeros(len(features), np.float32)
        return self.ood_detector.compute_distances(features)

    def find_reasons(
        self, probs: NDArray[np.float32], distances: NDArray[np.float32]
    ) -> list[str | None]:
        """Return why each image gets no class: a key of :data:`NO_CLASS_REASONS`, else None."""
        reasons = np.full(len(probs), None, object)
        reasons[probs.max(axis=1) < self.min_confidence] = LOW_CONFIDENCE
        reasons[~(distances <= self.max_distance)] = UNLIKE_TRAINING
        return list(reasons)

    def to_json(self) -> dict[str, Any]:
        """Return everything but the detector's arrays, ready for JSON."""
        return {
            "scale": self.scale.tolist(),
            "shift": self.shift.tolist(),
            "min_confidence": self.min_confidence,
            "max_distance": self.max_distance if math.isfinite(self.max_distance) else None,
            "facts": self.facts,
        }

    @classmethod
    def from_json(
        cls, described: dict[str, Any], arrays: dict[str, NDArray[np.float32]]
    ) -> "Calibration":
        """Return the calibration of :meth:`to_json` and the detector's arrays.

        Raises ClassifierError if a part is missing or has the wrong type.
        """
        try:
            max_distance = described["max_distance"]
            return cls(
                np.array([float(value) for value in described["scale"]], np.float32),
                np.array([float(value) for value in described["shift"]], np.float32),
                float(described["min_confidence"]),
                OODDetector.from_arrays(arrays) if arrays else None,
                math.inf if max_distance is None else float(max_distance),
                dict(described["facts"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ClassifierError(
                f"The classifier's calibration is damaged ({error}). Restore the folder."
            ) from error
