// One series on the page: its summary, its slices to scroll through, and the answer to each.

import { copyTemplate, element, makeUrl, setText, showAnswer, showBars } from "./dom.js";
import { summariseSeries } from "./service.js";
import { explainSeries, formatCount, spellOut, summariseAnswer } from "./words.js";

const REST_MS = 300; // on a slice, before its heat map is requested
const WHEEL_PX = 40; // of a wheel's movement, for one slice

/** A series, and the section that shows it. */
export class Series {
  numTries = 0;
  isSummarised = false;
  #scans = [];
  #slices = [];
  #index = 0;
  #isChosen = false; // whether a person or a key slice has chosen the slice
  #summary = null;
  #wheel = 0;
  #resting = null;
  #onExplain;
  #parts;

  constructor(number, onExplain) {
    const { item, parts } = copyTemplate("series-template");
    this.item = item;
    this.#parts = parts;
    this.#onExplain = onExplain;
    this.name = `Series ${number}`;
    const { title, slider, ticks } = parts;
    title.id = `series-${number}`;
    title.textContent = this.name;
    item.setAttribute("aria-labelledby", title.id);
    slider.setAttribute("aria-label", `Slice of series ${number}`);
    ticks.id = `series-${number}-ticks`;
    slider.setAttribute("list", ticks.id);
    this.#listen();
  }

  /** The summary in one line. */
  get summary() {
    return `${this.#parts.answer.textContent}, by slice evidence`;
  }

  /** Add the slices of a file that can be shown; the summary counts the others. */
  add(scan, pictures) {
    this.#scans.push(scan);
    this.isSummarised = false;
    const pngs = new Map(pictures.map(({ frame, png }) => [frame, png]));
    for (const answer of scan.answer.slices ?? [scan.answer]) {
      if (answer.width_px === null) continue;
      const png = pngs.get(answer.frame);
      this.#slices.push({ scan, answer, picture: png ? makeUrl(png) : null, map: null });
    }
    const shown = this.#slices[this.#index];
    this.#slices.sort(compareSlices);
    const middle = Math.floor(this.#slices.length / 2);
    this.#index = this.#isChosen ? Math.max(0, this.#slices.indexOf(shown)) : middle;
    this.#parts.slider.max = Math.max(0, this.#slices.length - 1);
    setText(this.#parts.facts, this.#describe());
    this.#showKeySlices();
    this.#showSlice();
  }

  /** Summarise the slices, and show the summary. */
  async run(signal) {
    const summary = await summariseSeries(this.#scans.map(({ answer }) => answer), signal);
    if (!summary) {
      this.#showMissing("The files do not name a series.");
      return;
    }
    this.#summary = summary;
    const { answer, reason, evidence, facts } = this.#parts;
    const isGiven = summary.answer !== "indeterminate";
    this.item.dataset.answer = isGiven ? "given" : "indeterminate";
    answer.textContent = isGiven ? summary.answer : "Indeterminate";
    setText(reason, explainSeries(summary));
    showBars(evidence, summary.evidence, summary.answer);
    setText(facts, this.#describe());
    const [first] = this.#findKeySlices();
    if (first && !this.#isChosen) this.#index = this.#slices.indexOf(first);
    this.#showKeySlices();
    this.#showSlice();
  }

  show() {}

  fail(problem) {
    this.#showMissing(problem.title);
  }

  remove() {
    clearTimeout(this.#resting);
    this.item.remove();
    for (const { picture, map } of this.#slices) {
      for (const url of [picture, map]) if (url) URL.revokeObjectURL(url);
    }
  }

  #showMissing(text) {
    this.item.dataset.answer = "missing";
    this.#parts.answer.textContent = "No answer for the series";
    setText(this.#parts.reason, text);
  }

  // ---- scrolling -------------------------------------------------------------------------------

  #listen() {
    const { slider, stage, previous, next, heat } = this.#parts;
    slider.addEventListener("input", () => this.#go(Number(slider.value)));
    previous.addEventListener("click", () => this.#go(this.#index - 1));
    next.addEventListener("click", () => this.#go(this.#index + 1));
    stage.addEventListener("click", () => slider.focus({ preventScroll: true })); // for its keys
    stage.addEventListener("wheel", (event) => this.#turnWheel(event), { passive: false });
    heat.addEventListener("click", () => {
      heat.setAttribute("aria-pressed", heat.getAttribute("aria-pressed") !== "true");
      this.#showSlice();
    });
  }

  #turnWheel(event) {
    if (event.ctrlKey) return; // zooms the page
    this.#wheel += event.deltaY * (event.deltaMode === WheelEvent.DOM_DELTA_PIXEL ? 1 : WHEEL_PX);
    const steps = Math.trunc(this.#wheel / WHEEL_PX);
    const target = Math.min(this.#slices.length - 1, Math.max(0, this.#index + steps));
    this.#wheel -= steps * WHEEL_PX;
    if (steps && target === this.#index) return; // beyond either end the page scrolls
    event.preventDefault();
    this.#go(target);
  }

  #go(index) {
    if (!this.#slices[index]) return;
    this.#isChosen = true;
    this.#index = index;
    this.#showSlice();
  }

  // ---- what is shown ---------------------------------------------------------------------------

  #describe() {
    const { skipped = {}, flags = [] } = this.#summary ?? {};
    const numFiles = this.#scans.length;
    const planes = new Set(this.#slices.map(({ answer }) => answer.plane).filter(Boolean));
    return [
      formatCount(this.#slices.length, "slice"),
      numFiles === 1 ? this.#scans[0].name : formatCount(numFiles, "file"),
      ...(planes.size === 1 ? planes : []),
      ...Object.entries(skipped).map(([reason, count]) => `${count} not used: ${spellOut(reason)}`),
      ...flags.map(spellOut),
    ].join(" · ");
  }

  #findKeySlices() {
    return (this.#summary?.key_slices ?? []).map(({ upload, frame }) => this.#slices.find(
      ({ scan, answer }) => scan === this.#scans[upload] && answer.frame === frame,
    )).filter(Boolean);
  }

  #showKeySlices() {
    const { keys, ticks } = this.#parts;
    const found = this.#findKeySlices().map((slice) => [this.#slices.indexOf(slice), slice]);
    ticks.replaceChildren(...found.map(([index]) => new Option("", index)));
    keys.hidden = !found.length;
    keys.replaceChildren("Key slices", ...found.map(([index, { answer }]) => {
      const text = summariseAnswer(answer);
      const button = element("button", "", `${index + 1}`, element("small", "", text));
      button.type = "button";
      button.setAttribute("aria-label", `Key slice ${index + 1}: ${text}`);
      button.addEventListener("click", () => this.#go(index));
      return button;
    }));
  }

  #showSlice() {
    const { slider, pixels, blank, previous, next, number, slice: panel, about } = this.#parts;
    const slice = this.#slices[this.#index];
    if (!slice) return;
    const { scan, answer, picture } = slice;
    slider.value = this.#index;
    previous.disabled = this.#index === 0;
    next.disabled = this.#index === this.#slices.length - 1;
    number.textContent = `Slice ${this.#index + 1} of ${this.#slices.length}`;
    slider.setAttribute("aria-valuetext", `${number.textContent}: ${summariseAnswer(answer)}`);
    pixels.hidden = !picture;
    blank.hidden = Boolean(picture);
    if (picture) pixels.src = picture;
    panel.dataset.status = answer.status;
    showAnswer(this.#parts, answer);
    const position = answer.position_mm === null ? null : `${answer.position_mm.toFixed(1)} mm`;
    setText(about, [
      scan.name,
      answer.frame === null ? null : `frame ${answer.frame}`,
      `${answer.width_px} × ${answer.height_px} px`,
      position,
      answer.reason,
    ].filter(Boolean).join(" · "));
    this.#showMap(slice);
  }

  // ---- heat maps -------------------------------------------------------------------------------

  #showMap(slice) {
    const { map, heat, note } = this.#parts;
    clearTimeout(this.#resting);
    const isWanted = heat.getAttribute("aria-pressed") === "true"
      && slice.answer.status !== "rejected";
    map.hidden = !isWanted || !slice.map;
    if (!map.hidden) map.src = slice.map;
    const isMissing = isWanted && slice.map === null;
    setText(note, isMissing ? "The heat map is being computed …" : "");
    if (isMissing) this.#resting = setTimeout(() => this.#requestMap(slice), REST_MS);
  }

  async #requestMap(slice) {
    const { answer, problem } = await this.#onExplain(slice.scan.file, slice.answer.frame);
    if (answer) slice.map = answer.heat_map_png ? makeUrl(answer.heat_map_png) : "";
    if (slice !== this.#slices[this.#index]) return;
    if (answer) this.#showMap(slice);
    else setText(this.#parts.note, problem?.title);
  }
}

/** Order slices along the patient; those without a position by file name and frame. */
function compareSlices(a, b) {
  const getPosition = ({ answer }) => answer.position_mm ?? Infinity;
  const [first, second] = [getPosition(a), getPosition(b)];
  if (first !== second) return first < second ? -1 : 1;
  const byName = a.scan.name.localeCompare(b.scan.name, "en", { numeric: true });
  return byName || (a.answer.frame ?? 0) - (b.answer.frame ?? 0);
}
