"""The model card: its numbers equal the metrics, and no user text breaks its layout."""

import copy
import html
import json
import re
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import yaml
from markdown_it import MarkdownIt

from brainray.data.labelled import FoundSamples
from brainray.evaluation.prepared import PreparedData
from brainray.evaluation.scoring import summarise_data
from brainray.metrics import compute_evaluation
from brainray.model.reasons import NOTICE
from brainray.reports.card import build_model_card, render_model_card
from brainray.reports.html import format_text
from tests.test_report import CLASSES, build_predictions, build_split

HOSTILE = (
    "a|b",
    "`code` \\",
    "*bold* _and_ ~~gone~~",
    "line\nbreak\r\n---\n# Heading",
    "<script>alert(1) &amp;",
    "[link](example.org) ![x](y)",
    "$x$ no_tumour_",
    "\N{RIGHT-TO-LEFT OVERRIDE}rtl",
)
BEATEN = "is right more often than the classifier"


@pytest.fixture(scope="module")
def full_metrics() -> dict[str, Any]:
    test, val = build_split(200, 1)[0], build_split(120, 0)[0]
    training = {
        "num_epochs": 5,
        "best_epoch": 3,
        "monitor": "val_macro_f1",
        "best_score": 0.75,
        "time_s": 3700.0,
        "world_size": 2,
        "hardware": "AMD EPYC 9V45, 2 CPUs",
        "precision": "bf16",
    }
    runtime = {"backend": "openvino", "description": "OpenVINO 2026.4, bf16, 2 threads"}
    return {"test": test, "val": val, "training": training, "runtime": runtime}


@pytest.fixture
def metrics(full_metrics: dict[str, Any]) -> dict[str, Any]:
    return copy.deepcopy(full_metrics)


def build_card(classes: tuple[str, ...] = CLASSES, **parts: Any) -> dict[str, Any]:  # noqa: ANN401
    config = {
        "classes": list(classes),
        "seed": 7,
        "weights": "imagenet",
        "weights_uri": "/home/somebody/weights/start.pth",
        "group_correlation": 0.96,
        "val_fraction": 0.15,
        "test_fraction": 0.2,
        "optimisation": {"class_weights": "balanced"},
    }
    return {
        "classifier_id": "0123456789ab",
        "classes": list(classes),
        "architecture": {"name": "resnet50", "in_channels": 1, "num_classes": len(classes)},
        "preprocessing": {"size_px": 64, "fit": "stretch", "mean": 0.449, "std": 0.226},
        "weights": {"file": "model.safetensors", "size_bytes": 94_000_000},
        "training": {"recipe": "tiny", "config": config, "precision": "bf16"},
        "data_manifest_sha256": "ab" * 32,
        "versions": {"python": "3.11.9", "torch": "2.15.0"},
        "code_revision": "e78b1eedcafe",
        **parts,
    }


def build_data(num_classes: int = 4) -> dict[str, Any]:
    counts = {"n": 10 * num_classes, "num_groups": 9, "per_class": [10] * num_classes}
    return {
        "name": "brain-tumor-mri",
        "num_scans": 30 * num_classes + 2,
        "rejected": {"truncated": 2},
        "rejected_per_class": [2] + [0] * (num_classes - 1),
        "num_groups": 27,
        "num_shared_groups": 0,
        "num_named": 0,
        "splits": {
            "train": {**counts, "given": True},
            "val": {**counts, "given": False},
            "test": {**counts, "given": True},
        },
    }


def render(card: dict[str, Any], metrics: dict[str, Any], data: dict[str, Any]) -> str:
    return render_model_card(build_model_card(card, metrics, data))


def read_html(text: str) -> str:
    """Render the card as GitHub does."""
    body = text.split("---\n", 2)[2]
    return str(MarkdownIt("commonmark").enable(["table", "strikethrough"]).render(body))


def read_tables(text: str, heading: str) -> list[list[list[str]]]:
    """Return the cells of the tables of a section."""
    page = read_html(text)
    part = re.split(r"<h[23]>", page.split(f">{heading}</h")[1])[0]
    return [
        [
            [html.unescape(cell) for cell in re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row)]
            for row in re.findall(r"<tr>(.*?)</tr>", table, re.DOTALL)
        ]
        for table in re.findall(r"<table>(.*?)</table>", part, re.DOTALL)
    ]


def write_estimate(found: dict[str, Any], name: str) -> str:
    if name not in found:
        return "–"
    interval = found[f"{name}_ci95"]
    ends = "no interval" if interval is None else f"{interval[0]:.3f} to {interval[1]:.3f}"
    return f"{found[name]:.3f} ({ends})"


def test_every_number_equals_the_metrics(metrics: dict[str, Any]) -> None:
    text = render(build_card(), metrics, build_data())
    for heading, split in (("Test split", "test"), ("Validation split", "val")):
        found = metrics[split]
        baseline = found["baseline_1nn"]
        parts = [
            found,
            found["without_near_duplicates"],
            baseline,
            baseline["without_near_duplicates"],
        ]
        scores, classes, classes_no_near_duplicate, confusion = read_tables(text, heading)
        assert scores[0][1:] == [
            *("Classifier", "Classifier, no near duplicate"),
            *("Nearest thumbnail", "Nearest thumbnail, no near duplicate"),
        ]
        rows = {row[0].split(" (")[0].split(",")[0]: row[1:] for row in scores[1:]}
        assert rows.pop("Images") == [str(part["n"]) for part in parts]
        assert rows.pop("Groups")[:2] == [str(part["num_groups"]) for part in parts[:2]]
        names = {
            "Accuracy": "accuracy",
            "Balanced accuracy": "balanced_accuracy",
            "Macro F1": "macro_f1",
            "Macro AUROC": "macro_auroc",
            "Matthews correlation": "mcc",
            "Log loss": "log_loss",
            "Brier score": "brier",
            "Expected calibration error": "ece",
        }
        assert rows == {
            label: [write_estimate(part, name) for part in parts] for label, name in names.items()
        }
        for table, part in (
            (classes, found),
            (classes_no_near_duplicate, found["without_near_duplicates"]),
        ):
            assert table[0] == ["Class", "Images", "Sensitivity", "Specificity", "Precision"]
            assert table[1:] == [
                [name, str(one["n"])]
                + [write_estimate(one, key) for key in ("sensitivity", "specificity", "precision")]
                for name, one in part["per_class"].items()
            ]
        assert [row[1:] for row in confusion[1:]] == [
            list(map(str, row)) for row in found["confusion"]
        ]
    assert (
        "Images with a near duplicate: 50.0\N{NO-BREAK SPACE}% (thumbnails correlate at 0.995"
        in text
    )


def test_data_and_training_are_described(metrics: dict[str, Any]) -> None:
    text = render(build_card(), metrics, build_data())
    for line in (
        NOTICE,
        "classifier 0123456789ab",
        "size_px 64, fit stretch",
        "brain-tumor-mri",
        "rejected: truncated 2",
        "correlation of 0.96 or more",
        "Test split:** given by the data set",
        "about 15.0\N{NO-BREAK SPACE}% held out, seed 7",
        "5; exported: epoch 4, the best by val_macro_f1 (0.750)",
        "1\N{NO-BREAK SPACE}h\N{NO-BREAK SPACE}01\N{NO-BREAK SPACE}min; workers: 2",
        "AMD EPYC 9V45, 2 CPUs",
        "e78b1eedcafe",
        "torch 2.15.0",
    ):
        assert line in text, line
    (counts,) = read_tables(text, "Data")
    assert counts[0] == ["Split", "Images", "Groups", *CLASSES]
    assert counts[1] == ["training", "40", "9", "10", "10", "10", "10"]
    assert counts[4] == ["rejected", "2", "–", "2", "0", "0", "0"]
    (settings,) = read_tables(text, "Training")
    assert ["optimisation.class_weights", "balanced"] in settings
    assert ["weights_uri", "start.pth"] in settings
    assert "somebody" not in text, "no folder of this machine"


def test_the_front_matter_is_yaml_with_the_fields_of_hugging_face(metrics: dict[str, Any]) -> None:
    text = render(build_card(HOSTILE[:4]), {"training": metrics["training"]}, build_data())
    _, front, _ = text.split("---\n", 2)
    found = yaml.safe_load(front)
    assert found["license"] == "unknown"
    assert found["pipeline_tag"] == "image-classification"
    assert found["library_name"] == "brainray"
    assert "mri" in found["tags"]


def test_hostile_names_are_escaped() -> None:
    y_true = np.arange(80) % len(HOSTILE)
    y_prob = np.full((80, len(HOSTILE)), 1 / len(HOSTILE))
    evaluation = compute_evaluation(y_true, y_prob, HOSTILE, num_resamples=0)
    data = build_data(len(HOSTILE)) | {"name": HOSTILE[3]}
    card = build_card(HOSTILE, calibration={HOSTILE[0]: HOSTILE[4]})
    text = render(card, {"test": evaluation}, data)
    shown = [format_text(name) for name in HOSTILE]
    (counts,) = read_tables(text, "Data")
    assert counts[0][3:] == shown
    scores, classes, confusion = read_tables(text, "Test split")
    assert [row[0] for row in classes[1:]] == shown
    assert confusion[0][1:] == [row[0] for row in confusion[1:]] == shown
    for table in (counts, scores, classes, confusion):
        assert len({len(row) for row in table}) == 1
    page = read_html(text)
    assert set(re.findall(r"<(\w+)", page)) <= {
        *("h1", "h2", "h3", "p", "strong", "ul", "li", "blockquote"),
        *("table", "thead", "tbody", "tr", "th", "td"),
    }
    assert "Heading</h" not in page
    text.encode()


@pytest.mark.parametrize(("all_beat", "no_near_duplicate_beats"), [(0, 0), (0, 1), (1, 0), (1, 1)])
def test_a_better_baseline_is_listed_as_a_limit(
    metrics: dict[str, Any], all_beat: int, no_near_duplicate_beats: int
) -> None:
    for split in ("test", "val"):
        found = metrics[split]
        found["baseline_1nn"]["accuracy"] = found["accuracy"]
        found["baseline_1nn"]["without_near_duplicates"]["accuracy"] = found[
            "without_near_duplicates"
        ]["accuracy"]
    test = metrics["test"]
    test["baseline_1nn"]["accuracy"] += 0.001 * all_beat
    test["baseline_1nn"]["without_near_duplicates"]["accuracy"] += 0.001 * no_near_duplicate_beats
    text = render(build_card(), metrics, build_data())
    assert text.count(BEATEN) == all_beat + no_near_duplicate_beats
    assert ("On the test split, all images: the nearest" in text) == bool(all_beat)
    assert ("On the test split, images without a near duplicate: the" in text) == bool(
        no_near_duplicate_beats
    )


def test_missing_facts_are_shown_as_unknown() -> None:
    y_true, y_prob = build_predictions(40, 0)
    evaluation = compute_evaluation(y_true, y_prob, CLASSES, num_resamples=0)
    card = build_card(training={}, versions={}, code_revision=None, data_manifest_sha256=None)
    data = build_data() | {"name": "", "rejected": {}}
    del data["splits"]["test"]
    text = render(card, {"val": evaluation}, data)
    for line in (
        "**Data set:** unknown; hash of its manifest: unknown",
        "rejected: none",
        "**Recipe:** unknown",
        "**Epochs:** unknown; exported: epoch unknown",
        "**Started from:** unknown weights",
        "**Wall time of the epochs:** unknown; workers: unknown",
        "**Hardware:** unknown",
        "**Code revision:** unknown",
        "**Versions:** unknown",
        "Images with a near duplicate: unknown.",
        "There is no test split",
        "Probabilities are not calibrated after training. The classifier never abstains",
        "- Its probabilities are not calibrated after training.",
        "- It never abstains:",
        "every image gets a class",
    ):
        assert line in text, line
    assert "(no interval)" in text
    assert "memory explains" not in text
    assert "scans that cannot be decoded" not in text
    scores, *_ = read_tables(text, "Validation split")
    assert scores[0] == ["", "Classifier"]


def test_a_split_of_near_duplicates_only_has_no_scores_without(metrics: dict[str, Any]) -> None:
    metrics["test"]["without_near_duplicates"] = {"n": 0}
    metrics["test"]["baseline_1nn"]["without_near_duplicates"] = {"n": 0}
    text = render(build_card(), metrics, build_data())
    assert "Every image has one: there are no scores without." in text
    assert read_tables(text, "Test split")[0][0] == ["", "Classifier", "Nearest thumbnail"]
    assert "100.0\N{NO-BREAK SPACE}% of the test images have a near duplicate" in text


def test_limits_follow_from_the_data(metrics: dict[str, Any]) -> None:
    data = build_data()
    text = render(build_card(), metrics, data)
    assert "No patient is known by name" in text
    assert "more than one split, because" not in text
    named = render(build_card(), metrics, data | {"num_named": 122, "num_shared_groups": 3})
    assert "names a group or patient for 122 of 122 scans" in named
    assert "No patient is known by name" not in named
    assert "3 groups of near-identical slices lie in more than one split" in named


def test_every_scalar_of_the_calibration_is_shown(metrics: dict[str, Any]) -> None:
    calibration = {
        "scale": [1.0, 2.0],
        "min_confidence": 0.6,
        "max_distance": 80.5,
        "facts": {"method": "vector", "num_val_images": 816},
    }
    model_card = build_model_card(build_card(calibration=calibration), metrics, build_data())
    assert model_card["calibration"] == {
        "min_confidence": 0.6,
        "max_distance": 80.5,
        "facts.method": "vector",
        "facts.num_val_images": 816,
    }
    text = render_model_card(model_card)
    section = text.split("## Calibration, abstention, out-of-distribution detection\n")[1].split(
        "\n## "
    )[0]
    assert section.strip().splitlines() == [
        "- **min_confidence:** 0.6",
        "- **max_distance:** 80.5",
        "- **facts.method:** vector",
        "- **facts.num_val_images:** 816",
    ]
    for limit in ("never abstains", "not calibrated", "every image gets a class"):
        assert limit not in text


def test_the_json_has_the_same_content(metrics: dict[str, Any]) -> None:
    model_card = build_model_card(build_card(), metrics, build_data())
    read = json.loads(json.dumps(model_card, allow_nan=False))
    assert render_model_card(read) == render_model_card(model_card)
    test = read["results"]["test"]
    for name in ("accuracy", "accuracy_ci95", "confusion"):
        assert test[name] == metrics["test"][name]
    assert test["without_near_duplicates"]["n"] == 100
    assert read["training"]["exported_epoch"] == 4
    assert read["training"]["configuration"]["weights_uri"] == "start.pth"


def test_guidelines_list_every_item_and_refer_to_existing_sections(metrics: dict[str, Any]) -> None:
    text = render(build_card(), metrics, build_data())
    headings = set(re.findall(r"^## (.*)$", text, re.MULTILINE))
    numbers = {}
    for name in ("CLAIM 2024", "TRIPOD+AI"):
        (table,) = read_tables(text, name)
        part = text.split(f"### {name}\n")[1].split("\n### ")[0]
        opened = part.split("Open: ")[1].split("; ")
        numbers[name] = [row[0] for row in table[1:]] + [item.split()[0] for item in opened]
        answered, count = len(table) - 1, len(set(numbers[name]))
        assert f"in whole or in part: {answered} of {count}." in part
        assert len(numbers[name]) == count
        for words in re.findall(r"[Ss]ee ([^.;:]*)", "\n".join(row[2] for row in table[1:])):
            assert any(words.startswith(heading) for heading in headings), words
    assert set(numbers["CLAIM 2024"]) == {str(number) for number in range(1, 45)}
    assert len(numbers["TRIPOD+AI"]) == 52
    main = {int(number.rstrip("abcdefg")) for number in numbers["TRIPOD+AI"]}
    assert main == set(range(1, 28))
    assert "no claim that a guideline is met" in text


def test_images_are_counted_by_split_class_and_group() -> None:
    splits = ["train", "train", "train", "val", "test", "rejected"]
    manifest = pa.table({"group": [0, 0, 1, 2, 1, 9], "reason": [None] * 5 + ["truncated"]})
    samples = pa.table(
        {
            "split": ["train", "train", "train", "train", "test", "train"],
            "group": pa.array(["p1", None, None, None, None, None], pa.string()),
        }
    )
    data = PreparedData(
        FoundSamples(samples),
        manifest,
        np.array([0, 1, 1, 0, 1, 0]),
        np.array(splits),
        None,  # type: ignore[arg-type]  # no scan is read
        pa.table({}),
        num_named=1,
    )
    assert summarise_data(data, ["a", "b"]) == {
        "num_scans": 6,
        "rejected": {"truncated": 1},
        "rejected_per_class": [1, 0],
        "num_groups": 3,
        "num_shared_groups": 1,
        "num_named": 1,
        "splits": {
            "train": {"n": 3, "num_groups": 2, "per_class": [1, 2], "given": True},
            "val": {"n": 1, "num_groups": 1, "per_class": [1, 0], "given": False},
            "test": {"n": 1, "num_groups": 1, "per_class": [0, 1], "given": True},
        },
    }
