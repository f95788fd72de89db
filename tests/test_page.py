"""The page, in a real browser, against a stand-in that keeps the service's contract."""

import base64
import csv
import io
import itertools
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from selenium import webdriver
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import WebDriverWait

from brainray.pipelines.answers import build_schema
from brainray.pixels.decode import REJECTION_REASONS
from tests.standin import CLASSES, WEB, StandIn, stand_in

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
needs_browser = pytest.mark.skipif(
    not (BROWSER and DRIVER), reason="chromium and chromedriver are not installed"
)
PATIENCE_S = 30.0

# --- without a browser ----------------------------------------------------------------------------


def test_the_page_has_words_for_every_reason() -> None:
    script = (WEB / "app.js").read_text()
    table = script[script.index("export const REASONS") : script.index("const PROBLEMS")]
    assert re.findall(r"^  (\w+): \[", table, re.MULTILINE) == list(REJECTION_REASONS)


def test_the_page_is_fit_for_a_strict_policy() -> None:
    """Nothing inline, and nothing from elsewhere; relative, so that a path prefix does not hurt."""
    page = (WEB / "index.html").read_text()
    assert re.findall(r"<script(?![^>]*\bsrc=)|\sstyle=|\son[a-z]+=|<style", page) == []
    for place in re.findall(r"(?:src|href)=\"([^\"]*)\"", page):
        assert not place.startswith(("/", "http", "//")), place
    for file in ("app.js", "style.css"):
        text = (WEB / file).read_text()
        assert not re.search(r"https?://(?!www\.w3\.org)|@import|url\(|\beval\(|innerHTML", text)
    assert "Research use only" in page
    assert "Not a medical device" in page


# --- in a browser ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def downloads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("downloads")


@pytest.fixture(scope="module")
def chromium(downloads: Path) -> Iterator[webdriver.Chrome]:
    options = webdriver.ChromeOptions()
    assert BROWSER
    options.binary_location = BROWSER
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.add_argument("--window-size=1280,900")
    options.add_experimental_option("prefs", {"download.default_directory": str(downloads)})
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


class Page:
    """The page as a person has it in front of them."""

    def __init__(self, driver: webdriver.Chrome, server: StandIn) -> None:
        self.driver, self.server = driver, server
        driver.get(server.url)
        driver.execute_script("sessionStorage.clear()")
        driver.get(server.url)

    def find(self, selector: str, within: WebElement | None = None) -> WebElement:
        return (within or self.driver).find_element(By.CSS_SELECTOR, selector)

    def cards(self) -> list[WebElement]:
        return self.driver.find_elements(By.CSS_SELECTOR, ".card")

    def wait(self, condition: Callable[[], object], what: str) -> None:
        WebDriverWait(self.driver, PATIENCE_S, 0.05).until(lambda _: condition(), what)

    def choose(self, *files: Path, patient: bool = True) -> list[WebElement]:
        before = len(self.cards())
        self.find("#picker").send_keys("\n".join(map(str, files)))
        self.wait(lambda: len(self.cards()) == before + len(files), "no cards")
        if patient:
            self.wait(lambda: not self.find("#overall").is_displayed(), "not done")
        return self.cards()[before:]

    def run(self, script: str, *given: object) -> Any:  # noqa: ANN401 - whatever the script gives
        return self.driver.execute_script(script, *given)

    def table(self, downloads: Path) -> list[dict[str, str]]:
        for old in downloads.iterdir():
            old.unlink()
        self.find("#download").click()
        self.wait(lambda: list(downloads.glob("*.csv")), "no download")
        (file,) = downloads.glob("*.csv")
        text = file.read_bytes().decode("utf-8-sig")
        return list(csv.DictReader(io.StringIO(text, newline="")))


@pytest.fixture
def page(chromium: webdriver.Chrome) -> Iterator[Page]:
    with stand_in() as server:
        yield Page(chromium, server)


@pytest.fixture(scope="module")
def scans(tmp_path_factory: pytest.TempPathFactory, phantom_folder: Path) -> Path:
    """Lay out scans that get every kind of answer."""
    folder = tmp_path_factory.mktemp("scans")
    phantoms = sorted(phantom_folder.glob("Testing/*/*"))
    for name, source in (("glioma-1.jpg", phantoms[0]), ("meningioma-2.jpg", phantoms[9])):
        (folder / name).write_bytes(source.read_bytes())
    (folder / "abstain-3.jpg").write_bytes(phantoms[20].read_bytes())
    (folder / "short.jpg").write_bytes(phantoms[0].read_bytes()[:400])
    (folder / "notes.txt").write_text("no scan")
    Image.open(phantoms[3]).convert("L").resize((120, 90)).save(folder / "pituitary-4.tiff")
    return folder


@needs_browser
def test_a_scan_gets_class_bars_and_evidence(page: Page, scans: Path) -> None:
    (card,) = page.choose(scans / "glioma-1.jpg")
    assert card.get_attribute("data-state") == "classified"
    assert page.find(".class", card).text == "glioma"
    share = page.find(".share", card).text
    rows = card.find_elements(By.CSS_SELECTOR, ".probs li")
    assert [page.find(".prob-name", row).text for row in rows] == list(CLASSES)
    values = [page.find(".prob-value", row).text for row in rows]
    assert values[0] == share
    assert 99 < sum(float(value.strip("<>%\u00a0 ")) for value in values) < 101
    lengths = [
        page.run(
            "return getComputedStyle(arguments[0], '::before').width.replace('px', '') "
            "/ arguments[0].clientWidth",
            page.find(".prob-bar", row),
        )
        for row in rows
    ]
    assert lengths[0] == pytest.approx(float(share.strip("%\u00a0 ")) / 100, abs=0.02)
    assert lengths[0] == max(lengths)
    for image in ("scan", "heat"):
        element = page.find(f".{image}", card)
        assert page.run("return arguments[0].naturalWidth", element) > 100
        assert element.get_attribute("alt")
    boxes = [page.run(f"return arguments[0].querySelector('.{i}').getBoundingClientRect().toJSON()",
                      card) for i in ("scan", "heat")]  # fmt: skip
    assert boxes[0] == boxes[1], "the map does not lie on the scan"
    assert page.find("#summary").text == "1 scan: classified"
    assert "glioma" in page.find("#announcer").get_attribute("textContent")
    (_, path, name), *_ = page.server.asked
    assert (path, name) == ("/v1/explain?render=map", "glioma-1.jpg")


@needs_browser
def test_the_slider_changes_the_map_and_nothing_else(page: Page, scans: Path) -> None:
    first, second = page.choose(scans / "glioma-1.jpg", scans / "meningioma-2.jpg")

    def opacity(card: WebElement) -> float:
        return float(page.find(".heat", card).value_of_css_property("opacity"))

    slider = page.find(".evidence input", first)
    assert opacity(first) == opacity(second) == pytest.approx(0.6)
    slider.send_keys(Keys.ARROW_LEFT, Keys.ARROW_LEFT)
    assert opacity(first) == pytest.approx(0.5)
    assert page.find(".evidence output", first).text.split() == ["50", "%"]
    assert slider.get_attribute("aria-valuetext") == "50 percent opaque"
    slider.send_keys(Keys.HOME)
    assert opacity(first) == 0
    assert opacity(second) == pytest.approx(0.6)
    page.find("#opacity-all").send_keys(Keys.END)
    assert opacity(first) == opacity(second) == 1


@needs_browser
def test_what_has_no_class_says_why_in_words(page: Page, scans: Path) -> None:
    names = ("short.jpg", "notes.txt", "abstain-3.jpg")
    short, notes, abstained = page.choose(*(scans / name for name in names))
    assert [card.get_attribute("data-state") for card in (short, notes, abstained)] == [
        *("rejected", "rejected", "abstained"),
    ]
    assert page.find(".headline", short).text == "The file is cut short"
    assert "Fetch it again" in page.find(".words", short).text
    assert "end marker" in page.find(".detail", short).text
    assert page.find(".headline", notes).text == "This is not an image"
    assert page.find(".headline", abstained).text == "No class is named"
    assert "too close" in page.find(".words", abstained).text
    assert page.find(".probs", abstained).is_displayed()
    for card in (short, notes, abstained):
        assert not page.find(".verdict", card).is_displayed()
    assert not page.find(".probs", short).is_displayed()
    assert page.find("#summary").text == "3 scans: 1 abstained, 2 rejected"


@needs_browser
def test_a_format_that_no_browser_draws_is_drawn_by_the_server(page: Page, scans: Path) -> None:
    (card,) = page.choose(scans / "pituitary-4.tiff")
    assert page.find(".class", card).text == "pituitary"
    assert page.server.asked[0][1] == "/v1/explain?render=overlay"
    picture = page.find(".scan", card)
    size = page.run("return [arguments[0].naturalWidth, arguments[0].naturalHeight]", picture)
    assert size == [120, 90]
    assert "cannot draw" in page.find(".drawn", card).text
    assert not page.find(".evidence", card).is_displayed()


@needs_browser
def test_the_table_has_the_bulk_jobs_columns_and_runs_nothing(
    page: Page, scans: Path, downloads: Path, tmp_path: Path
) -> None:
    evil = tmp_path / '=HYPERLINK("http:,x")\u202egpj.jpg'.replace("/", "")
    evil.write_bytes((scans / "glioma-1.jpg").read_bytes())
    page.server.refusals = [(500, "internal", {})]
    page.choose(scans / "meningioma-2.jpg")
    page.choose(evil, scans / "short.jpg")
    failed, classified, rejected = page.table(downloads)
    assert list(classified) == build_schema(CLASSES).names
    assert classified["scan_uri"] == "'" + evil.name
    assert classified["predicted_class"] == "glioma"
    probs = [float(classified[f"prob_{name}"]) for name in CLASSES]
    assert sum(probs) == pytest.approx(1, abs=1e-6)
    assert float(classified["confidence"]) == max(probs)
    assert int(classified["size_bytes"]) == evil.stat().st_size
    assert abs(int(classified["modified_ns"]) - evil.stat().st_mtime_ns) < 2_000_000
    assert len(classified["content_sha256"]) == 64
    assert (rejected["status"], rejected["reason"]) == ("rejected", "truncated")
    assert rejected["predicted_class"] == rejected["prob_glioma"] == ""
    assert (failed["status"], failed["reason"]) == ("", "internal")
    shown = page.find(".name", page.cards()[1]).text
    assert "\u202e" not in shown, "the name could show as another"


@needs_browser
@pytest.mark.parametrize(
    ("cell", "written"),
    [
        ("=1+1", "'=1+1"), ("+1", "'+1"), ("-1", "'-1"), ("@A1", "'@A1"), ("  =1", "'  =1"),
        ("\t1", "'\t1"), ("\uff1d1", "'\uff1d1"), ("a,b", '"a,b"'), ('a"b', '"a""b"'),
        ("a\nb", '"a\nb"'), ("plain-1.jpg", "plain-1.jpg"), (0.5, "0.5"), (-1, "-1"), (None, ""),
    ],
)  # fmt: skip
def test_cells(page: Page, cell: object, written: str) -> None:
    script = "return import('./static/app.js').then(m => m.writeCell(arguments[0]))"
    assert page.run(script, cell) == written


@needs_browser
def test_few_requests_at_once_and_all_files_in_order(page: Page, scans: Path) -> None:
    page.server.delay_s = 0.15
    cards = page.choose(*[scans / "glioma-1.jpg", scans / "meningioma-2.jpg"] * 5)
    assert page.server.most_at_once == 3
    assert [page.find(".class", card).text for card in cards] == ["glioma", "meningioma"] * 5


@needs_browser
@pytest.mark.parametrize(("status", "code"), [(429, "too_busy"), (503, "model_unavailable")])
def test_a_busy_server_is_left_alone_for_as_long_as_it_says(
    page: Page, scans: Path, status: int, code: str
) -> None:
    page.server.refusals = [(status, code, {"retry-after": "2"})]
    (card,) = page.choose(scans / "glioma-1.jpg", patient=False)
    page.wait(lambda: "busy" in page.find(".state", card).text, "does not say that it waits")
    (other,) = page.choose(scans / "meningioma-2.jpg")
    first, *later = (when for when, _, _ in page.server.asked)
    assert len(later) == 2
    assert min(later) - first > 1.9, "somebody was sent before the time"
    for one, label in ((card, "glioma"), (other, "meningioma")):
        assert page.find(".class", one).text == label


@needs_browser
def test_a_failure_is_said_and_can_be_tried_again(page: Page, scans: Path) -> None:
    page.server.refusals = [(500, "internal", {})]
    (card,) = page.choose(scans / "glioma-1.jpg")
    assert card.get_attribute("data-state") == "failed"
    assert page.find(".headline", card).text == "The server failed"
    assert "stand-in was told" in page.find(".words", card).text
    again = page.find(".again", card)
    again.send_keys(Keys.ENTER)
    page.wait(lambda: card.get_attribute("data-state") == "classified", "was not tried again")
    assert not again.is_displayed()
    assert not page.find(".headline", card).is_displayed()
    focused = page.run("return document.activeElement.textContent")
    assert focused == "glioma-1.jpg", "the focus was lost with the button"


@needs_browser
def test_a_server_that_is_gone_is_said(chromium: webdriver.Chrome, scans: Path) -> None:
    with stand_in() as server:
        page = Page(chromium, server)
    (card,) = page.choose(scans / "glioma-1.jpg")
    assert page.find(".headline", card).text == "The server cannot be reached"


@needs_browser
def test_a_file_that_is_too_large_is_not_sent(page: Page, tmp_path: Path) -> None:
    page.wait(lambda: "1 MiB" in page.find("#formats").text, "the limit is not said")
    (tmp_path / "large.png").write_bytes(bytes(2**20))
    (card,) = page.choose(tmp_path / "large.png")
    assert page.find(".headline", card).text == "The image is too large"
    assert page.server.asked == []


@needs_browser
def test_a_token_is_asked_for_and_kept_in_the_tab(chromium: webdriver.Chrome, scans: Path) -> None:
    with stand_in(token="correct-horse-battery") as server:
        page = Page(chromium, server)
        page.wait(lambda: page.find("#token-dialog").is_displayed(), "did not ask")
        for given in ("wrong-horse-battery", server.token):
            assert page.run("return document.activeElement.id") == "token"
            page.find("#token").send_keys(given, Keys.ENTER)
            if given != server.token:
                page.wait(lambda: page.find("#token-wrong").is_displayed(), "took a wrong one")
        page.wait(lambda: not page.find("#token-dialog").is_displayed(), "did not take it")
        (card,) = page.choose(scans / "glioma-1.jpg")
        assert page.find(".class", card).text == "glioma"
        assert page.run("return [localStorage.length, document.cookie]") == [0, ""]
        chromium.refresh()
        (card,) = page.choose(scans / "glioma-1.jpg")
        assert page.find(".class", card).text == "glioma"


@needs_browser
def test_without_a_token_a_scan_says_so(chromium: webdriver.Chrome, scans: Path) -> None:
    with stand_in(token="correct-horse-battery") as server:
        page = Page(chromium, server)
        page.wait(lambda: page.find("#token-dialog").is_displayed(), "did not ask")
        page.find("#token").send_keys(Keys.ESCAPE)
        page.wait(lambda: page.find("#alert").is_displayed(), "does not say what is missing")
        (card,) = page.choose(scans / "glioma-1.jpg", patient=False)
        page.wait(lambda: page.find("#token-dialog").is_displayed(), "did not ask again")
        page.find("#token-cancel").click()
        assert page.find(".headline", card).text == "The server asks for a token"


@needs_browser
def test_all_of_it_by_keyboard(page: Page, scans: Path, downloads: Path) -> None:
    def press(*keys: str) -> None:
        ActionChains(page.driver).send_keys(*keys).perform()

    def focused() -> str:
        return str(page.run("return document.activeElement.id || document.activeElement.tagName"))

    def tab_to(name: str) -> None:
        for _ in range(12):
            press(Keys.TAB)
            if focused() == name:
                outline = page.run(
                    "const e = document.activeElement.id === 'picker' ? document.querySelector("
                    "'#drop') : document.activeElement; return getComputedStyle(e).outlineStyle"
                )
                assert outline == "solid", f"the focus on {name} cannot be seen"
                return
        raise AssertionError(f"the tab key does not lead to {name}")

    tab_to("picker")
    page.choose(scans / "glioma-1.jpg", scans / "meningioma-2.jpg")
    tab_to("opacity-all")
    press(Keys.ARROW_RIGHT)
    assert page.find("#opacity-all").get_property("value") == "65"
    for old in downloads.iterdir():
        old.unlink()
    tab_to("download")
    press(Keys.ENTER)
    page.wait(lambda: list(downloads.glob("*.csv")), "no download")
    tab_to("clear")
    press(Keys.SPACE)
    assert page.cards() == []
    assert focused() == "picker"
    assert not page.find("#answers").is_displayed()


@needs_browser
def test_dropped_and_pasted_files_are_answered(page: Page, scans: Path) -> None:
    content = base64.b64encode((scans / "glioma-1.jpg").read_bytes()).decode()
    script = """
        const bytes = Uint8Array.from(atob(arguments[0]), c => c.charCodeAt(0));
        const data = new DataTransfer();
        data.items.add(new File([bytes], arguments[1], {type: "image/jpeg"}));
        const event = arguments[2] === "drop"
            ? new DragEvent("drop", {dataTransfer: data, bubbles: true, cancelable: true})
            : new ClipboardEvent("paste", {clipboardData: data, bubbles: true, cancelable: true});
        document.body.dispatchEvent(event);
        return event.defaultPrevented;
    """
    assert page.run(script, content, "glioma-dropped.jpg", "drop")
    assert page.run(script, content, "pituitary-pasted.jpg", "paste")
    page.wait(lambda: len(page.cards()) == 2, "no cards")
    page.wait(lambda: not page.find("#overall").is_displayed(), "not done")
    found = [page.find(".class", card).text for card in page.cards()]
    assert found == ["glioma", "pituitary"]


@needs_browser
def test_no_request_leaves_the_origin_and_nothing_breaks_the_policy(
    page: Page, scans: Path
) -> None:
    page.driver.get_log("browser")
    page.driver.get_log("performance")
    page.driver.get(page.server.url)
    page.choose(*sorted(scans.iterdir()))
    requested = re.findall(
        r'"Network\.requestWillBeSent".*?"request":\{.*?"url":"([^"]+)"',
        "\n".join(entry["message"] for entry in page.driver.get_log("performance")),
    )
    assert any("/v1/explain" in url for url in requested)
    ours = (page.server.url, f"blob:{page.server.url}", "data:")
    assert [url for url in requested if not url.startswith(ours)] == []
    assert page.driver.get_log("browser") == []


# --- how it looks ---------------------------------------------------------------------------------

CONTRASTS = """
const channel = c => (c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
const canvas = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
const read = color => {
  canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = color; canvas.fillRect(0, 0, 1, 1);
  return [...canvas.getImageData(0, 0, 1, 1).data];
};
const luminance = ([r, g, b]) => 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b);
const found = [];
for (const element of document.body.querySelectorAll("*")) {
  const texts = [...element.childNodes].filter(n => n.nodeType === 3).map(n => n.data.trim());
  const words = texts.join("");
  if (!words || !element.checkVisibility()) continue;
  if (element.closest(".visually-hidden, [disabled]")) continue;
  let behind = element;
  while (read(getComputedStyle(behind).backgroundColor)[3] < 200 && behind.parentElement)
    behind = behind.parentElement;
  const pair = [getComputedStyle(element).color, getComputedStyle(behind).backgroundColor]
    .map(read).map(luminance).sort((a, b) => b - a);
  found.push([words, (pair[0] + 0.05) / (pair[1] + 0.05)]);
}
return found;
"""


@needs_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_word_can_be_read_by_day_and_by_night(page: Page, scans: Path, scheme: str) -> None:
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    page.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    try:
        page.server.refusals = [(500, "internal", {})]
        page.choose(*sorted(scans.iterdir()))
        page.find("details summary").click()
        paper = page.run("return getComputedStyle(document.body).backgroundColor")
        assert (max(map(int, re.findall(r"\d+", paper))) < 60) is (scheme == "dark")
        contrasts = page.run(CONTRASTS)
        assert len(contrasts) > 60
        assert [(words, ratio) for words, ratio in contrasts if ratio < 4.5] == []
    finally:
        page.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


@needs_browser
@pytest.mark.parametrize("width", [320, 390, 768, 1900])
def test_nothing_is_wider_than_the_window(page: Page, scans: Path, width: int) -> None:
    size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 600}
    page.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try:
        page.choose(*sorted(scans.iterdir()))
        assert page.run("return document.documentElement.scrollWidth") <= width
        wide = page.run(
            "return [...document.querySelectorAll('.card, .toolbar, .button')].filter(e => "
            "e.checkVisibility() && e.getBoundingClientRect().right > innerWidth + 1).length"
        )
        assert wide == 0
    finally:
        page.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


@needs_browser
def test_nothing_moves_for_who_asked_for_it(page: Page, scans: Path) -> None:
    media = {"features": [{"name": "prefers-reduced-motion", "value": "reduce"}]}
    page.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    try:
        page.server.delay_s = 0.5
        page.choose(scans / "glioma-1.jpg", patient=False)
        assert page.run("return document.getAnimations().length") == 0
        page.wait(lambda: not page.find("#overall").is_displayed(), "not done")
    finally:
        page.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


@needs_browser
def test_a_screen_reader_finds_names_and_order(page: Page, scans: Path) -> None:
    page.choose(*sorted(scans.iterdir()))
    tree = page.driver.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    named = [
        (node["role"]["value"], node.get("name", {}).get("value", ""))
        for node in tree
        if not node["ignored"]
    ]
    controls = {"button", "slider", "link", "textbox", "image", "progressbar", "article", "list"}
    unnamed = [role for role, name in named if role in controls - {"list"} and not name]
    assert unnamed == []
    assert ("button", "Choose scans") in named  # a file picker
    assert ("article", "glioma-1.jpg") in named
    assert ("slider", "Evidence for glioma") in named
    assert ("list", "Probability of each class") in named
    ids = page.run("return [...document.querySelectorAll('[id]')].map(e => e.id)")
    assert len(ids) == len(set(ids))
    levels = page.run(
        "return [...document.querySelectorAll('h1, h2, h3')].filter(e => e.checkVisibility())"
        ".map(e => Number(e.tagName[1]))"
    )
    assert levels[0] == 1
    assert all(later - earlier <= 1 for earlier, later in itertools.pairwise(levels))
    roles = page.run("return [...document.querySelectorAll('[role]')].map(e => e.role)")
    assert roles.count("status") == 1
