"""What a classifier says of its own answers: calibrated, too uncertain, or unlike all it has seen.

It is fitted after training (:mod:`brainray.model.calibration`) and sealed with the weights: every
door's probabilities are calibrated, and every door abstains on and rejects the same scans.
"""

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from brainray.errors import ClassifierError, ConfigError

UNLIKE_TRAINING = "unlike_training"
LOW_CONFIDENCE = "low_confidence"
TRUST_REASONS: dict[str, str] = {
    UNLIKE_TRAINING: "The image is unlike those that the classifier was trained on.",
    LOW_CONFIDENCE: "No class is probable enough for the risk that was allowed.",
}
"""Stable code to one sentence: why an image that could be read gets no class."""

ABSTAIN_ALWAYS = 2.0
"""A confidence that no answer reaches."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrustOptions:
    """How far the sealed classifier trusts itself."""

    calibrate: bool = True
    """Scale the logits to the validation images, so that probabilities are rates."""
    max_risk: float = 1.0
    """Share of wrong classes allowed among the validation images that get one (0 to 1); on those
    less probable the classifier abstains. 1 abstains on none."""
    pass_rate: float = 0.99
    """Share of validation images that are to pass as like the training images (0 to 1); an image
    farther from these is rejected. 1 rejects none."""

    def __post_init__(self) -> None:
        for name in ("max_risk", "pass_rate"):
            if not 0 < getattr(self, name) <= 1:
                raise ConfigError(f"{name} must be in (0, 1], got {getattr(self, name)}.")


@dataclass(frozen=True, slots=True)
class Outputs:
    """What a network gives for some images, before anything is made of it."""

    logits: NDArray[np.float32]
    """Shape (N, K)."""
    features: NDArray[np.float32]
    """Means over the cells of what each stage gives, side by side, shape (N, C); the last stage's
    are what the head is given."""


@dataclass(frozen=True, slots=True)
class Cloud:
    """Where one stage's features of the training images lie.

    They are taken as Gaussian around their class's mean, all classes with one covariance: its
    own variance along each of the first principal directions, one for all the rest [1]_, since
    there are more features than the images would settle.

    References
    ----------
    .. [1] Tipping and Bishop, Probabilistic principal component analysis, J. R. Statist. Soc. B
       61, 1999.
    """

    means: NDArray[np.float32]
    """Of each class, shape (K, C)."""
    components: NDArray[np.float32]
    """Orthonormal directions, shape (D, C)."""
    variances: NDArray[np.float32]
    """Along each of them, and in any other direction: shape (D + 1,)."""

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
class Likeness:
    """Where the features of the training images lie, stage by stage [1]_.

    What an earlier stage gives is of textures, and tells a photograph or a blurred slice that
    the last stage takes for one of its own.

    References
    ----------
    .. [1] Lee et al., A simple unified framework for detecting out-of-distribution samples and
       adversarial attacks, NeurIPS 2018.
    """

    clouds: tuple[Cloud, ...]
    """Of the network's last stages, in their order."""
    takes_roots: bool = True
    """Whether they are of the features' square roots: means of what is never negative are skew,
    their roots nearly Gaussian."""

    def compute_distances(self, features: NDArray[np.float32]) -> NDArray[np.float32]:
        """Compute how far images are from the training's: the root of the clouds' sum of squares.

        Parameters
        ----------
        features : ndarray of float32, shape (N, C)
            Columns of stages that have no cloud come first.

        Returns
        -------
        ndarray of float32, shape (N,)
            About the square root of the number of clouds for a training image.
        """
        values = take_roots(features) if self.takes_roots else features
        squares = np.zeros(len(values), np.float32)
        stop = values.shape[1]
        for cloud in reversed(self.clouds):
            start = stop - cloud.means.shape[1]
            squares += cloud.compute_squares(values[:, start:stop])
            stop = start
        return np.sqrt(squares)


@dataclass(frozen=True, slots=True)
class Trust:
    """What is sealed: how logits become probabilities, and when there is no class."""

    scale: NDArray[np.float32]
    """Of each class's logit, shape (K,)."""
    shift: NDArray[np.float32]
    """Added to each scaled logit, shape (K,)."""
    min_confidence: float = 0.0
    """Probability below which the most probable class is not given."""
    likeness: Likeness | None = None
    max_distance: float = math.inf
    """Distance from the training images beyond which an image is rejected."""
    facts: dict[str, Any] = field(default_factory=dict)
    """How it was fitted, ready for JSON."""

    @classmethod
    def nothing(cls, num_classes: int) -> "Trust":
        """Return what a classifier has that was not calibrated: softmax, and always a class."""
        return cls(np.ones(num_classes, np.float32), np.zeros(num_classes, np.float32))

    def calibrate(self, logits: NDArray[np.float32]) -> NDArray[np.float32]:
        """Turn logits into probabilities, shape (N, K)."""
        scaled = logits * self.scale + self.shift
        powers = np.exp(scaled - scaled.max(axis=1, keepdims=True))
        probs: NDArray[np.float32] = powers / powers.sum(axis=1, keepdims=True)
        return probs

    def compute_distances(self, features: NDArray[np.float32]) -> NDArray[np.float32]:
        """Compute how far images are from the training images, shape (N,); 0 if not known."""
        if self.likeness is None:
            return np.zeros(len(features), np.float32)
        return self.likeness.compute_distances(features)

    def find_reasons(
        self, probs: NDArray[np.float32], distances: NDArray[np.float32]
    ) -> list[str | None]:
        """Say why an image gets no class: a key of :data:`TRUST_REASONS`; None if it gets one."""
        return [
            UNLIKE_TRAINING
            if not distance <= self.max_distance
            else LOW_CONFIDENCE
            if confidence < self.min_confidence
            else None
            for distance, confidence in zip(distances, probs.max(axis=1), strict=True)
        ]

    def describe(self) -> dict[str, Any]:
        """Return all but the arrays of the likeness, ready for JSON."""
        return {
            "scale": [float(value) for value in self.scale],
            "shift": [float(value) for value in self.shift],
            "min_confidence": self.min_confidence,
            "max_distance": self.max_distance if math.isfinite(self.max_distance) else None,
            "facts": self.facts,
        }

    def list_tensors(self) -> dict[str, NDArray[np.float32]]:
        """Return the arrays of the likeness, by name; none if there is none."""
        if self.likeness is None:
            return {}
        # safetensors writes memory as it lies, whatever the strides say.
        return {
            f"{name}.{number}" if self.likeness.takes_roots else name: np.ascontiguousarray(
                getattr(cloud, name)
            )
            for number, cloud in enumerate(self.likeness.clouds)
            for name in ("means", "components", "variances")
        }

    @classmethod
    def restore(cls, described: dict[str, Any], tensors: dict[str, NDArray[np.float32]]) -> "Trust":
        """Return what :meth:`describe` and :meth:`list_tensors` gave away.

        Raises
        ------
        ClassifierError
            Something is missing or is of the wrong kind.
        """
        try:
            furthest = described["max_distance"]
            return cls(
                np.array([float(value) for value in described["scale"]], np.float32),
                np.array([float(value) for value in described["shift"]], np.float32),
                float(described["min_confidence"]),
                _restore_likeness(tensors) if tensors else None,
                math.inf if furthest is None else float(furthest),
                dict(described["facts"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ClassifierError(
                f"The classifier's calibration cannot be understood ({error}). Restore the folder."
            ) from error


def _restore_likeness(tensors: dict[str, NDArray[np.float32]]) -> Likeness:
    """Return the likeness of these arrays.

    Those of the second schema have no number: one cloud, of the last stage's plain features.
    """
    if "means" in tensors:
        return Likeness((Cloud(**tensors),), takes_roots=False)
    by_number: dict[int, dict[str, NDArray[np.float32]]] = {}
    for full_name, values in tensors.items():
        name, _, number = full_name.partition(".")
        by_number.setdefault(int(number), {})[name] = values
    return Likeness(tuple(Cloud(**by_number[number]) for number in sorted(by_number)))


def take_roots(features: NDArray[np.float32]) -> NDArray[np.float32]:
    """Take the square roots of features; rounding may have left one just below 0."""
    roots: NDArray[np.float32] = np.sqrt(np.maximum(features, 0))
    return roots


def compute_energy(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """Compute the energy of images, which is higher for those unlike the training's [1]_.

    References
    ----------
    .. [1] Liu et al., Energy-based out-of-distribution detection, NeurIPS 2020.
    """
    energy: NDArray[np.float64] = -np.logaddexp.reduce(logits.astype(np.float64), axis=1)
    return energy
