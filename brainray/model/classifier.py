"""The sealed classifier folder: weights and everything that is needed to be right with them.

::

    classifier/
      model.safetensors    the weights; training seals those that are multiplied in bf16
      trust.safetensors    where the features of the training images lie; absent if not fitted
      classifier.json      class order, preprocessing, calibration and thresholds, where they came
                           from, the hashes of the others
      MODEL_CARD.md        what training knew of it, for people; absent in older folders

Nothing in it is pickled. Who opens the folder needs no flag. Opening it does without torch, which
takes seconds to import: OpenVINO computes with the weights as they are.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np
import safetensors
import safetensors.numpy
from numpy.typing import NDArray

from brainray import storage
from brainray.errors import BrainrayError, ClassifierError
from brainray.images.preprocess import Preprocessing
from brainray.labels import check_classes
from brainray.model.resnet50 import list_shapes
from brainray.model.trust import Trust

if TYPE_CHECKING:
    from torch import nn

    from brainray.model.network import StateDict

ARCHITECTURE = "resnet50"

SCHEMA_VERSION = 3
READABLE_VERSIONS = (1, 2, 3)
"""Version 1 knew no `trust`: its softmax stands, and it always gives a class. Version 2 knew where
the last stage's features lie, and no other's."""
ADDED_PREPROCESSING = {"crop", "intensity"}
"""Fields that a folder of any version may lack; their defaults are what was done before."""
WEIGHTS_FILE = "model.safetensors"
TRUST_FILE = "trust.safetensors"
CARD_FILE = "classifier.json"

SEALED_PARTS = (
    "schema_version",
    "classifier_id",
    "architecture",
    "classes",
    "preprocessing",
    "weights",
    "trust",
)
"""Parts of classifier.json that say what the weights mean; never amended."""


@dataclass(frozen=True, slots=True)
class Classifier:
    """An opened classifier: weights and the meaning of their numbers. Can be pickled."""

    weights: dict[str, NDArray[np.float32]]
    """By torchvision's names, in fp32: see :func:`brainray.model.resnet50.list_shapes`."""
    classes: tuple[str, ...]
    preprocessing: Preprocessing
    trust: Trust
    card: dict[str, Any]
    """The content of classifier.json."""

    @property
    def classifier_id(self) -> str:
        """First 12 hexadecimal digits of the hash over all that shapes an answer."""
        return str(self.card["classifier_id"])

    def build_network(self) -> "nn.Module":
        """Build the network in torch, on the CPU, in evaluation mode, channels-last."""
        import torch

        from brainray.model.network import build_network

        state = {name: torch.tensor(values) for name, values in self.weights.items()}
        network = build_network(len(self.classes), weights=state)
        return network.to(memory_format=torch.channels_last).eval()


def save_classifier(
    classifier_uri: str,
    state: "StateDict",
    *,
    classes: Sequence[str],
    preprocessing: Preprocessing,
    provenance: dict[str, Any],
    trust: Trust | None = None,
) -> str:
    """Seal a classifier folder.

    Parameters
    ----------
    classifier_uri : str
        The folder; what it held before is replaced.
    state : dict of Tensor
        Weights of :func:`brainray.model.network.build_network`.
    classes : sequence of str
        In the order of the network's outputs.
    preprocessing : Preprocessing
        What turns pixels into the network's input.
    provenance : dict
        JSON-ready: training configuration, data manifest hash, metrics, versions, revision.
    trust : Trust, optional
        How its answers are calibrated and withheld; not at all, if not given.

    Returns
    -------
    str
        The classifier's id.
    """
    import safetensors.torch

    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    content = safetensors.torch.save(tensors)
    weights_sha256 = hashlib.sha256(content).hexdigest()
    trust = trust or Trust.nothing(len(classes))
    sealed_trust = trust.describe()
    arrays = safetensors.numpy.save(trust.list_tensors()) if trust.likeness else None
    if arrays is not None:
        sealed_trust["sha256"] = hashlib.sha256(arrays).hexdigest()
    meaning = {
        "classes": list(classes),
        "preprocessing": asdict(preprocessing),
        "trust": sealed_trust,
    }
    classifier_id = _identify(weights_sha256, meaning)
    card = {
        **provenance,
        "schema_version": SCHEMA_VERSION,
        "classifier_id": classifier_id,
        "architecture": {"name": ARCHITECTURE, "in_channels": 1, "num_classes": len(classes)},
        **meaning,
        "weights": {"file": WEIGHTS_FILE, "sha256": weights_sha256, "size_bytes": len(content)},
    }
    storage.write_bytes(storage.join(classifier_uri, WEIGHTS_FILE), content)
    trust_uri = storage.join(classifier_uri, TRUST_FILE)
    if arrays is not None:
        storage.write_bytes(trust_uri, arrays)
    elif storage.exists(trust_uri):
        storage.delete_file(trust_uri)
    storage.write_json(storage.join(classifier_uri, CARD_FILE), card)
    return classifier_id


def _identify(weights_sha256: str, meaning: dict[str, Any]) -> str:
    """Return the id over the weights' hash and what says what they mean."""
    canonical = json.dumps([weights_sha256, meaning], sort_keys=True)
    return hashlib.sha256(canonical.encode()).hexdigest()[:12]


def amend_card(classifier_uri: str, additions: dict[str, Any]) -> None:
    """Add to what a sealed classifier says of itself; weights and meaning stay as they are."""
    card = read_card(classifier_uri)
    sealed = {name: card[name] for name in SEALED_PARTS if name in card}
    storage.write_json(storage.join(classifier_uri, CARD_FILE), card | additions | sealed)


def read_card(classifier_uri: str) -> dict[str, Any]:
    """Read and check classifier.json.

    Raises
    ------
    ClassifierError
        It is missing, is of another schema, or lacks a part.
    """
    uri = storage.join(classifier_uri, CARD_FILE)
    try:
        card = storage.read_json(uri)
    except FileNotFoundError as error:
        raise ClassifierError(
            f"No classifier at '{classifier_uri}': expected {CARD_FILE} in it. "
            "Give the folder that training wrote as <output>/classifier."
        ) from error
    except BrainrayError as error:
        raise ClassifierError(
            f"The classifier at '{classifier_uri}' is damaged: {error}"
        ) from error
    found = card.get("schema_version") if isinstance(card, dict) else None
    if found not in READABLE_VERSIONS:
        raise ClassifierError(
            f"Expected classifier schema {SCHEMA_VERSION} in '{uri}', found {found}. "
            "Use the brainray version that wrote it, or train again."
        )
    needed = {
        "classifier_id": str,
        "architecture": dict,
        "classes": list,
        "preprocessing": dict,
        "weights": dict,
    } | ({"trust": dict} if found > 1 else {})
    missing = [name for name, kind in needed.items() if not isinstance(card.get(name), kind)]
    if missing:
        raise ClassifierError(f"'{uri}' lacks {', '.join(missing)}. Restore the folder.")
    return dict(card)


def load_classifier(classifier_uri: str) -> Classifier:
    """Open a sealed classifier folder.

    Parameters
    ----------
    classifier_uri : str
        Local, s3:// or gs:// folder.

    Raises
    ------
    ClassifierError
        The folder is missing, foreign, damaged, or of another schema version.
    """
    card = read_card(classifier_uri)
    classes, preprocessing = _read_meaning(card, classifier_uri)
    weights = _read_sealed_weights(card, classifier_uri)
    if {name: values.shape for name, values in weights.items()} != list_shapes(len(classes)):
        raise ClassifierError(
            f"The weights in '{classifier_uri}' do not fit a {ARCHITECTURE} with "
            f"{len(classes)} classes. Restore the folder."
        )
    parts = ("classes", "preprocessing", "trust")
    meaning: dict[str, Any] = {name: card[name] for name in parts if name in card}
    if card["classifier_id"] != _identify(card["weights"]["sha256"], meaning):
        raise ClassifierError(
            f"The {', '.join(meaning)} in '{classifier_uri}' were changed after they were sealed: "
            f"they do not give the id {card['classifier_id']}. Restore the folder."
        )
    trust = read_trust(card, classifier_uri)
    return Classifier(weights, classes, preprocessing, trust, card)


def read_trust(card: dict[str, Any], where: str) -> Trust:
    """Read how a classifier's answers are calibrated and withheld.

    Parameters
    ----------
    card : dict
        From :func:`read_card`.
    where : str
        The classifier's folder.

    Raises
    ------
    ClassifierError
        It is damaged.
    """
    described = card.get("trust")
    if described is None:
        return Trust.nothing(len(card["classes"]))
    tensors: dict[str, NDArray[np.float32]] = {}
    if "sha256" in described:
        content = _read_sealed(storage.join(where, TRUST_FILE), described["sha256"])
        tensors = safetensors.numpy.load(content)
    return Trust.restore(described, tensors)


def _read_meaning(card: dict[str, Any], where: str) -> tuple[tuple[str, ...], Preprocessing]:
    name = card["architecture"].get("name")
    if name != ARCHITECTURE:
        raise ClassifierError(f"Expected a {ARCHITECTURE} in '{where}', found '{name}'.")
    known = {field.name for field in fields(Preprocessing)}
    given = set(card["preprocessing"])
    if not known - ADDED_PREPROCESSING <= given <= known:
        raise ClassifierError(
            f"Expected the preprocessing in '{where}' to give {', '.join(sorted(known))}; "
            f"found {', '.join(sorted(given))}."
        )
    try:
        return check_classes(card["classes"]), Preprocessing(**card["preprocessing"])
    except (BrainrayError, TypeError, AttributeError) as error:
        raise ClassifierError(f"The classifier at '{where}' is damaged: {error}") from error


def _read_sealed_weights(card: dict[str, Any], where: str) -> dict[str, NDArray[np.float32]]:
    uri = storage.join(where, WEIGHTS_FILE)
    content = _read_sealed(uri, str(card["weights"].get("sha256")))
    try:
        tensors = safetensors.deserialize(content)  # type: ignore[no-untyped-call]
    except safetensors.SafetensorError as error:
        raise ClassifierError(f"'{uri}' is not a safetensors file: {error}") from error
    return {
        name: _widen(tensor) for name, tensor in tensors if not name.endswith("num_batches_tracked")
    }


def _widen(tensor: dict[str, Any]) -> NDArray[np.float32]:
    """Return a tensor of a safetensors file in fp32; numpy knows no bf16."""
    if tensor["dtype"] == "BF16":
        values = (np.frombuffer(tensor["data"], np.uint16).astype(np.uint32) << 16).view(np.float32)
    else:
        values = np.frombuffer(tensor["data"], np.float32)
    return values.reshape(tensor["shape"])


def _read_sealed(uri: str, sha256: str) -> bytes:
    where, _, name = uri.rpartition("/")
    try:
        content = storage.read_bytes(uri)
    except FileNotFoundError as error:
        raise ClassifierError(f"No {name} in '{where}'. Restore the folder.") from error
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        raise ClassifierError(
            f"The bytes of {name} in '{where}' are not the sealed ones: expected SHA-256 "
            f"{sha256[:12]}…, found {found[:12]}…. Restore the folder."
        )
    return content
