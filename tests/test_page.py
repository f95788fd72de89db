"""The web page in a real browser, served by the service's own application."""

import csv
import io
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import nibabel as nib
import numpy as np
import pydicom
import pytest
from numpy.typing import NDArray
from PIL import Image
from pydicom.data import get_testdata_file
from selenium import webdriver
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement

from brainray.errors import RejectedImage
from brainray.images.decode import decode_image
from brainray.model.calibration import LOW_CONFIDENCE, UNLIKE_TRAINING
from brainray.model.reasons import REASONS
from brainray.phantoms import draw_phantom
from brainray.serving.problem import INTERNAL_ERROR, Problem
from brainray.serving.routes import WEB
from tests.conftest import CLASSES
from tests.dicom_files import make_mr
from tests.fixed_service import CLASSIFIER_ID, FixedResult, FixedService, serve_fixed

WAIT_S = 10.0
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
TOKEN = "correct-horse-battery"

GLIOMA = (0.9366, 0.043, 0.02, 0.0004)
UNSURE = (0.38, 0.34, 0.08, 0.2)
SCANS = {
    "glioma.png": FixedResult(GLIOMA),
    "meningioma.png": FixedResult((0.043, 0.9366, 0.02, 0.0004)),
    "pituitary.tif": FixedResult((0.043, 0.02, 0.0004, 0.9366)),
    "abstain.png": FixedResult(UNSURE, LOW_CONFIDENCE),
    "foreign.png": FixedResult(UNSURE, UNLIKE_TRAINING),
    "busy.png": FixedResult(
        GLIOMA, error=Problem("too_busy", "128 scans wait already.", {"retry-after": "2"})
    ),
    "fault.png": FixedResult(GLIOMA, error=RuntimeError("a fault")),
}
"""File names of phantom scans, and the network's result for each."""

CONTRAST = """
const parse = (text) => text.match(/[\\d.]+/g).map(Number);
const light = ([r, g, b]) => [r, g, b].map((v) => v / 255)
  .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
  .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
const ground = (node) => {
  for (let at = node; at; at = at.parentElement) {
    const colour = parse(getComputedStyle(at).backgroundColor);
    if (colour.length === 3 || colour[3] === 1) return colour;
  }
  return [255, 255, 255];
};
const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
const found = [];
while (walker.nextNode()) {
  const holder = walker.currentNode.parentElement;
  if (!walker.currentNode.data.trim() || !holder.checkVisibility() || holder.closest(":disabled")) {
    continue;
  }
  const [a, b] = [parse(getComputedStyle(holder).color), ground(holder)].map(light);
  found.push([(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), walker.currentNode.data.trim()]);
}
return found;
"""


@dataclass
class Page:
    """The page in a browser, and the folder that downloads go to."""

    driver: webdriver.Chrome
    downloads: Path

    def open(self, state: FixedService) -> None:
        self.driver.get(state.url)

    def by_id(self, name: str) -> WebElement:
        return self.driver.find_element(By.ID, name)

    def all(self, selector: str) -> list[WebElement]:
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def run(self, script: str, *arguments: object) -> Any:  # noqa: ANN401
        return self.driver.execute_script(script, *arguments)

    def call(self, module: str, expression: str, *arguments: object) -> Any:  # noqa: ANN401
        """Evaluate an expression with a module of the page as ``m``."""
        return self.driver.execute_async_script(
            f"const done = arguments[arguments.length - 1];"
            f"import('/static/{module}').then((m) => done({expression}));",
            *arguments,
        )

    def choose(self, *paths: Path) -> None:
        self.by_id("files").send_keys("\n".join(map(str, paths)))

    def choose_and_wait(self, *paths: Path) -> list[WebElement]:
        self.choose(*paths)
        until(lambda: self.count_done() == len(paths))
        return self.all(".scan")

    def count_done(self) -> int:
        return len(self.all(".scan[data-phase=answered], .scan[data-phase=failed]"))

    def press(self, *keys: str) -> None:
        ActionChains(self.driver).send_keys(*keys).perform()

    def focused(self) -> str:
        return cast(
            str, self.run("const at = document.activeElement; return at.id || at.className;")
        )

    def emulate(self, **features: str) -> None:
        values = [{"name": name.replace("_", "-"), "value": v} for name, v in features.items()]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": values})

    def read_csv(self) -> tuple[str, list[dict[str, str]]]:
        path = self.downloads / "brainray-answers.csv"
        until(path.exists)
        text = path.read_bytes().decode()
        path.unlink()
        return text, list(csv.DictReader(io.StringIO(text.removeprefix("\ufeff"), newline="")))


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, "the condition did not hold in time"
        time.sleep(0.03)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    binary = next(filter(None, map(shutil.which, BROWSERS)), None)
    driver_path = shutil.which("chromedriver")
    if binary is None or driver_path is None:
        stop = pytest.fail if os.environ.get("BRAINRAY_REQUIRE_BROWSER") else pytest.skip
        stop("no Chromium, or no chromedriver, on the PATH")
    downloads = tmp_path_factory.mktemp("downloads")
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    options.add_argument("--headless=new")
    options.add_argument("--window-size=1280,900")
    options.add_argument("--disable-dev-shm-usage")
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        options.add_argument("--no-sandbox")
    options.add_experimental_option("prefs", {"download.default_directory": str(downloads)})
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(driver_path))
    yield Page(driver, downloads)
    driver.quit()


@pytest.fixture
def page(browser: Page) -> Iterator[Page]:
    yield browser
    browser.emulate()
    messages = [entry["message"] for entry in browser.driver.get_log("browser")]  # type: ignore[no-untyped-call]
    assert not [one for one in messages if "Failed to load resource" not in one]


@pytest.fixture(scope="module")
def scans(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Draw a folder of scans, with two files that are not images."""
    folder = tmp_path_factory.mktemp("scans")
    rng = np.random.default_rng(1)
    for name in SCANS:
        Image.fromarray(draw_phantom("glioma", rng)).save(folder / name)
    whole = (folder / "glioma.png").read_bytes()
    (folder / "cut.png").write_bytes(whole[: len(whole) // 3])
    (folder / "words.png").write_text("not an image")
    return folder


@pytest.fixture
def service(scans: Path) -> Iterator[FixedService]:
    service = FixedService()
    for name, result in SCANS.items():
        service.model.set_results(scans / name, result)
    with serve_fixed(service):
        yield service


def test_a_scan_gets_its_class_and_bars(page: Page, service: FixedService, scans: Path) -> None:
    page.open(service)
    (scan,) = page.choose_and_wait(scans / "meningioma.png")
    assert scan.find_element(By.CSS_SELECTOR, ".verdict").text.split() == [
        "meningioma",
        "93.7",
        "%",
    ]
    bars = scan.find_elements(By.CSS_SELECTOR, ".probs li")
    assert [bar.find_element(By.CSS_SELECTOR, ".label").text for bar in bars] == list(CLASSES)
    assert [bar.find_element(By.CSS_SELECTOR, ".number").text for bar in bars] == [
        "4.3 %",
        "93.7 %",
        "2.0 %",
        "< 0.1 %",
    ]
    widths = page.run(
        "return [...document.querySelectorAll('.track')].map((track) =>"
        " track.firstChild.getBoundingClientRect().width / track.getBoundingClientRect().width)"
    )
    assert widths == pytest.approx([0.043, 0.9366, 0.02, 0.0004], abs=0.01)
    until(lambda: page.by_id("live").text == "meningioma.png: meningioma, 93.7 %. All done.")
    assert page.by_id("live").get_attribute("aria-live") == "polite"
    assert page.by_id("counts").text == "1 scan · 1 classified"


def test_the_slider_changes_the_opacity_of_the_heat_map(
    page: Page, service: FixedService, scans: Path
) -> None:
    page.open(service)
    (scan,) = page.choose_and_wait(scans / "glioma.png")
    pixels, layer = scan.find_elements(By.CSS_SELECTOR, ".picture img")
    assert pixels.rect == layer.rect
    assert page.run("return arguments[0].naturalWidth", layer) > 0
    assert layer.value_of_css_property("opacity") == "0.8"
    page.by_id("opacity").send_keys(Keys.HOME)
    assert layer.value_of_css_property("opacity") == "0"
    page.by_id("opacity").send_keys(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
    assert layer.value_of_css_property("opacity") == "0.1"
    assert page.by_id("opacity-value").text == "10 %"
    assert pixels.value_of_css_property("opacity") == "1"


def test_a_scan_without_a_class_has_the_services_reason(
    page: Page, service: FixedService, scans: Path
) -> None:
    page.open(service)
    names = ("abstain.png", "foreign.png", "cut.png", "words.png")
    abstained, foreign, cut, words = page.choose_and_wait(*(scans / name for name in names))
    assert "Abstained" in abstained.text
    assert "38.0 %" in abstained.text
    assert "low_confidence · heat map of glioma" in abstained.text
    assert REASONS[LOW_CONFIDENCE] in abstained.text
    assert "Rejected" in foreign.text
    assert REASONS[UNLIKE_TRAINING] in foreign.text
    assert "%" not in foreign.text
    for scan, name in ((cut, "cut.png"), (words, "words.png")):
        with pytest.raises(RejectedImage) as rejection:
            decode_image((scans / name).read_bytes())
        assert rejection.value.message in scan.text
        assert rejection.value.reason in scan.text
    assert page.by_id("counts").text == "4 scans · 1 abstained · 3 rejected"
    until(lambda: "4 more scans answered. All done." in page.by_id("live").text)


def test_a_share_is_shown_as_0_or_100_percent_only_if_it_is_exact(
    page: Page, service: FixedService
) -> None:
    page.open(service)
    shares = page.call(
        "words.js", "arguments[0].map(m.formatShare)", [0, 1e-9, 0.5, 0.99951, 0.9999999, 1]
    )
    assert shares == ["0.0 %", "< 0.1 %", "50.0 %", "> 99.9 %", "> 99.9 %", "100.0 %"]


def test_answers_can_be_downloaded_as_csv(
    page: Page, service: FixedService, scans: Path, tmp_path: Path
) -> None:
    page.open(service)
    for name in ("=1+1.png", 'a, "b" größe.png'):
        shutil.copy(scans / "glioma.png", tmp_path / name)
    page.choose_and_wait(
        tmp_path / "=1+1.png", tmp_path / 'a, "b" größe.png', scans / "cut.png", scans / "fault.png"
    )
    page.by_id("download").click()
    text, rows = page.read_csv()
    assert text.startswith("\ufeff")
    columns = ["name", "content_sha256", "status", "reason", "predicted_class", "confidence"]
    columns += [f"prob_{name}" for name in CLASSES]
    assert list(rows[0]) == [*columns, "width_px", "height_px", "classifier_id"]
    assert [row["name"] for row in rows] == [
        "'=1+1.png",
        'a, "b" größe.png',
        "cut.png",
        "fault.png",
    ]
    assert [row["status"] for row in rows] == [
        "classified",
        "classified",
        "rejected",
        "unanswered",
    ]
    assert rows[0]["predicted_class"] == "glioma"
    assert rows[0]["confidence"] == rows[0]["prob_glioma"] == "0.9366"
    assert rows[0]["classifier_id"] == CLASSIFIER_ID
    assert len(rows[0]["content_sha256"]) == 64
    assert rows[2]["reason"] == "truncated"
    assert rows[2]["prob_glioma"] == ""
    assert rows[3]["reason"] == "internal"


@pytest.mark.parametrize("start", ["=", "+", "-", "@", "\t", "\r", "＝", " =", "\u200b="])
def test_no_cell_becomes_a_formula(page: Page, service: FixedService, start: str) -> None:
    if page.driver.current_url == "data:,":
        page.open(service)
    cell = f"{start}HYPERLINK(1)"
    text = page.call("csv.js", "m.renderCsv([{ name: arguments[0] }], ['-x'])", cell)
    (row,) = csv.DictReader(io.StringIO(text.removeprefix("\ufeff"), newline=""))
    assert row["name"] == f"'{cell}"


def test_the_page_can_be_used_with_the_keyboard_alone(
    page: Page, service: FixedService, scans: Path
) -> None:
    page.open(service)
    until(lambda: page.all("#model .accuracy"))
    page.press(Keys.TAB)
    assert page.focused() == "skip"
    page.press(Keys.TAB)
    assert page.focused() == "files"
    assert page.all(".button")[0].value_of_css_property("outline-style") == "solid"
    page.choose_and_wait(scans / "glioma.png", scans / "meningioma.png")
    assert page.focused() == "files"
    page.press(Keys.TAB)
    assert page.focused() == "folder"
    page.press(Keys.TAB)
    assert page.focused() == "opacity"
    page.press(Keys.ARROW_LEFT)
    assert page.all(".map")[0].value_of_css_property("opacity") == "0.75"
    page.press(Keys.TAB)
    assert page.focused() == "download"
    page.press(Keys.ENTER)
    assert len(page.read_csv()[1]) == 2
    page.press(Keys.TAB, Keys.TAB)
    assert page.focused() == "picture"
    page.press(Keys.ENTER)
    until(lambda: page.run("return document.fullscreenElement?.className") == "picture")
    page.press(Keys.ENTER)
    until(lambda: page.run("return document.fullscreenElement") is None)
    assert page.focused() == "picture"
    ActionChains(page.driver).key_down(Keys.SHIFT).send_keys(Keys.TAB).key_up(Keys.SHIFT).perform()
    assert page.focused() == "clear"
    page.press(Keys.ENTER)
    assert page.focused() == "files"
    assert not page.all(".scan")
    assert page.by_id("live").text == "Cleared."


def test_every_control_has_a_name(page: Page, service: FixedService, scans: Path) -> None:
    page.open(service)
    page.choose_and_wait(scans / "glioma.png", scans / "fault.png")
    controls = [one for one in page.all("a, button, input, summary") if one.is_displayed()]
    names = [one.accessible_name for one in controls]
    assert all(names), [one.get_attribute("outerHTML") for one in controls]
    assert "Enlarge glioma.png" in names
    assert "Heat map" in names


def test_the_page_requests_only_its_own_origin(
    page: Page, service: FixedService, scans: Path
) -> None:
    page.open(service)
    page.choose_and_wait(scans / "glioma.png", scans / "pituitary.tif")
    names = page.run("return performance.getEntriesByType('resource').map((one) => one.name)")
    assert any("/v1/explain" in name for name in names)
    assert all(name.startswith((service.url, f"blob:{service.url}")) for name in names), names
    assert page.run("return document.cookie + localStorage.length") == "0"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_enough_contrast_in_light_and_dark(
    page: Page, service: FixedService, scans: Path, scheme: str
) -> None:
    page.emulate(prefers_color_scheme=scheme, prefers_reduced_motion="reduce")
    page.open(service)
    until(lambda: page.all("#model .accuracy"))
    names = ("glioma.png", "abstain.png", "cut.png", "fault.png", "pituitary.tif")
    page.choose_and_wait(*(scans / name for name in names))
    colour = page.run("return getComputedStyle(document.body).backgroundColor")
    channels = [int(part) for part in colour[4:-1].split(",")]
    assert max(channels) < 40 if scheme == "dark" else min(channels) > 230
    found = page.run(CONTRAST)
    assert len(found) > 40
    assert not [pair for pair in found if pair[0] < 4.5]


@pytest.mark.parametrize("width", [320, 390, 768, 1920])
def test_the_page_fits_every_width(
    page: Page, service: FixedService, scans: Path, width: int
) -> None:
    metrics = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": False}
    page.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    try:
        page.open(service)
        page.choose_and_wait(scans / "glioma.png", scans / "cut.png", scans / "fault.png")
        assert page.run("return document.documentElement.scrollWidth") <= width
    finally:
        page.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_a_request_to_a_busy_service_is_retried_after_its_delay(
    page: Page, service: FixedService, scans: Path
) -> None:
    page.open(service)
    page.choose(scans / "busy.png")
    until(lambda: "busy; trying again in 2 s" in page.all(".scan")[0].text)
    until(lambda: page.count_done() == 1)
    assert "glioma" in page.all(".scan")[0].text
    first, second = service.requested_at
    assert second - first >= 2.0


def test_a_failure_is_shown_and_can_be_retried(
    page: Page, service: FixedService, scans: Path
) -> None:
    page.open(service)
    (scan,) = page.choose_and_wait(scans / "fault.png")
    assert f"The service failed. {INTERNAL_ERROR}" in scan.text
    scan.find_element(By.CSS_SELECTOR, ".again").click()
    assert page.focused() == "name"
    until(lambda: scan.get_attribute("data-phase") == "answered")
    assert "failed" not in scan.text
    assert page.by_id("counts").text == "1 scan · 1 classified"


def test_an_unreachable_service_is_shown(page: Page, scans: Path) -> None:
    with serve_fixed(FixedService()) as service:
        page.open(service)
        until(lambda: page.all("#model .accuracy"))
    (scan,) = page.choose_and_wait(scans / "glioma.png")
    assert "The service cannot be reached." in scan.text


def test_the_page_prompts_for_the_token_and_keeps_it_in_the_tab(
    page: Page, service: FixedService, scans: Path
) -> None:
    service.require(TOKEN)
    page.open(service)
    until(page.by_id("token-dialog").is_displayed)
    assert page.focused() == "token"
    page.press(Keys.ESCAPE)
    page.choose(scans / "glioma.png")
    assert "Waiting" in page.all(".scan")[0].text
    page.by_id("token-button").click()
    page.press("wrong-token", Keys.ENTER)
    until(lambda: "did not accept the token" in page.by_id("token-error").text)
    page.press(TOKEN, Keys.ENTER)
    until(lambda: page.count_done() == 1)
    assert "glioma" in page.all(".scan")[0].text
    until(lambda: page.all("#model .accuracy"))
    assert page.run("return Object.values(sessionStorage)") == [TOKEN]
    assert page.run("return document.cookie + localStorage.length") == "0"
    page.by_id("token-button").click()
    assert page.run("return sessionStorage.length") == 0


def test_a_late_401_for_the_old_token_does_not_prompt_again(
    page: Page, service: FixedService, scans: Path
) -> None:
    page.open(service)
    until(lambda: page.all("#model .accuracy"))
    service.require(TOKEN)
    service.delay_first_s = 1.0
    page.choose(scans / "meningioma.png", scans / "glioma.png")
    until(page.by_id("token-dialog").is_displayed)
    page.press(TOKEN, Keys.ENTER)
    until(lambda: page.count_done() == 2)
    assert not page.by_id("token-dialog").is_displayed()
    assert page.run("return Object.values(sessionStorage)") == [TOKEN]


def test_at_most_three_requests_run_at_a_time(
    page: Page, service: FixedService, scans: Path, tmp_path: Path
) -> None:
    service.model.delay_s = 0.1
    page.open(service)
    paths = [tmp_path / f"glioma-{number}.png" for number in range(8)]
    for path in paths:
        shutil.copy(scans / "glioma.png", path)
    page.choose_and_wait(*paths)
    assert 1 < service.max_concurrent <= 3
    assert service.model.num_calls == len(service.renders) == len(paths)


def test_a_format_that_browsers_cannot_show_is_rendered_by_the_service(
    page: Page, service: FixedService, scans: Path
) -> None:
    page.open(service)
    (scan,) = page.choose_and_wait(scans / "pituitary.tif")
    assert service.renders == ["overlay"]
    assert "drawn by the service" in scan.text
    picture = scan.find_element(By.CSS_SELECTOR, ".pixels")
    assert page.run("return arguments[0].naturalWidth", picture) > 0


TURNED = {0x0112: 6}
"""EXIF: a quarter turn, which the browser and the service both apply."""
DENSE = {0x011A: 144, 0x011B: 144, 0x0128: 2, 0x8769: {0xA002: 60, 0xA003: 40}}
"""EXIF: 144 dots per inch. The browser shows the image at half its size, the service does not."""


@pytest.mark.parametrize(
    ("tags", "renders", "size"),
    [(TURNED, ["map"], (80, 120)), (DENSE, ["map", "overlay"], (120, 80))],
    ids=["turned", "dense"],
)
def test_a_heat_map_is_shown_only_over_a_scan_of_the_same_geometry(
    page: Page,
    service: FixedService,
    scans: Path,
    tmp_path: Path,
    tags: dict[int, Any],
    renders: list[str],
    size: tuple[int, int],
) -> None:
    exif = Image.Exif()
    exif.update(tags)
    scan_path = tmp_path / "scan.jpg"
    Image.open(scans / "glioma.png").convert("L").crop((0, 0, 120, 80)).save(scan_path, exif=exif)
    service.model.set_results(scan_path, FixedResult(GLIOMA))
    page.open(service)
    (scan,) = page.choose_and_wait(scan_path)
    assert service.renders == renders
    pixels, layer = scan.find_elements(By.CSS_SELECTOR, ".picture img")
    drawn = page.run("return [arguments[0].naturalWidth, arguments[0].naturalHeight]", pixels)
    assert tuple(drawn) == size
    assert layer.is_displayed() == (renders == ["map"])


def test_a_file_larger_than_the_limit_is_not_sent(
    page: Page, service: FixedService, tmp_path: Path
) -> None:
    page.open(service)
    until(lambda: page.all("#model .accuracy"))
    (tmp_path / "big.bmp").write_bytes(bytes(service.limits.body_bytes + 1))
    (scan,) = page.choose_and_wait(tmp_path / "big.bmp")
    assert "larger than this service accepts" in scan.text
    assert not service.renders


@pytest.mark.parametrize("way", ["drop", "paste"])
def test_scans_can_be_dropped_and_pasted(page: Page, service: FixedService, way: str) -> None:
    page.open(service)
    page.run(
        """
        const transfer = new DataTransfer();
        transfer.items.add(new File(["hello"], "note.txt"));
        document.body.dispatchEvent(arguments[0] === "drop"
          ? new DragEvent("drop", { dataTransfer: transfer, bubbles: true, cancelable: true })
          : new ClipboardEvent("paste", { clipboardData: transfer, bubbles: true }));
        """,
        way,
    )
    until(lambda: page.count_done() == 1)
    assert "note.txt" in page.all(".scan")[0].text


# ---- series --------------------------------------------------------------------------------------

NUM_SLICES = 24
HEALTHY = (0.02, 0.01, 0.96, 0.01)
GLIOMA_SLICES = (7, 12)
"""First and last slice with a glioma."""


def draw_slice(rng: np.random.Generator) -> NDArray[np.uint8]:
    """Draw a phantom and resize it to 192 x 192 pixels, because phantoms vary in size."""
    drawn = draw_phantom("glioma", rng, plane="axial")
    return np.asarray(Image.fromarray(drawn).resize((192, 192)))


@pytest.fixture(scope="module")
def series(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Write a structured report and a series, whose file names are not in the order of slices."""
    folder = tmp_path_factory.mktemp("series")
    rng = np.random.default_rng(2)
    for number in range(NUM_SLICES):
        pixels = draw_slice(rng).astype(np.uint16) * 16
        content = make_mr(
            pixels,
            SOPInstanceUID=f"1.2.3.{number}",
            ImagePositionPatient=[0, 0, 4.0 * number],
            WindowCenter=2000,
            WindowWidth=3600,
            PatientName="Doe^Jane",
        )
        (folder / f"{(number * 7) % NUM_SLICES:02}.dcm").write_bytes(content)
    shutil.copy(str(get_testdata_file("test-SR.dcm")), folder / "report.dcm")
    return sorted(folder.iterdir())


@pytest.fixture
def series_service(series: list[Path]) -> Iterator[FixedService]:
    """Predict glioma for six neighbouring slices; the series exceeds the limit of one request."""
    service = FixedService()
    for path in series[:-1]:
        number = int(pydicom.dcmread(path).SOPInstanceUID.rpartition(".")[2])
        is_glioma = GLIOMA_SLICES[0] <= number <= GLIOMA_SLICES[1]
        service.model.set_results(
            path, FixedResult((0.9 + number / 200, 0.02, 0.02, 0.01) if is_glioma else HEALTHY)
        )
    with serve_fixed(service):
        yield service


def find_part(page: Page, part: str) -> WebElement:
    return page.driver.find_element(By.CSS_SELECTOR, f".series [data-part={part}]")


def choose_series(page: Page, service: FixedService, paths: list[Path]) -> None:
    page.open(service)
    until(lambda: page.all("#model .accuracy"))
    page.choose(*paths)
    until(lambda: page.all(".series[data-answer]"))
    until(lambda: find_part(page, "pixels").is_displayed())


def test_dicom_slices_are_shown_as_a_series(
    page: Page, series_service: FixedService, series: list[Path]
) -> None:
    assert sum(path.stat().st_size for path in series) > series_service.limits.body_bytes
    choose_series(page, series_service, series)
    assert len(page.all(".series")) == 1
    assert find_part(page, "answer").text == "glioma"
    header = page.driver.find_element(By.CSS_SELECTOR, ".series header").text
    assert "Slice evidence, not calibrated for patients" in header
    assert "24 slices · 24 files · axial" in header
    keys = page.all(".series .key-slices button")
    assert [one.text.split()[0] for one in keys] == ["13", "11", "9"], (
        "no two of them are neighbours"
    )
    assert find_part(page, "number").text == "Slice 13 of 24", "the strongest is shown first"
    assert page.by_id("counts").text == "25 scans · 24 classified · 1 rejected"
    (report,) = page.all(".scan")
    assert "report.dcm" in report.text
    assert "not_an_image_object" in report.text
    assert "Doe" not in page.driver.page_source


def test_a_series_is_scrolled_with_wheel_keys_and_buttons(
    page: Page, series_service: FixedService, series: list[Path]
) -> None:
    choose_series(page, series_service, series)
    number, about = find_part(page, "number"), find_part(page, "about")
    find_part(page, "slider").send_keys(Keys.HOME)
    assert number.text == "Slice 1 of 24"
    assert "0.0 mm" in about.text
    assert "notumor" in page.all(".series .verdict")[0].text
    first = find_part(page, "pixels").get_attribute("src")
    page.press(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
    assert number.text == "Slice 3 of 24"
    assert "8.0 mm" in about.text
    assert find_part(page, "pixels").get_attribute("src") != first
    page.run(
        "arguments[0].dispatchEvent(new WheelEvent('wheel', { deltaY: 120, cancelable: true }))",
        find_part(page, "stage"),
    )
    assert number.text == "Slice 6 of 24"
    page.all(".series .key-slices button")[1].click()
    assert number.text == "Slice 11 of 24"
    assert "95.0 %" in page.all(".series .verdict")[0].text
    find_part(page, "next").click()
    assert number.text == "Slice 12 of 24"
    page.all(".series .key-slices button")[2].click()
    assert number.text == "Slice 9 of 24"
    assert "glioma, 94.0 %" in (find_part(page, "slider").get_attribute("aria-valuetext") or "")


def test_the_heat_map_of_a_slice_is_requested_only_when_it_is_switched_on(
    page: Page, series_service: FixedService, series: list[Path]
) -> None:
    choose_series(page, series_service, series)
    assert not series_service.renders
    find_part(page, "heat").click()
    until(lambda: find_part(page, "map").is_displayed())
    layers = [find_part(page, part) for part in ("pixels", "map")]
    assert layers[0].rect == layers[1].rect
    sizes = [page.run("return arguments[0].naturalWidth", layer) for layer in layers]
    assert sizes[0] == sizes[1] > 0
    assert series_service.renders == ["map"]


def test_a_volume_is_shown_as_a_series(page: Page, tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    voxels = np.stack([draw_slice(rng).T for _ in range(8)], axis=2)
    path = tmp_path / "brain.nii"
    path.write_bytes(nib.Nifti1Image(voxels.astype(np.int16), np.eye(4)).to_bytes())
    service = FixedService()
    service.model.set_results(path, *[FixedResult(HEALTHY)] * 8)
    with serve_fixed(service):
        choose_series(page, service, [path])
        assert find_part(page, "answer").text == "notumor"
        assert "8 slices · brain.nii" in find_part(page, "facts").text
        assert page.by_id("counts").text == "1 scan · 8 slices · 8 classified"
        page.by_id("download").click()
        rows = page.read_csv()[1]
    assert [row["frame"] for row in rows] == [str(frame) for frame in range(8)]
    assert len({row["series"] for row in rows}) == 1


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_of_a_series_has_enough_contrast_in_light_and_dark(
    page: Page, series_service: FixedService, series: list[Path], scheme: str
) -> None:
    page.emulate(prefers_color_scheme=scheme, prefers_reduced_motion="reduce")
    choose_series(page, series_service, series)
    find_part(page, "heat").click()
    until(lambda: find_part(page, "map").is_displayed())
    assert not [pair for pair in page.run(CONTRAST) if pair[0] < 4.5]
    if folder := os.environ.get("BRAINRAY_SCREENSHOTS"):
        page.run("arguments[0].scrollIntoView()", page.all(".series")[0])
        page.driver.save_screenshot(f"{folder}/page-series-{scheme}.png")


@pytest.mark.parametrize("width", [320, 768])
def test_a_series_fits_every_width(
    page: Page, series_service: FixedService, series: list[Path], width: int
) -> None:
    metrics = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": False}
    page.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    try:
        choose_series(page, series_service, series)
        assert page.run("return document.documentElement.scrollWidth") <= width
    finally:
        page.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


# ---- the classifier ------------------------------------------------------------------------------


def test_the_classifiers_accuracy_is_shown(page: Page, service: FixedService) -> None:
    page.open(service)
    until(lambda: page.all("#model .accuracy"))
    text = page.by_id("model").text
    assert "96.3 %" in text  # of the test images, not of the validation images
    assert "95.2 – 97.4 %" in text
    assert "1,311 test images" in text
    assert "94.0 % on those without a near duplicate" in text
    assert CLASSIFIER_ID in text
    assert all(name in text for name in CLASSES)
    assert "not a medical device" in page.all(".notice")[0].text


def test_the_model_card_opens_as_text_with_the_keyboard(page: Page, service: FixedService) -> None:
    page.open(service)
    until(lambda: page.all(".model-card"))
    page.run("document.querySelector('.model-card summary').focus()")
    page.press(Keys.ENTER)
    (text,) = page.all(".model-card pre")
    assert text.is_displayed()
    assert json.loads(text.text) == service.model.metadata["model_card"]
    assert not text.find_elements(By.TAG_NAME, "b"), "markup is shown as text"
    assert min(ratio for ratio, _ in page.run(CONTRAST)) >= 4.5
    page.press(Keys.TAB)
    assert page.run("return document.activeElement.tagName") == "PRE"


def test_a_classifier_without_a_model_card_shows_none(page: Page, service: FixedService) -> None:
    del service.model.metadata["model_card"]
    page.open(service)
    until(lambda: page.all("#model .accuracy"))
    assert not page.all(".model-card")


def test_an_unknown_accuracy_is_shown_as_unknown(page: Page, service: FixedService) -> None:
    del service.model.metadata["metrics"]
    page.open(service)
    until(lambda: "is not known" in page.by_id("model").text)
    assert "%" not in page.by_id("model").text


def test_the_page_has_no_inline_code_and_no_external_url() -> None:
    text = "".join(path.read_text() for path in sorted(WEB.iterdir()))
    assert "innerHTML" not in text
    assert " style=" not in text
    urls = set(re.findall(r"(?:https?:)?//[\w.-]+\.\w+[^\"\s]*", text))
    assert urls == {"http://www.w3.org/2000/svg"}  # an XML namespace
