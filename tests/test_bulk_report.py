"""The report of a bulk run: complete, offline, and safe for any URI."""

import base64
import copy
import dataclasses
import re
from collections import Counter
from typing import Any

import pytest

from brainray.images.decode import REJECTION_REASONS
from brainray.inference import report
from brainray.inference.engine import EngineOptions
from brainray.inference.predict import EnginePool
from brainray.inference.stats import STAGES, Progress, RunStats
from brainray.metrics import compute_curves, compute_evaluation
from brainray.reports import charts
from brainray.reports.bulk import UncertainScan, render_bulk_report
from brainray.reports.evaluation import Mistake
from brainray.reports.html import format_duration, format_percent
from tests.test_report import CLASSES, DASH, NBSP, Page, build_mistake, build_predictions

HOSTILE = [
    ("<script>alert(1)</script>.png", "&lt;script&gt;alert(1)&lt;/script&gt;.png"),
    (
        "\"><img src=//x.org/a onerror='b'>&",
        "&#34;&gt;&lt;img src=//x.org/a onerror=&#39;b&#39;&gt;",
    ),
    ("s3://b/a\nb\tc.png", r"s3://b/a\nb\tc.png"),
    ("\u202egpj.exe", r"\u202egpj.exe"),
    ("undecodable\udcff.png", r"undecodable\udcff.png"),
    ("鬼 é.png", "鬼 é.png"),
]
COUNTS = [3, 0, 0, 0, 0, 0, 0, 11, 13, 17, 19, 23, 29, 31, 37, 41, 47, 53, 59, 1607]


def build_counts() -> dict[str, Any]:
    return {
        "total": 2003,
        "by_status": {"classified": 1990, "abstained": 2, "rejected": 11},
        "by_reason": {"truncated": 7, "empty": 3, "eaten_by_dog": 1},
        "by_class": {"glioma": 501, "meningioma": 402, "notumor": 603, "pituitary": 484},
    }


def build_metrics() -> dict[str, Any]:
    return {
        "schema_version": 2,
        "classifier_id": "4fce01ab",
        "classes": list(CLASSES),
        "runtime": {
            "backend": "openvino",
            "precision": "bf16",
            "description": "OpenVINO 2026.4, bf16, 2 threads",
            "num_predictors": 3,
        },
        "counts": build_counts(),
        "run": {
            "started_at": "2026-07-12T10:03:11.123456+00:00",
            "finished_at": "2026-07-12T10:04:12.323456+00:00",
            "wall_s": 61.2,
            "num_new": 2003,
            "num_known": 0,
            "new_counts": build_counts(),
            "images_per_s": 32.7,
            "images_per_s_warm": None,
            "stages_s": {"read": 1.3, "decode": 3.1, "predict": 480.0, "write": 0.4},
            "stages_busy": {
                "read": 0.021,
                "decode": 0.052,
                "predict": 0.934,
                "write": 0.0071,
            },
            "bottleneck": "predict-bound: add predictors (CPUs or GPUs)",
            "memory_peak_bytes": 1234567890,
            "timeline": [[0.0, 0], [20.0, 640], [61.0, 2003]],
        },
        "confidence_histogram": {
            "edges": [round(0.05 * i, 2) for i in range(21)],
            "counts": list(COUNTS),
        },
    }


def build_uncertain(scan_uri: str = "s3://bucket/glioma/0012.jpg") -> UncertainScan:
    return UncertainScan(
        scan_uri=scan_uri,
        predicted_class="meningioma",
        confidence=0.4321,
        second_class="glioma",
        second_confidence=0.4234,
        image_png=build_mistake().image_png,
    )


@pytest.fixture
def plain() -> dict[str, Any]:
    return {
        "title": "Ward 7",
        "metrics": build_metrics(),
        "uncertain": [build_uncertain()],
        "configuration": {"input": {"uri": "s3://bucket"}, "batch_size": 32},
        "facts": {"Set": "s3://bucket"},
    }


@pytest.fixture(scope="module")
def evaluated() -> tuple[dict[str, Any], dict[str, Any]]:
    y_true, y_prob = build_predictions(200, 3)
    evaluation = compute_evaluation(y_true, y_prob, CLASSES, num_resamples=50)
    return evaluation, compute_curves(y_true, y_prob, CLASSES)


@pytest.fixture
def labelled(
    plain: dict[str, Any], evaluated: tuple[dict[str, Any], dict[str, Any]]
) -> dict[str, Any]:
    evaluation, curves = copy.deepcopy(evaluated)
    plain["metrics"]["evaluation"] = evaluation
    mistake = Mistake(
        path="s3://bucket/glioma/0099.jpg",
        true_class="glioma",
        predicted_class="pituitary",
        confidence=0.9876,
        image_png=build_mistake().image_png,
    )
    return {**plain, "curves": curves, "mistakes": [mistake]}


def cut(html: str, anchor: str) -> str:
    """Cut one section out of the page."""
    start = html.index(f'<section id="{anchor}"')
    return html[start : html.index("</section>", start) + len("</section>")]


def list_headings(html: str) -> list[str]:
    return [heading[3:] for heading in Page(html).headings if heading.startswith("h2")]


def test_the_metrics_of_these_tests_have_the_keys_of_a_run() -> None:
    """Compare the metrics of these tests with those of a run."""
    progress = Progress()
    stats = RunStats(num_rows=2, reasons=Counter(empty=1), classes=Counter(glioma=1))
    about = {"backend": "openvino", "precision": "bf16", "description": "OpenVINO"}
    progress.add(stats, 2, 1, dict.fromkeys(STAGES, 0.5), about)
    pool = EnginePool(options=EngineOptions(), num_engines=3, cpus=1.0)
    metadata = {"classifier_id": "4fce01ab", "classes": list(CLASSES)}
    found = report.build_metrics(metadata, progress, pool, 2, 123)

    def list_keys(document: Any, above: str = "") -> set[str]:  # noqa: ANN401
        if not isinstance(document, dict):
            return set()
        names = {f"{above}.{name}" for name in document}
        return names.union(*(list_keys(value, f"{above}.{key}") for key, value in document.items()))

    expected = build_metrics()
    del expected["counts"], expected["confidence_histogram"]  # over all runs: from write_report
    for document in (found, expected):
        for name in ("by_reason", "by_class"):
            document["run"]["new_counts"][name] = None
    assert list_keys(found) == list_keys(expected)
    assert list(found["run"]["stages_s"]) == list(expected["run"]["stages_s"])
    assert found["schema_version"] == expected["schema_version"]


def test_whole_page_is_balanced_and_in_order(labelled: dict[str, Any]) -> None:
    html = render_bulk_report(**labelled)
    assert list_headings(html) == [
        "Summary",
        "Status of every scan",
        "Predicted classes",
        "Confidence",
        "Throughput",
        "Least certain scans",
        "Accuracy on labelled scans",
        "Confusion matrix",
        "Each class",
        "All metrics",
        "ROC and precision-recall",
        "Reliability of the confidence",
        "Worst mistakes",
        "Settings",
        "How to read this report",
    ]
    page = Page(html)
    assert page.headings[0] == "h1 Ward 7"
    assert "Research use only; not a medical device." in page.text
    anchors = {attrs["href"] for attrs in page.find("a")}
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert anchors == {f"#{name}" for name in ids if name and not name.endswith("-title")}
    assert len(ids) == len(set(ids))


def test_without_evaluation_its_sections_are_left_out(
    plain: dict[str, Any], evaluated: tuple[dict[str, Any], dict[str, Any]]
) -> None:
    expected = [
        "Summary",
        "Status of every scan",
        "Predicted classes",
        "Confidence",
        "Throughput",
        "Least certain scans",
        "Settings",
        "How to read this report",
    ]
    html = render_bulk_report(**plain)
    assert list_headings(html) == expected
    assert "AUROC" not in html
    assert "from earlier runs" not in html  # there were no earlier runs
    plain["metrics"]["evaluation"] = None
    plain |= {"curves": evaluated[1], "mistakes": [build_mistake()]}
    assert list_headings(render_bulk_report(**plain)) == expected


def test_missing_parts_are_left_out(labelled: dict[str, Any]) -> None:
    labelled |= {"curves": None, "mistakes": [], "uncertain": [], "configuration": {}}
    labelled["metrics"]["run"] |= {"timeline": [], "stages_s": {}, "stages_busy": {}}
    labelled["metrics"]["run"]["bottleneck"] = ""
    labelled["metrics"]["counts"]["by_reason"] = {}
    html = render_bulk_report(**labelled)
    page = Page(html)
    for absent in ("ROC and precision-recall", "Reliability of the confidence", "Least certain"):
        assert absent not in " ".join(page.headings)
    for absent in ("over time", "Bottleneck:", "Busy for", "Why scans have no class"):
        assert absent not in page.text
    assert "There are none." in page.text
    assert not page.find("img")
    assert "All settings" not in html
    assert "Runtime (4)" in page.text


def test_page_loads_nothing(labelled: dict[str, Any]) -> None:
    labelled["uncertain"] = [build_uncertain("https://example.org/a.png")]
    html = render_bulk_report(**labelled)
    page = Page(html)
    for tag, attrs in page.tags:
        for name in ("src", "href", "srcset", "data", "xlink:href", "poster", "action"):
            target = attrs.get(name)
            assert target is None or target.startswith(("#", "data:image/png;base64,")), tag
        assert not [name for name in attrs if name.startswith("on")]
    for tag in ("script", "link", "iframe", "object"):
        assert not page.find(tag)
    assert "url(" not in html
    assert "@import" not in html
    policy = [attrs["content"] for attrs in page.find("meta") if "http-equiv" in attrs]
    assert policy == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]


def test_tables_and_figures_have_captions_and_labels(labelled: dict[str, Any]) -> None:
    html = render_bulk_report(**labelled)
    page = Page(html)
    tables = re.findall(r"<table.*?</table>", html, re.DOTALL)
    assert len(tables) == 11
    for table in tables:
        assert re.search(r"<caption>[^<]+</caption>", table), table[:200]
    figures = [attrs for attrs in page.find("svg") if attrs.get("class") == "plot"]
    assert len(figures) == 5
    assert all(attrs["role"] == "img" and attrs["aria-label"] for attrs in figures)
    assert all(attrs.get("scope") in ("row", "col") for attrs in page.find("th"))
    assert all(attrs["alt"] for attrs in page.find("img"))
    assert html.count('lang="en"') == 1


def test_statuses_and_reasons_are_counted_and_described(plain: dict[str, Any]) -> None:
    html = render_bulk_report(**plain)
    text = Page(cut(html, "answers")).text
    assert f"training images. 11 0.5{NBSP}%" in text
    assert f"probable enough. 2 0.1{NBSP}%" in text
    assert f"probability. 1,990 99.4{NBSP}%" in text
    assert f"truncated {REJECTION_REASONS['truncated']} 7 0.3{NBSP}%" in text
    assert f"empty {REJECTION_REASONS['empty']} 3 0.1{NBSP}%" in text
    assert f" eaten_by_dog 1 <{NBSP}0.1{NBSP}%" in text  # a reason without a description
    assert text.index("truncated") < text.index("empty") < text.index("eaten_by_dog")
    short = Page(cut(html, "short")).text
    assert "2,003" in short
    assert f"99.4{NBSP}%" in short
    assert "2 abstained, 11 rejected" in short


def test_unknown_statuses_and_classes_are_shown(plain: dict[str, Any]) -> None:
    plain["metrics"]["counts"]["by_status"]["postponed"] = 41
    plain["metrics"]["counts"]["by_class"]["sarcoma"] = 43
    html = render_bulk_report(**plain)
    assert "Postponed 41" in Page(cut(html, "answers")).text
    assert f"sarcoma 43 2.1{NBSP}%" in Page(cut(html, "mix")).text


def test_class_mix_has_counts_shares_and_bars(plain: dict[str, Any]) -> None:
    del plain["metrics"]["counts"]["by_class"]["pituitary"]
    section = cut(render_bulk_report(**plain), "mix")
    text = Page(section).text
    assert f"glioma 501 33.3{NBSP}% meningioma 402 26.7{NBSP}% notumor 603 40.0{NBSP}%" in text
    assert f"pituitary 0 0.0{NBSP}%" in text
    bars = re.findall(r"--share: ([\d.]+)%; --tone: var\(--c(\d)\)", section)
    assert bars == [("33.27", "0"), ("26.69", "1"), ("40.04", "2")]


def test_series_and_studies_are_counted_by_answer(plain: dict[str, Any]) -> None:
    assert "Series and studies" not in list_headings(render_bulk_report(**plain))
    plain["metrics"]["series"] = {"total": 9, "by_answer": {"glioma": 4, "indeterminate": 5}}
    plain["metrics"]["studies"] = {"total": 3, "by_answer": {"indeterminate": 3}}
    text = Page(cut(render_bulk_report(**plain), "series")).text
    assert "glioma 4 0 meningioma 0 0 notumor 0 0 pituitary 0 0 indeterminate 5 3" in text
    assert "not calibrated" in text
    plain["metrics"]["studies"] = {"total": 0, "by_answer": {}}
    assert "indeterminate 5 0" in Page(cut(render_bulk_report(**plain), "series")).text


def test_optional_metrics_are_shown(labelled: dict[str, Any]) -> None:
    html = render_bulk_report(**labelled)
    assert f"after warm-up {DASH}" in Page(html).text
    assert "that have no label" not in html
    labelled["metrics"]["run"]["images_per_s_warm"] = 1234.56
    labelled["metrics"]["evaluation"]["num_without_truth"] = 1790
    text = Page(render_bulk_report(**labelled)).text
    assert "after warm-up 1,234.6" in text
    assert "On 200 labelled scans; 1,790 more were classified that have no label." in text
    labelled["metrics"]["evaluation"]["num_labelled"] = 200
    assert "random sample" not in render_bulk_report(**labelled)
    labelled["metrics"]["evaluation"]["num_labelled"] = 1_000_000
    text = Page(render_bulk_report(**labelled)).text
    assert "On 200 labelled scans, a random sample of 1,000,000" in text


def test_a_resumed_run_counts_new_and_known_scans_separately(plain: dict[str, Any]) -> None:
    assert ">New</th>" not in render_bulk_report(**plain)
    plain["metrics"]["run"] |= {
        "num_new": 97,
        "num_known": 1906,
        "new_counts": {
            "total": 97,
            "by_status": {"classified": 89, "rejected": 8},
            "by_reason": {"truncated": 5},
            "by_class": {"glioma": 61, "notumor": 28},
        },
    }
    html = render_bulk_report(**plain)
    assert "97 new, 1,906 from earlier runs" in Page(cut(html, "short")).text
    answers = Page(cut(html, "answers")).text
    assert "1,990 89 " in answers
    assert "its image does. 7 5 " in answers
    assert "glioma 501 61 " in Page(cut(html, "mix")).text


def test_confidence_has_a_histogram_a_table_and_cumulative_counts(plain: dict[str, Any]) -> None:
    html = cut(render_bulk_report(**plain), "confidence")
    text = Page(html).text
    for count, low in zip(COUNTS, range(0, 100, 5), strict=True):
        assert f"{low / 100:.2f}{DASH}{(low + 5) / 100:.2f} {count:,} " in f"{text} "
        tip = f"<title>{low / 100:.2f} to {(low + 5) / 100:.2f}: {count:,} scans</title>"
        assert (tip in html) == (count > 0)
    assert f"below 0.50 44 2.2{NBSP}%" in text
    assert f"below 0.95 383 19.2{NBSP}%" in text


def test_histogram_bars_are_to_scale_and_have_a_minimum_height() -> None:
    figure = charts.draw_histogram([0, 0.25, 0.5, 1], [1, 5000, 10000], title="", x_label="")
    heights = [float(h) for h in re.findall(r'class="bar"[^>]* height="([\d.]+)"', figure)]
    assert heights[0] == 1.5
    assert heights[2] == pytest.approx(2 * heights[1], abs=0.2)
    widths = [float(w) for w in re.findall(r'class="bar"[^>]* width="([\d.]+)"', figure)]
    assert widths[2] + 2 == pytest.approx(2 * (widths[0] + 2), abs=0.3)


def test_throughput_shows_every_number(plain: dict[str, Any]) -> None:
    whole = render_bulk_report(**plain)
    assert "Started 2026-07-12 10:03:11 UTC" in Page(whole).text
    html = cut(whole, "throughput")
    text = Page(html).text
    for shown in (
        "Scans per second 32.7",
        "New scans 2,003",
        "From earlier runs 0",
        f"1{NBSP}min{NBSP}01{NBSP}s",
        "2026-07-12 10:04:12 UTC",
        "Predictors 3",
        "1.1 GiB",
        "predict-bound: add predictors (CPUs or GPUs)",
        f"read fetch bytes 1.3{NBSP}s 2.1{NBSP}%",
        f"decode turn bytes into pixels 3.1{NBSP}s 5.2{NBSP}%",
        f"predict run the network 8{NBSP}min{NBSP}00{NBSP}s 93.4{NBSP}%",
        f"write store predictions 0.4{NBSP}s 0.7{NBSP}%",
    ):
        assert shown in text
    assert re.findall(r"--share: ([\d.]+)%; --tone: var\(--wrong\)", html) == ["93.40"]
    assert "<title>2,003 scans after 61.0 s</title>" in html


@pytest.mark.parametrize(
    ("timeline", "label"),
    [
        ([[0, 0]], "(s)"),
        ([[61.0, 2000]], "(s)"),
        ([[0, 0], [600, 5]], "(min)"),
        ([[0, 0], [14400, 3_000_000]], "(h)"),
    ],
)
def test_the_progress_chart_fits_any_timeline(
    plain: dict[str, Any], timeline: list[list[float]], label: str
) -> None:
    plain["metrics"]["run"]["timeline"] = timeline
    html = cut(render_bulk_report(**plain), "throughput")
    assert f"time since the start {label}" in html
    assert html.count("<circle") == 1
    assert ('<path class="line s0"' in html) == (len(timeline) > 1)
    (width,) = re.findall(r'class="panel"[^>]* width="([\d.]+)"', html)
    (cx,) = re.findall(r'cx="([\d.]+)"', html)
    assert float(cx) == (0 if timeline == [[0, 0]] else float(width))


def test_wide_tick_labels_get_a_wide_margin() -> None:
    def left(done: int) -> float:
        figure = charts.draw_progress([(0, 0), (9, done)], title="")
        return float(re.findall(r'class="panel" x="([\d.]+)"', figure)[0])

    assert left(10) == 36
    assert left(3_000_000) > 6.5 * len("3,000,000")


def test_gallery_shows_image_runner_up_and_uri(plain: dict[str, Any]) -> None:
    html = cut(render_bulk_report(**plain), "uncertain")
    page = Page(html)
    (image,) = page.find("img")
    scan = plain["uncertain"][0]
    assert image["alt"] == "Scan predicted as meningioma, runner-up glioma"
    assert base64.b64decode((image["src"] or "").partition(",")[2]) == scan.image_png
    assert f"meningioma 43.2{NBSP}% glioma 42.3{NBSP}%" in page.text
    assert "s3://bucket/glioma/0012.jpg" in page.text
    assert "--share: 43.2%; --tone: var(--c1)" in html
    assert "--share: 42.3%; --tone: var(--c0)" in html


def test_gallery_shows_the_map_beside_the_scan(labelled: dict[str, Any]) -> None:
    scan, mistake = labelled["uncertain"][0], labelled["mistakes"][0]
    assert "class activation map" not in render_bulk_report(**labelled)
    labelled["uncertain"] = [scan, dataclasses.replace(scan, overlay_png=b"map")]
    labelled["mistakes"] = [dataclasses.replace(mistake, overlay_png=b"other")]
    html = render_bulk_report(**labelled)
    for anchor, count, content in (("uncertain", 3, b"map"), ("mistakes", 2, b"other")):
        page = Page(cut(html, anchor))
        images = page.find("img")
        assert len(images) == count
        assert base64.b64decode((images[-1]["src"] or "").partition(",")[2]) == content
        assert 'class="gallery paired"' in cut(html, anchor)
        assert "It does not outline a tumour." in page.text
    uncertain = Page(cut(html, "uncertain")).find("img")
    assert uncertain[-1]["alt"] == "Class activation map of meningioma"
    assert Page(cut(html, "mistakes")).find("img")[-1]["alt"] == "Class activation map of pituitary"


def test_evaluation_is_shown_as_after_training(labelled: dict[str, Any]) -> None:
    html = render_bulk_report(**labelled)
    evaluation = labelled["metrics"]["evaluation"]
    low, high = evaluation["accuracy_ci95"]
    accuracy = f"{100 * evaluation['accuracy']:.1f}{NBSP}%"
    assert accuracy in cut(html, "short")
    assert accuracy in cut(html, "accuracy")
    assert f"95 % interval {100 * low:.1f}{DASH}{100 * high:.1f}{NBSP}%" in cut(html, "accuracy")
    diagonal = re.findall(r'class="right"[^>]*>(\d+)<', cut(html, "confusion"))
    assert [int(n) for n in diagonal] == [evaluation["confusion"][i][i] for i in range(4)]
    entry = evaluation["per_class"]["pituitary"]
    low, high = entry["specificity_ci95"]
    cell = f"<td>{entry['specificity']:.3f}<small>{low:.3f}{DASH}{high:.3f}</small></td>"
    assert cell in cut(html, "classes")
    assert f"<td>{evaluation['mcc']:.3f}<small>" in cut(html, "metrics")
    assert "ROC curve of each class on the scans of known class" in html
    mistakes = Page(cut(html, "mistakes")).text
    assert f"glioma → pituitary 98.8{NBSP}% s3://bucket/glioma/0099.jpg" in mistakes
    assert "which takes them as independent" in html
    evaluation["num_groups"] = 17
    assert "which takes them as independent" not in render_bulk_report(**labelled)


@pytest.mark.parametrize(("text", "shown"), HOSTILE)
def test_hostile_text_is_escaped(labelled: dict[str, Any], text: str, shown: str) -> None:
    labelled["uncertain"] = [
        UncertainScan(
            scan_uri=text,
            predicted_class=text,
            confidence=0.5,
            second_class=text,
            second_confidence=0.4,
            image_png=b"\x89PNG",
        )
    ]
    labelled["title"] = text
    labelled["facts"] = {text: text}
    labelled["configuration"] = {text: text}
    metrics = labelled["metrics"]
    metrics["classifier_id"] = metrics["run"]["bottleneck"] = metrics["run"]["started_at"] = text
    metrics["runtime"]["description"] = text
    metrics["counts"]["by_reason"] = {text: 1}
    metrics["counts"]["by_class"][text] = 1
    metrics["run"]["stages_busy"][text] = 0.5
    html = render_bulk_report(**labelled)
    html.encode("utf-8")
    assert html.count(shown) >= 18
    page = Page(html)
    assert not page.find("script")
    assert len(page.find("img")) == 2  # one in the gallery, one of a mistake
    assert text.isprintable() or text not in html


def test_a_run_without_scans_is_rendered(plain: dict[str, Any]) -> None:
    nothing = {"total": 0, "by_status": {}, "by_reason": {}, "by_class": {}}
    plain["uncertain"] = []
    plain["metrics"]["counts"] = nothing
    plain["metrics"]["confidence_histogram"]["counts"] = [0] * 20
    plain["metrics"]["run"] |= {
        "wall_s": 0.0,
        "num_new": 0,
        "new_counts": nothing,
        "images_per_s": 0.0,
        "images_per_s_warm": None,
        "stages_s": dict.fromkeys(STAGES, 0.0),
        "stages_busy": dict.fromkeys(STAGES, 0.0),
        "bottleneck": "",
        "memory_peak_bytes": 0,
        "timeline": [],
    }
    plain["metrics"]["runtime"] = {"num_predictors": 1}
    html = render_bulk_report(**plain)
    assert list_headings(html) == [
        "Summary",
        "Status of every scan",
        "Throughput",
        "Settings",
        "How to read this report",
    ]
    text = Page(html).text
    assert f"Classified {DASH} 0 abstained, 0 rejected" in text
    assert (
        f"per second 0.0 Scans per second after warm-up {DASH} New scans 0 From earlier runs 0"
        in text
    )
    assert f"Wall-clock time 0.0{NBSP}s" in text
    assert "Peak memory 0 Bytes" in text
    assert "--share: " not in cut(html, "throughput")  # no bars
    assert "None" not in text
    assert "nan" not in re.sub(r"base64,\S+", "", html)


def test_percentages_and_durations_are_formatted() -> None:
    assert format_percent(0.0) == f"0.0{NBSP}%"
    assert format_percent(0.0004) == f"<{NBSP}0.1{NBSP}%"
    assert format_percent(0.0005) == f"0.1{NBSP}%"
    assert format_percent(0.9996) == f">{NBSP}99.9{NBSP}%"
    assert format_percent(1.0) == f"100.0{NBSP}%"
    assert format_percent(None) == format_duration(None) == DASH
    assert format_duration(0.25) == f"0.2{NBSP}s"
    assert format_duration(150) == f"2{NBSP}min{NBSP}30{NBSP}s"
