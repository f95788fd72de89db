// One series on the page: its summary, its slices to scroll through, and the answer to each.

import { copyTemplate, element, makeButton, renderAnswer, renderBars, setPicture } from "./dom.js";
import { summariseSeries } from "./service.js";
import { explainSeries, formatCount, joinFacts, spellOut, summariseAnswer } from "./words.js";

const REST_MS = 300; // on a slice, before its heat map is requested
const WHEEL_PX = 40; // of a wheel's movement, for one slice

/** A series, and the section that shows it. */
export class Series {
  numTries = 0;
  isSummarised = false;
  #scans = [];
  #slices = []; // {scan, answer, picture, map}: the heat map is null until it was requested
  #index = 0;
  #isChosen = false; // whether a person has chosen the slice
  #summary = null;
  #wheel = 0;
  #resting = null;

  /** @param {Function} explain requests the heat map of a slice: {answer}, or {problem}. */
  constructor(number, explain) {
    Object.assign(this, { explain, name: `Series ${number}` }, copyTemplate("series-template"));
    const { title, slider, ticks, stage, previous, next, heat } = this.parts;
    this.item.ariaLabel = title.textContent = this.name;
    slider.ariaLabel = `Slice of series ${number}`;
    ticks.id = `ticks-${number}`;
    slider.setAttribute("list", ticks.id);
    slider.addEventListener("input", () => this.#choose(Number(slider.value)));
    previous.addEventListener("click", () => this.#choose(this.#index - 1));
    next.addEventListener("click", () => this.#choose(this.#index + 1));
    stage.addEventListener("click", () => slider.focus({ preventScroll: true })); // for its keys
    stage.addEventListener("wheel", (event) => this.#turnWheel(event), { passive: false });
    heat.addEventListener("click", () => {
      heat.ariaPressed = String(heat.ariaPressed !== "true");
      this.#showSlice();
    });
  }

  /** The summary in one line. */
  get summary() {
    return `${this.parts.answer.textContent}, by slice evidence`;
  }

  /** Add the slices of a file that can be shown; the summary counts the others. */
  add(scan, pictures) {
    this.#scans.push(scan);
    this.isSummarised = false;
    const pngs = new Map(pictures.map(({ frame, png }) => [frame, png]));
    const shown = this.#slices[this.#index];
    for (const answer of scan.answer.slices ?? [scan.answer]) {
      if (answer.width_px === null) continue;
      this.#slices.push({ scan, answer, picture: pngs.get(answer.frame), map: null });
    }
    this.#slices.sort(compareSlices);
    const middle = Math.floor(this.#slices.length / 2);
    this.#index = this.#isChosen ? Math.max(0, this.#slices.indexOf(shown)) : middle;
    this.#showAll();
  }

  /** Summarise the slices, and show the summary. */
  async run(signal) {
    const summary = await summariseSeries(this.#scans.map(({ answer }) => answer), signal);
    if (!summary) {
      this.#showMissing("The files do not name a series.");
      return;
    }
    this.#summary = summary;
    const { answer, reason, evidence } = this.parts;
    const isGiven = summary.answer !== "indeterminate";
    this.item.dataset.answer = isGiven ? "given" : "indeterminate";
    answer.textContent = isGiven ? summary.answer : "Indeterminate";
    reason.textContent = explainSeries(summary);
    evidence.replaceChildren(...renderBars(summary.evidence, summary.answer));
    const [strongest] = this.#findKeySlices();
    if (strongest !== undefined && !this.#isChosen) this.#index = strongest;
    this.#showAll();
  }

  show() {}

  fail(problem) {
    this.#showMissing(problem.title);
  }

  remove() {
    clearTimeout(this.#resting);
    this.item.remove();
  }

  #showMissing(text) {
    this.item.dataset.answer = "missing";
    this.parts.answer.textContent = "No answer for the series";
    this.parts.reason.textContent = text;
  }

  #turnWheel(event) {
    if (event.ctrlKey) return; // zooms the page
    this.#wheel += event.deltaY * (event.deltaMode === WheelEvent.DOM_DELTA_PIXEL ? 1 : WHEEL_PX);
    const steps = Math.trunc(this.#wheel / WHEEL_PX);
    const target = Math.min(this.#slices.length - 1, Math.max(0, this.#index + steps));
    this.#wheel -= steps * WHEEL_PX;
    if (steps && target === this.#index) return; // beyond either end the page scrolls
    event.preventDefault();
    this.#choose(target);
  }

  #choose(index) {
    if (!this.#slices[index]) return;
    this.#isChosen = true;
    this.#index = index;
    this.#showSlice();
  }

  /** Find the positions of the summary's key slices. */
  #findKeySlices() {
    return (this.#summary?.key_slices ?? []).map(({ upload, frame }) => this.#slices.findIndex(
      ({ scan, answer }) => scan === this.#scans[upload] && answer.frame === frame,
    )).filter((index) => index >= 0);
  }

  #showAll() {
    const { slider, facts, keys, ticks } = this.parts;
    const { skipped = {}, flags = [] } = this.#summary ?? {};
    const numFiles = this.#scans.length;
    const planes = new Set(this.#slices.map(({ answer }) => answer.plane).filter(Boolean));
    slider.max = Math.max(0, this.#slices.length - 1);
    facts.textContent = joinFacts(
      formatCount(this.#slices.length, "slice"),
      numFiles === 1 ? this.#scans[0].name : formatCount(numFiles, "file"),
      ...(planes.size === 1 ? planes : []),
      ...Object.entries(skipped).map(([reason, count]) => `${count} not used: ${spellOut(reason)}`),
      ...flags.map(spellOut),
    );
    const found = this.#findKeySlices();
    ticks.replaceChildren(...found.map((index) => new Option("", index)));
    keys.hidden = !found.length;
    keys.replaceChildren("Key slices", ...found.map((index) => {
      const text = summariseAnswer(this.#slices[index].answer);
      const button = makeButton(() => this.#choose(index), index + 1, element("small", "", text));
      button.ariaLabel = `Key slice ${index + 1}: ${text}`;
      return button;
    }));
    this.#showSlice();
  }

  #showSlice() {
    const { slider, pixels, previous, next, number, result, about } = this.parts;
    const slice = this.#slices[this.#index];
    if (!slice) return;
    const { scan, answer, picture } = slice;
    slider.value = this.#index;
    previous.disabled = this.#index === 0;
    next.disabled = this.#index === this.#slices.length - 1;
    number.textContent = `Slice ${this.#index + 1} of ${this.#slices.length}`;
    slider.setAttribute("aria-valuetext", `${number.textContent}: ${summariseAnswer(answer)}`);
    setPicture(pixels, picture);
    result.replaceChildren(...renderAnswer(answer));
    about.textContent = joinFacts(
      scan.name,
      answer.frame !== null && `frame ${answer.frame}`,
      `${answer.width_px} × ${answer.height_px} px`,
      answer.position_mm !== null && `${answer.position_mm.toFixed(1)} mm`,
      answer.reason,
    );
    this.#showMap(slice);
  }

  #showMap(slice) {
    const { map, heat, note } = this.parts;
    clearTimeout(this.#resting);
    const isWanted = heat.ariaPressed === "true" && slice.answer.status !== "rejected";
    const isMissing = isWanted && slice.map === null;
    setPicture(map, isWanted && slice.map);
    note.textContent = isMissing ? "The heat map is being computed …" : "";
    if (isMissing) this.#resting = setTimeout(() => this.#requestMap(slice), REST_MS);
  }

  async #requestMap(slice) {
    const { answer, problem } = await this.explain(slice.scan.file, slice.answer.frame);
    if (answer) slice.map = answer.heat_map_png ?? "";
    if (slice !== this.#slices[this.#index]) return;
    if (answer) this.#showMap(slice);
    else this.parts.note.textContent = problem?.title ?? "";
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
