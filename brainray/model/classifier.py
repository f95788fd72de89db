"""The classifier bundle: a folder with the weights and everything needed to use them correctly.

::

    classifier/
      model.safetensors    weights; those that are multiplied are stored in bf16
      ood.safetensors      arrays of the out-of-distribution detector; absent if it was not fitted
      classifier.json      metadata: classes, preprocessing, calibration, provenance, file hashes
      MODEL_CARD.md        description for people; absent if the bundle was saved without one

Nothing in it is pickled. Whoever opens the folder needs no flag. Opening it does not import torch,
which takes seconds: OpenVINO uses the weights as they are.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import safetensors
import safetensors.numpy
from numpy.typing import NDArray

from brainray.errors import BrainrayError, ClassifierError
from brainray.images.preprocess import Preprocessing
from brainray.io import storage
from brainray.labels import check_classes
from brainray.model.calibration import Calibration
from brainray.model.resnet50 import list_shapes

if TYPE_CHECKING:
    from torch import nn

    from brainray.model.network import StateDict

ARCHITECTURE = "resnet50"

SCHEMA_VERSION = 4
DEFAULT_VARIABLE = "BRAINRAY_CLASSIFIER"
_PACKAGED_FOLDER = Path(__file__).parents[1] / "default_classifier"  # in wheels of `make wheel`
_REPOSITORY_FOLDER = Path(__file__).parents[2] / "models" / "brain-mri-resnet50"
SHIPPED_FOLDER = _PACKAGED_FOLDER if _PACKAGED_FOLDER.is_dir() else _REPOSITORY_FOLDER
"""The classifier that comes with a wheel, or with a clone of the repository."""
WEIGHTS_FILE = "model.safetensors"
OOD_FILE = "ood.safetensors"
METADATA_FILE = "classifier.json"

FIXED_PARTS: dict[str, type] = {
    "schema_version": int,
    "classifier_id": str,
    "architecture": dict,
    "classes": list,
    "preprocessing": dict,
    "weights": dict,
    "calibration": dict,
}
"""Parts of classifier.json, with their types, that define how the weights are used; they never
change."""


@dataclass(frozen=True, slots=True)
class Classifier:
    """An opened classifier bundle. It can be pickled."""

    weights: dict[str, NDArray[np.float32]]
    """By torchvision's names, in fp32: see :func:`brainray.model.resnet50.list_shapes`."""
    classes: tuple[str, ...]
    preprocessing: Preprocessing
    calibration: Calibration
    metadata: dict[str, Any]
    """The content of classifier.json."""

    @property
    def classifier_id(self) -> str:
        """First 12 hexadecimal digits of a hash over all that determines a prediction."""
        return str(self.metadata["classifier_id"])

    def build_network(self) -> "nn.Module":
        """Build the network in torch, on the CPU, in evaluation mode, channels-last."""
        import torch

        from brainray.model.network import build_network

        state = {name: torch.tensor(values) for name, values in self.weights.items()}
        network = build_network(len(self.classes), weights=state)
        return network.to(memory_format=torch.channels_last).eval()


def find_default_classifier() -> str:
    """Return ``$BRAINRAY_CLASSIFIER``, else the repository's own bundle; it may not exist."""
    return os.environ.get(DEFAULT_VARIABLE) or str(SHIPPED_FOLDER)


def save_classifier(
    classifier_uri: str,
    state: "StateDict",
    *,
    classes: Sequence[str],
    preprocessing: Preprocessing,
    provenance: dict[str, Any],
    calibration: Calibration | None = None,
) -> str:
    """Save a classifier bundle; return its id.

    Parameters
    ----------
    classifier_uri : str
        The folder; its previous content is replaced.
    state : dict of Tensor
        Weights of :func:`brainray.model.network.build_network`.
    classes : sequence of str
        In the order of the network's outputs.
    provenance : dict
        JSON-ready: training configuration, data manifest hash, metrics, versions, revision.
    calibration : Calibration, optional
        Plain softmax that always gives a class, if not given.
    """
    import safetensors.torch

    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    content = safetensors.torch.save(tensors)
    weights_sha256 = hashlib.sha256(content).hexdigest()
    calibration = calibration or Calibration.identity(len(classes))
    described = calibration.to_json()
    detector = calibration.ood_detector
    arrays = safetensors.numpy.save(detector.to_arrays()) if detector else None
    if arrays is not None:
        described["sha256"] = hashlib.sha256(arrays).hexdigest()
    meaning = {
        "classes": list(classes),
        "preprocessing": asdict(preprocessing),
        "calibration": described,
    }
    classifier_id = _identify(weights_sha256, meaning)
    metadata = {
        **provenance,
        "schema_version": SCHEMA_VERSION,
        "classifier_id": classifier_id,
        "architecture": {"name": ARCHITECTURE, "in_channels": 1, "num_classes": len(classes)},
        **meaning,
        "weights": {"file": WEIGHTS_FILE, "sha256": weights_sha256, "size_bytes": len(content)},
    }
    storage.write_bytes(storage.join(classifier_uri, WEIGHTS_FILE), content)
    ood_uri = storage.join(classifier_uri, OOD_FILE)
    if arrays is not None:
        storage.write_bytes(ood_uri, arrays)
    elif storage.exists(ood_uri):
        storage.delete_file(ood_uri)
    storage.write_json(storage.join(classifier_uri, METADATA_FILE), metadata)
    return classifier_id


def _identify(weights_sha256: str, meaning: dict[str, Any]) -> str:
    """Return the id over the weights' hash and what says what they mean."""
    canonical = json.dumps([weights_sha256, meaning], sort_keys=True)
    return hashlib.sha256(canonical.encode()).hexdigest()[:12]


def amend_classifier_metadata(classifier_uri: str, additions: dict[str, Any]) -> None:
    """Add entries to the metadata; the parts in :data:`FIXED_PARTS` stay as they are."""
    metadata = read_classifier_metadata(classifier_uri)
    fixed = {name: metadata[name] for name in FIXED_PARTS}
    storage.write_json(storage.join(classifier_uri, METADATA_FILE), metadata | additions | fixed)


def read_classifier_metadata(classifier_uri: str) -> dict[str, Any]:
    """Read classifier.json; raise ClassifierError if it is missing, foreign or incomplete."""
    uri = storage.join(classifier_uri, METADATA_FILE)
    try:
        metadata = storage.read_json(uri)
    except FileNotFoundError as error:
        raise ClassifierError(
            f"No classifier at '{classifier_uri}': expected {METADATA_FILE} in it. "
            "Give the folder that training wrote, <output>/classifier, by --classifier-uri or "
            f"${DEFAULT_VARIABLE}."
        ) from error
    except BrainrayError as error:
        raise ClassifierError(
            f"The classifier at '{classifier_uri}' is damaged: {error}"
        ) from error
    found = metadata.get("schema_version") if isinstance(metadata, dict) else None
    if found != SCHEMA_VERSION:
        raise ClassifierError(
            f"Expected classifier schema {SCHEMA_VERSION} in '{uri}', found {found}. "
            "Use the brainray version that wrote it, or train again with this one."
        )
    missing = [
        name for name, kind in FIXED_PARTS.items() if not isinstance(metadata.get(name), kind)
    ]
    if missing:
        raise ClassifierError(f"'{uri}' lacks {', '.join(missing)}. Restore the folder.")
    return dict(metadata)


def load_classifier(classifier_uri: str) -> Classifier:
    """Open a classifier bundle in a local, s3:// or gs:// folder.

    Raises
    ------
    ClassifierError
        The bundle is missing, damaged, or of another schema version.
    """
    metadata = read_classifier_metadata(classifier_uri)
    architecture = metadata["architecture"].get("name")
    if architecture != ARCHITECTURE:
        raise ClassifierError(
            f"Expected a {ARCHITECTURE} in '{classifier_uri}', found '{architecture}'."
        )
    known = {field.name for field in fields(Preprocessing)}
    if set(metadata["preprocessing"]) != known:
        raise ClassifierError(
            f"Expected the preprocessing in '{classifier_uri}' to give "
            f"{', '.join(sorted(known))}; found {', '.join(sorted(metadata['preprocessing']))}."
        )
    try:
        classes = check_classes(metadata["classes"])
        preprocessing = Preprocessing(**metadata["preprocessing"])
    except (BrainrayError, TypeError, AttributeError) as error:
        raise ClassifierError(
            f"The classifier at '{classifier_uri}' is damaged: {error}"
        ) from error
    weights = _read_weights(metadata, classifier_uri)
    if {name: values.shape for name, values in weights.items()} != list_shapes(len(classes)):
        raise ClassifierError(
            f"The weights in '{classifier_uri}' do not fit a {ARCHITECTURE} with "
            f"{len(classes)} classes. Restore the folder."
        )
    meaning = {name: metadata[name] for name in ("classes", "preprocessing", "calibration")}
    if metadata["classifier_id"] != _identify(metadata["weights"]["sha256"], meaning):
        raise ClassifierError(
            f"The {', '.join(meaning)} in '{classifier_uri}' were changed after the bundle was "
            f"saved: they do not match the id {metadata['classifier_id']}. Restore the folder."
        )
    calibration = read_calibration(metadata, classifier_uri)
    return Classifier(weights, classes, preprocessing, calibration, metadata)


def read_calibration(metadata: dict[str, Any], classifier_uri: str) -> Calibration:
    """Read the calibration of the bundle with these metadata; raise ClassifierError on damage."""
    described = metadata["calibration"]
    arrays: dict[str, NDArray[np.float32]] = {}
    if "sha256" in described:
        content = _read_hashed(storage.join(classifier_uri, OOD_FILE), described["sha256"])
        arrays = safetensors.numpy.load(content)
    return Calibration.from_json(described, arrays)


def _read_weights(metadata: dict[str, Any], where: str) -> dict[str, NDArray[np.float32]]:
    uri = storage.join(where, WEIGHTS_FILE)
    content = _read_hashed(uri, str(metadata["weights"].get("sha256")))
    try:
        tensors = safetensors.deserialize(content)  # type: ignore[no-untyped-call]
    except safetensors.SafetensorError as error:
        raise ClassifierError(f"'{uri}' is not a safetensors file: {error}") from error
    weights = {}
    for name, tensor in tensors:
        if name.endswith("num_batches_tracked"):
            continue
        if tensor["dtype"] == "BF16":  # which numpy does not know
            bits = np.frombuffer(tensor["data"], np.uint16).astype(np.uint32) << 16
        else:
            bits = np.frombuffer(tensor["data"], np.uint32)
        weights[name] = bits.view(np.float32).reshape(tensor["shape"])
    return weights


def _read_hashed(uri: str, sha256: str) -> bytes:
    where, _, name = uri.rpartition("/")
    try:
        content = storage.read_bytes(uri)
    except FileNotFoundError as error:
        raise ClassifierError(f"No {name} in '{where}'. Restore the folder.") from error
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        raise ClassifierError(
            f"The bytes of {name} in '{where}' have changed: expected SHA-256 "
            f"{sha256[:12]}…, found {found[:12]}…. Restore the folder."
        )
    return content
