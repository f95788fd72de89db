"""The evaluation report: complete, offline, and safe for any path."""

import base64
import copy
import io
import re
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest
from PIL import Image

from brainray.metrics import (
    compute_accuracy,
    compute_curves,
    compute_evaluation,
    compute_risk_coverage,
)
from brainray.reports import charts
from brainray.reports.evaluation import Mistake, render_evaluation_report
from brainray.reports.html import format_interval, format_number, format_percent, format_text

CLASSES = ("glioma", "meningioma", "notumor", "pituitary")
VOID = {"meta", "img", "br", "link", "input", "hr"}
NBSP = "\N{NO-BREAK SPACE}"
DASH = "\N{EN DASH}"


class Page(HTMLParser):
    """Parsed tags, headings and text of a page; raises if a tag is not balanced."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.headings: list[str] = []
        self.words: list[str] = []
        self.feed(html)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag, f"</{tag}> in the wrong place, line {self.getpos()}"

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.words.append(data)
        if self.open and self.open[-1] in ("h1", "h2", "h3"):
            self.headings.append(f"{self.open[-1]} {data}")

    @property
    def text(self) -> str:
        return re.sub(r"[ \n]+", " ", " ".join(self.words))

    def find(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.tags if name == tag]


def build_predictions(n: int, seed: int) -> tuple[Any, Any]:
    rng = np.random.default_rng(seed)
    y_true = rng.integers(0, 4, n)
    logits = rng.normal(size=(n, 4))
    logits[np.arange(n), y_true] += 3
    y_prob = np.exp(2 * logits)
    return y_true, y_prob / y_prob.sum(axis=1, keepdims=True)


def build_split(n: int, seed: int) -> tuple[dict[str, Any], dict[str, Any]]:
    y_true, y_prob = build_predictions(n, seed)
    groups = np.arange(n) // 2
    evaluation = compute_evaluation(y_true, y_prob, CLASSES, groups=groups, num_resamples=50)
    half = slice(0, n // 2)
    nearest = np.where(np.arange(n) % 5 == 0, (y_true + 1) % 4, y_true)
    evaluation["without_near_duplicates"] = compute_evaluation(
        y_true[half], y_prob[half], CLASSES, num_resamples=50
    )
    evaluation["baseline_1nn"] = compute_accuracy(y_true, nearest, num_resamples=50)
    evaluation["baseline_1nn"]["without_near_duplicates"] = {
        "n": n // 2,
        "accuracy": 0.6543,
        "accuracy_ci95": None,
    }
    evaluation["rejected"] = {"too_small": 3} if seed else {}
    evaluation["near_duplicate_correlation"] = 0.995
    return evaluation, compute_curves(y_true, y_prob, CLASSES)


def build_epochs() -> list[dict[str, Any]]:
    return [
        {
            "epoch": epoch,
            "num_epochs": 4,
            "size_px": 224,
            "train_loss": 1.0 / (epoch + 1),
            "train_accuracy": 0.6 + 0.1 * epoch,
            "val_loss": 0.9 / (epoch + 1),
            "val_accuracy": 0.65 + 0.1 * epoch,
            "ema_val_accuracy": 0.5,
        }
        for epoch in range(4)
    ]


def build_mistake(path: str = "Testing/glioma/Te-gl_0012.jpg") -> Mistake:
    png = io.BytesIO()
    Image.new("L", (8, 8), 90).save(png, "PNG")
    return Mistake(
        path=path,
        true_class="glioma",
        predicted_class="meningioma",
        confidence=0.9876,
        image_png=png.getvalue(),
    )


@pytest.fixture(scope="module")
def full_inputs() -> dict[str, Any]:
    val, val_curves = build_split(120, 0)
    test, test_curves = build_split(200, 1)
    return {
        "title": "Run of 12 July",
        "metrics": {
            "schema_version": 1,
            "classes": list(CLASSES),
            "val": val,
            "test": test,
            "training": {"best_epoch": 3},
        },
        "epochs": build_epochs(),
        "curves": {"val": val_curves, "test": test_curves},
        "mistakes": [build_mistake()],
        "configuration": {"data": {"seed": 7}, "learning_rate": 0.001},
        "facts": {"Recipe": "smoke"},
    }


@pytest.fixture
def inputs(full_inputs: dict[str, Any]) -> dict[str, Any]:
    return copy.deepcopy(full_inputs)


def test_the_full_page_is_balanced_and_in_order(inputs: dict[str, Any]) -> None:
    page = Page(render_evaluation_report(**inputs))
    assert [heading[3:] for heading in page.headings if heading.startswith("h2")] == [
        "Accuracy on the test set",
        "Learning curves",
        "Confusion matrix",
        "Each class",
        "All metrics",
        "ROC and precision-recall",
        "Reliability of the confidence",
        "Worst mistakes",
        "Rejected scans",
        "Settings",
        "How to read this report",
    ]
    assert page.headings[0] == "h1 Run of 12 July"
    assert "Research use only; not a medical device." in page.text
    anchors = {attrs["href"] for attrs in page.find("a")}
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert anchors <= {f"#{name}" for name in ids}
    assert len(ids) == len(set(ids))


def test_the_page_loads_no_external_resource(inputs: dict[str, Any]) -> None:
    html = render_evaluation_report(**inputs)
    page = Page(html)
    for tag, attrs in page.tags:
        for name in ("src", "href", "srcset", "data", "xlink:href", "poster", "action"):
            target = attrs.get(name)
            assert target is None or target.startswith(("#", "data:image/png;base64,")), tag
    assert not page.find("script")
    assert not page.find("link")
    assert "url(" not in html
    assert "@import" not in html
    policy = [attrs["content"] for attrs in page.find("meta") if "http-equiv" in attrs]
    assert policy == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]


def test_the_headline_shows_three_accuracies(inputs: dict[str, Any]) -> None:
    test = inputs["metrics"]["test"]
    text = Page(render_evaluation_report(**inputs)).text
    headline = text[text.index("look alike") : text.index("Training values")]
    for found in (test, test["without_near_duplicates"], test["baseline_1nn"]):
        low, high = found["accuracy_ci95"]
        assert f"{100 * found['accuracy']:.1f}{NBSP}%" in headline
        assert f"95 % interval {100 * low:.1f}{DASH}{100 * high:.1f}{NBSP}%" in headline
    assert f"65.4{NBSP}%" in headline  # the baseline without near duplicates
    assert "correlation of 0.995 or more" in headline


def test_cross_validation_shows_its_folds_without_an_interval_over_them(
    inputs: dict[str, Any],
) -> None:
    metrics = inputs["metrics"]
    metrics["cv"], inputs["curves"] = metrics.pop("test"), {"cv": inputs["curves"]["test"]}
    del metrics["val"], metrics["training"]
    score = {"accuracy": 0.8, "macro_f1": 0.75, "macro_auroc": 0.85}
    ends = {f"{name}_ci95": [value - 0.1, value + 0.1] for name, value in score.items()}
    fold = {"n": 100, **score, **ends, "best_epoch": 6, "num_epochs": 9}
    metrics["folds"] = [{"fold": number, **fold} for number in range(2)]
    row = {"mean": 0.111, "sd": 0.222, "min": 0.333, "max": 0.444}
    metrics["spread"] = dict.fromkeys(score, row)
    inputs["epochs"] = []
    page = Page(render_evaluation_report(**inputs))
    headings = [heading[3:] for heading in page.headings if heading.startswith("h2")]
    assert headings[:3] == ["Accuracy on the pooled folds", "The folds", "Confusion matrix"]
    table = page.text[page.text.index("Each fold with its") : page.text.index("Blue is right")]
    assert f"fold-1 100 0.800 0.700{DASH}0.900 0.750" in table
    assert "7 of 9" in table
    for label, value in (("Mean", 0.111), ("Standard deviation", 0.222), ("Largest", 0.444)):
        assert f"{label} {value} {value} {value}" in table
    assert "It is no interval" in page.text
    assert "200 scans of the pooled folds" in page.text


def test_headline_falls_back_to_validation(inputs: dict[str, Any]) -> None:
    del inputs["metrics"]["test"], inputs["curves"]["test"]
    page = Page(render_evaluation_report(**inputs))
    assert "h2 Accuracy on the validation set" in page.headings
    assert f"{100 * inputs['metrics']['val']['accuracy']:.1f}{NBSP}%" in page.text


def test_tables_show_values_with_intervals(inputs: dict[str, Any]) -> None:
    html = render_evaluation_report(**inputs)
    for split in ("val", "test"):
        evaluation = inputs["metrics"][split]
        for entry, name in (
            (evaluation, "mcc"),
            (evaluation, "log_loss"),
            (evaluation["per_class"]["pituitary"], "specificity"),
            (evaluation["per_class"]["glioma"], "auroc"),
        ):
            low, high = entry[f"{name}_ci95"]
            cell = f"<td>{entry[name]:.3f}<small>{low:.3f}{DASH}{high:.3f}</small></td>"
            assert cell in html
    for head in Page(html).find("th"):
        assert head.get("scope") in ("row", "col")


def test_confusion_shows_counts_and_row_shares(inputs: dict[str, Any]) -> None:
    inputs["metrics"]["test"]["confusion"] = [[90, 10, 0, 0], [0, 0, 0, 0], [0] * 4, [0, 0, 0, 7]]
    html = render_evaluation_report(**inputs)
    right = re.search(r'class="right" style="--share: ([\d.]+)%">90<small>90\.0.%', html)
    wrong = re.search(r'class="wrong" style="--share: ([\d.]+)%">10<small>10\.0.%', html)
    assert right is not None
    assert wrong is not None
    assert 60 > float(right[1]) > float(wrong[1]) > 0
    assert f'style="--share: 0.0%">0<small>{DASH}</small>' in html  # a class with no scan


def test_learning_curves_of_resumed_and_diverged_runs_are_drawn(inputs: dict[str, Any]) -> None:
    inputs["epochs"][1]["train_loss"] = float("nan")
    inputs["epochs"] += [{**inputs["epochs"][3], "val_accuracy": 0.4321}]
    html = render_evaluation_report(**inputs)
    assert "validation, epoch 4: 0.4321" in html
    assert "validation, epoch 4: 0.95" not in html
    assert "training, epoch 2: 0.7" in html  # its accuracy
    assert "nan" not in re.sub(r"base64,\S+", "", html)
    inputs["epochs"] = inputs["epochs"][:1]
    Page(render_evaluation_report(**inputs))


def test_the_axis_of_a_perfect_accuracy_ends_at_one(inputs: dict[str, Any]) -> None:
    for record in inputs["epochs"]:
        record["train_accuracy"] = record["val_accuracy"] = 1.0
    html = render_evaluation_report(**inputs)
    learning = html[html.index('id="learning"') : html.index('id="confusion"')]
    assert ">0.90<" in learning
    assert ">1.10<" not in learning
    assert ">1.2<" not in learning


@pytest.mark.parametrize(
    ("path", "shown"),
    [
        ("<script>alert(1)</script>.png", "&lt;script&gt;alert(1)&lt;/script&gt;.png"),
        ("a\"b'c&d.png", "a&#34;b&#39;c&amp;d.png"),
        ("a\nb\tc.png", r"a\nb\tc.png"),
        ("\u202egpj.exe", r"\u202egpj.exe"),
        ("undecodable\udcff.png", r"undecodable\udcff.png"),
        ("鬼 é.png", "鬼 é.png"),
    ],
)
def test_paths_are_escaped_and_made_printable(
    inputs: dict[str, Any], path: str, shown: str
) -> None:
    inputs["mistakes"] = [build_mistake(path)]
    inputs["facts"] = {"Data": path}
    inputs["configuration"] = {path: path}
    inputs["title"] = path
    inputs["metrics"]["test"]["rejected"] = {path: 1}
    html = render_evaluation_report(**inputs)
    html.encode("utf-8")
    assert html.count(shown) >= 7
    page = Page(html)
    assert not page.find("script")
    assert path.isprintable() or path not in html


def test_class_names_are_escaped_in_figures() -> None:
    figure = charts.draw_history(
        {"<b>": [(1, 0.5), (2, 0.25)]}, title='"quoted" <i>', y_axis=charts.build_axis(0, 1)
    )
    assert "<b>" not in figure
    assert 'aria-label="&#34;quoted&#34; &lt;i&gt;"' in figure


def test_mistake_picture_is_embedded(inputs: dict[str, Any]) -> None:
    mistake = inputs["mistakes"][0]
    page = Page(render_evaluation_report(**inputs))
    (image,) = page.find("img")
    assert image["alt"] == "Scan of class glioma, predicted as meningioma"
    assert base64.b64decode((image["src"] or "").partition(",")[2]) == mistake.image_png
    assert f"98.8{NBSP}%" in page.text
    assert mistake.path in page.text


def test_a_report_without_mistakes_says_so(inputs: dict[str, Any]) -> None:
    inputs["mistakes"] = []
    page = Page(render_evaluation_report(**inputs))
    assert "There are none." in page.text
    assert not page.find("img")


def test_a_report_without_training_has_no_training_sections(inputs: dict[str, Any]) -> None:
    y_true, y_prob = build_predictions(60, 5)
    evaluation = compute_evaluation(y_true, y_prob, CLASSES, num_resamples=0)
    page = Page(
        render_evaluation_report(
            title="Evaluation",
            metrics={"schema_version": 1, "classes": list(CLASSES), "test": evaluation},
            epochs=[],
            curves={"test": inputs["curves"]["test"]},
            mistakes=[],
            configuration={},
            facts={},
        )
    )
    assert f"{100 * evaluation['accuracy']:.1f}{NBSP}%" in page.text
    assert "unknown: the training images were not available" in page.text
    sections = " ".join(page.headings)
    for absent in ("Learning", "Rejected", "Settings"):
        assert absent not in sections
    assert "Validation" not in page.text


def test_undefined_values_are_dashes(inputs: dict[str, Any]) -> None:
    test = inputs["metrics"]["test"]
    for name in ("accuracy", "mcc", "ece"):
        test[name] = test[f"{name}_ci95"] = None
    test["per_class"]["glioma"]["auroc"] = test["per_class"]["glioma"]["auroc_ci95"] = None
    test["without_near_duplicates"] = {"n": 0}
    inputs["curves"]["test"]["per_class"]["glioma"]["roc"] = {"fpr": [], "tpr": []}
    html = render_evaluation_report(**inputs)
    page = Page(html)
    assert f'<dd class="big">{DASH}</dd>' in html
    assert f"Matthews correlation {DASH} " in page.text
    assert f"Test: ECE {DASH}" in page.text
    assert "None" not in page.text
    assert "0 scans without a near duplicate in training" in page.text


def test_calibration_and_its_curve_are_shown(inputs: dict[str, Any]) -> None:
    assert 'id="confidence"' not in render_evaluation_report(**inputs)  # nothing was fitted
    y_true, y_prob = build_predictions(200, 1)
    selective = compute_risk_coverage(y_true, y_prob, CLASSES, min_confidence=0.9)
    scores = {"log_loss": 0.5, "brier": 0.25, "ece": 0.125}
    calibration = {
        "calibration": {
            "method": "temperature",
            "before": scores,
            "after": {name: value / 2 for name, value in scores.items()},
        },
        "selective": selective,
        "by_reason": {"low_confidence": 31},
    }
    html = render_evaluation_report(
        **inputs
        | {
            "metrics": inputs["metrics"]
            | {"test": {**inputs["metrics"]["test"], "confidence": calibration}}
        }
    )
    section = html[html.index('<section id="confidence"') :].split("</section>")[0] + "</section>"
    page = Page(section)
    for shown in ("temperature", "0.125 → 0.062", "0.500 → 0.250", "31", "low_confidence"):
        assert shown in page.text, shown
    assert f"{100 * selective['coverage']:.1f}" in page.text
    assert section.count("<figure") == 1
    assert f"{selective['coverage']:.1%} of the scans get a class" in section


def test_configuration_and_rejections_are_listed(inputs: dict[str, Any]) -> None:
    page = Page(render_evaluation_report(**inputs))
    assert "data.seed 7" in page.text
    assert "learning_rate 0.001" in page.text
    assert "best_epoch 3" in page.text
    assert "too_small 3 0" in page.text  # test, validation


def test_numbers_and_text_are_formatted() -> None:
    assert format_number(-0.01234) == "\N{MINUS SIGN}0.012"
    assert format_number(1311) == "1,311"
    assert format_number(None) == format_number(float("nan")) == format_percent(None) == DASH
    assert format_percent(0.97834) == f"97.8{NBSP}%"
    assert format_interval([0.1, 0.25]) == f"0.100{DASH}0.250"
    assert format_interval([0.1, 0.25], percent=True) == f"10.0{DASH}25.0{NBSP}%"
    assert format_interval(None) == format_interval([None, 1.0]) == ""
    assert format_text("a\N{NO-BREAK SPACE}b") == "a\N{NO-BREAK SPACE}b"


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0, 1, (0, 0.2, 0.4, 0.6, 0.8, 1)),
        (0, 1.34, (0, 0.5, 1, 1.5)),
        (0.88, 1, (0.85, 0.9, 0.95, 1)),
        (1, 1, (1, 1.2, 1.4, 1.6, 1.8, 2)),
    ],
)
def test_axis_has_round_ticks_that_cover_the_range(
    low: float, high: float, ticks: tuple[float, ...]
) -> None:
    axis = charts.build_axis(low, high)
    assert axis.ticks == pytest.approx(ticks)
    assert (axis.low, axis.high) == (axis.ticks[0], axis.ticks[-1])


def test_points_are_projected_by_the_axes() -> None:
    chart = charts.Chart("", charts.build_axis(0, 10), charts.build_axis(0, 1))
    assert chart.project(0, 0) == (0, chart.height)
    assert chart.project(5, 1) == (chart.width / 2, 0)
    chart.line([(0, 0), (0, 0), (10, 1)], "s0")
    assert re.findall(r'class="line s0" d="([^"]*)"', chart.render()) == [
        f"M0 {chart.height:g}L{chart.width:g} 0"
    ]


def test_an_inset_is_drawn_only_if_every_curve_reaches_the_corner() -> None:
    good = [(0.0, 0.0), (0.02, 0.97), (1.0, 1.0)]
    poor = [(0.0, 0.0), (0.5, 0.5), (1.0, 1.0)]

    def draw(*curves: list[tuple[float, float]]) -> str:
        return charts.draw_unit_curves(
            dict(zip("ab", curves, strict=False)),
            title="",
            x_label="x",
            y_label="y",
            zoom_left=True,
        )

    magnified = draw(good, good)
    assert magnified.count('class="line s1"') == 2
    view, width = re.findall(r'class="inset".* width="([\d.]+)".*viewBox="([^"]*)"', magnified)[0][
        ::-1
    ]
    left, top, shown, _ = map(float, view.split())
    assert (left, top) == (0, 0)
    assert float(width) > 4 * shown
    assert "inset" not in draw(good, poor)
