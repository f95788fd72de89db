// One series on the page: its answer, its slices to scroll through, and the answer to each.

import { element } from "./model.js";
import { fill, makePicture, renderBar, summariseAnswer } from "./scan.js";
import { explainProblem, explainSeries, explainStatus, formatCount, formatShare, nameFlag } from "./words.js";

const template = document.getElementById("series-template");
const REST_MS = 300; // on a slice, before its heat map is asked for
const WHEEL_PX = 40; // of a wheel, for one slice

/** A series, and the section that shows it. */
export class Series {
  records = [];
  isGathered = false;
  #parts = {};
  #slices = [];
  #at = 0;
  #isPlaced = false; // whether a person, or a key slice, has chosen where to look
  #summary = null;
  #wheel = 0;
  #resting = null;
  #callbacks;

  /**
   * @param {number} number among the series of the page.
   * @param {boolean} isNamed whether its files name a series, so that the service sums it up.
   */
  constructor(number, isNamed, callbacks) {
    this.number = number;
    this.isNamed = isNamed;
    this.#callbacks = callbacks;
    this.item = template.content.firstElementChild.cloneNode(true);
    for (const part of this.item.querySelectorAll("[data-part]")) {
      this.#parts[part.dataset.part] = part;
    }
    const { title, slider, heat } = this.#parts;
    title.id = `series-${number}`;
    title.textContent = `Series ${number}`;
    this.item.setAttribute("aria-labelledby", title.id);
    slider.setAttribute("aria-label", `Slice of series ${number}`);
    heat.setAttribute("aria-pressed", "false");
    this.#listen();
    if (!isNamed) this.showMissing("The files name no series, so their slices are not put together.");
  }

  get name() {
    return `Series ${this.number}`;
  }

  /** Add a file's slices; those that cannot be shown are counted by the series' answer. */
  add(record) {
    this.records.push(record);
    this.isGathered = false;
    for (const answer of record.answer.slices ?? [record.answer]) {
      if (answer.width_px === null) continue;
      this.#slices.push({ record, answer, picture: null, map: null });
    }
  }

  /** Keep the picture of a slice. */
  draw(answer, frame, blob) {
    const slice = this.#slices.find(
      (one) => one.record.answer === answer && (one.answer.frame ?? null) === (frame ?? null));
    if (!slice) return;
    slice.picture = URL.createObjectURL(blob);
    if (slice === this.#slices[this.#at]) this.#showSlice();
  }

  /** Show the slices there are, in their order; the middle one first. */
  refresh() {
    const shown = this.#slices[this.#at];
    this.#slices.sort(compareSlices);
    const { slider, facts } = this.#parts;
    slider.max = Math.max(0, this.#slices.length - 1);
    const middle = Math.floor(this.#slices.length / 2);
    this.#at = this.#isPlaced ? Math.max(0, this.#slices.indexOf(shown)) : middle;
    fill(facts, this.#describe());
    this.#showMarks();
    this.#showSlice();
  }

  /** Show what the slices say together. */
  showSummary(summary) {
    this.#summary = summary;
    const { answer, words, evidence, facts } = this.#parts;
    const isGiven = summary.answer !== "indeterminate";
    this.item.dataset.answer = isGiven ? "given" : "indeterminate";
    answer.textContent = isGiven ? summary.answer : "Indeterminate";
    fill(words, explainSeries(summary));
    evidence.replaceChildren(...Object.entries(summary.evidence).map(
      ([name, fraction]) => renderBar(name, fraction, name === summary.answer)));
    evidence.hidden = false;
    fill(facts, this.#describe());
    const [first] = this.#findKeySlices();
    if (first && !this.#isPlaced) this.#at = this.#slices.indexOf(first);
    this.#showMarks();
    this.#showSlice();
    this.#callbacks.speak(`${this.name}: ${answer.textContent}, by slice evidence.`);
  }

  /** Say why the slices are not put together. */
  showMissing(words) {
    this.item.dataset.answer = "missing";
    this.#parts.answer.textContent = "No answer for the series";
    fill(this.#parts.words, words);
  }

  remove() {
    clearTimeout(this.#resting);
    this.item.remove();
    for (const { picture, map } of this.#slices) {
      for (const url of [picture, map]) if (url) URL.revokeObjectURL(url);
    }
  }

  // ---- scrolling -------------------------------------------------------------------------------

  #listen() {
    const { slider, stage, previous, next, heat } = this.#parts;
    slider.addEventListener("input", () => this.#go(Number(slider.value)));
    previous.addEventListener("click", () => this.#go(this.#at - 1));
    next.addEventListener("click", () => this.#go(this.#at + 1));
    stage.addEventListener("click", () => slider.focus({ preventScroll: true })); // its keys scroll
    stage.addEventListener("wheel", (event) => this.#turnWheel(event), { passive: false });
    heat.addEventListener("click", () => {
      heat.setAttribute("aria-pressed", heat.getAttribute("aria-pressed") !== "true");
      this.#showSlice();
    });
  }

  #turnWheel(event) {
    if (event.ctrlKey) return; // enlarges the page
    const lines = event.deltaMode === WheelEvent.DOM_DELTA_PIXEL ? 1 : WHEEL_PX;
    this.#wheel += event.deltaY * lines;
    const steps = Math.trunc(this.#wheel / WHEEL_PX);
    const target = Math.min(this.#slices.length - 1, Math.max(0, this.#at + steps));
    this.#wheel -= steps * WHEEL_PX;
    if (steps && target === this.#at) return; // at the end the page goes on
    event.preventDefault();
    this.#go(target);
  }

  #go(index) {
    if (!this.#slices[index]) return;
    this.#isPlaced = true;
    this.#at = index;
    this.#showSlice();
  }

  // ---- what is shown ---------------------------------------------------------------------------

  #describe() {
    const facts = [formatCount(this.#slices.length, "slice")];
    const files = this.records.length;
    facts.push(files === 1 ? this.records[0].file.name : formatCount(files, "file"));
    const planes = new Set(this.#slices.map(({ answer }) => answer.plane).filter(Boolean));
    if (planes.size === 1) facts.push(...planes);
    for (const [reason, count] of Object.entries(this.#summary?.skipped ?? {})) {
      facts.push(`${count} not used: ${nameFlag(reason)}`);
    }
    return [...facts, ...(this.#summary?.flags ?? []).map(nameFlag)].join(" · ");
  }

  #findKeySlices() {
    return (this.#summary?.key_slices ?? []).map(({ upload, frame }) => this.#slices.find(
      ({ record, answer }) => record === this.records[upload] && (answer.frame ?? null) === frame,
    )).filter(Boolean);
  }

  #showMarks() {
    const { marks, keys } = this.#parts;
    const last = Math.max(1, this.#slices.length - 1);
    const found = this.#findKeySlices().map((slice) => [slice, this.#slices.indexOf(slice)]);
    marks.replaceChildren(...found.map(([, index]) => {
      const mark = element("i", "");
      mark.style.setProperty("--place", index / last);
      mark.addEventListener("click", () => this.#go(index));
      return mark;
    }));
    keys.hidden = !found.length;
    keys.replaceChildren("Key slices", ...found.map(([{ answer }, index]) => {
      const button = element("button", "", `${index + 1}`, element("small", "", summariseAnswer(answer)));
      button.type = "button";
      button.setAttribute("aria-label", `Key slice ${index + 1}: ${summariseAnswer(answer)}`);
      button.addEventListener("click", () => this.#go(index));
      return button;
    }));
  }

  #showSlice() {
    const { slider, pixels, blank, previous, next, number } = this.#parts;
    const slice = this.#slices[this.#at];
    if (!slice) return;
    slider.value = this.#at;
    previous.disabled = this.#at === 0;
    next.disabled = this.#at === this.#slices.length - 1;
    number.textContent = `Slice ${this.#at + 1} of ${this.#slices.length}`;
    slider.setAttribute("aria-valuetext", `${number.textContent}: ${summariseAnswer(slice.answer)}`);
    pixels.hidden = !slice.picture;
    if (slice.picture) pixels.src = slice.picture;
    blank.hidden = Boolean(slice.picture);
    this.#showAnswer(slice);
    this.#showMap(slice);
  }

  #showAnswer({ record, answer }) {
    const { verdict, share, state, detail, probs, about } = this.#parts;
    const isClassified = answer.status === "classified";
    this.#parts.slice.dataset.status = answer.status;
    verdict.hidden = !isClassified;
    this.#parts.class.textContent = answer.predicted_class ?? "";
    share.textContent = isClassified ? formatShare(answer.confidence) : "";
    fill(state, { classified: "", abstained: "Abstained", rejected: "Rejected" }[answer.status]);
    fill(detail, explainStatus(answer));
    probs.replaceChildren(...Object.entries(answer.probs ?? {}).map(
      ([name, fraction]) => renderBar(name, fraction, name === answer.predicted_class)));
    probs.hidden = !answer.probs;
    const facts = [record.file.name, `${answer.width_px} × ${answer.height_px} px`];
    if (answer.frame !== null) facts.splice(1, 0, `frame ${answer.frame}`);
    if (answer.position_mm !== null) facts.push(`${answer.position_mm.toFixed(1)} mm`);
    if (answer.reason) facts.push(answer.reason);
    fill(about, facts.join(" · "));
  }

  // ---- heat maps -------------------------------------------------------------------------------

  #showMap(slice) {
    const { map, heat, note } = this.#parts;
    clearTimeout(this.#resting);
    const isWanted = heat.getAttribute("aria-pressed") === "true" && slice.answer.status !== "rejected";
    map.hidden = !isWanted || !slice.map;
    if (!map.hidden) map.src = slice.map;
    fill(note, isWanted && !slice.map && slice.map !== "" ? "The heat map comes …" : "");
    if (isWanted && slice.map === null) {
      this.#resting = setTimeout(() => this.#askForMap(slice), REST_MS);
    }
  }

  async #askForMap(slice) {
    const isShown = () => slice === this.#slices[this.#at];
    const explained = await this.#callbacks.onExplain(slice.record.file, slice.answer.frame);
    if (!explained) return; // the page was cleared
    if (explained.problem) {
      if (isShown()) fill(this.#parts.note, explainProblem(explained.problem));
      return;
    }
    const png = explained.answer.heat_map_png;
    slice.map = png ? URL.createObjectURL(makePicture(png)) : "";
    if (isShown()) this.#showMap(slice);
  }
}

/** Order slices along the patient, and those without a position by frame and name. */
function compareSlices(a, b) {
  const place = ({ answer }) => answer.position_mm ?? Infinity;
  const [first, second] = [place(a), place(b)];
  if (first !== second) return first < second ? -1 : 1;
  const byName = a.record.file.name.localeCompare(b.record.file.name, "en", { numeric: true });
  return byName || (a.answer.frame ?? 0) - (b.answer.frame ?? 0);
}
