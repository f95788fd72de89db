// One file on the page: its picture, its progress, and its answer.

import { copyTemplate, makeUrl, setText, showAnswer } from "./dom.js";
import { classifyFile, explainFile, renderFile } from "./service.js";
import { summariseAnswer } from "./words.js";

let count = 0;

/** A file, and the list item that shows it until its slices are shown in a series. */
export class Scan {
  /** @type {"waiting" | "running" | "answered" | "failed"} */
  phase = "waiting";
  numTries = 0;
  answer = null;
  classifierId = null;
  problem = null;
  #render = "map"; // or "overlay", if the browser cannot draw the file
  #callbacks;
  #urls = [];
  #parts;

  /**
   * @param {boolean} isVolumeFormat whether it is DICOM or NIfTI.
   * @param {{onSlices: Function, onRetry: Function}} callbacks
   */
  constructor(file, isVolumeFormat, callbacks) {
    this.file = file;
    this.isVolumeFormat = isVolumeFormat;
    this.#callbacks = callbacks;
    const { item, parts } = copyTemplate("scan-template");
    this.item = item;
    this.#parts = parts;
    count += 1;
    const { title, picture, again } = parts;
    title.id = `scan-${count}`;
    title.textContent = file.name;
    title.title = file.name;
    item.firstElementChild.setAttribute("aria-labelledby", title.id);
    picture.setAttribute("aria-label", `Enlarge ${file.name}`);
    picture.addEventListener("click", () => {
      if (document.fullscreenElement) document.exitFullscreen();
      else picture.requestFullscreen();
    });
    again.addEventListener("click", () => {
      title.focus({ preventScroll: true });
      callbacks.onRetry(this);
    });
    this.show("waiting", "Waiting");
  }

  get name() {
    return this.file.name;
  }

  get isDone() {
    return this.phase === "answered" || this.phase === "failed";
  }

  /** The rows of the CSV: one for each slice, or one with the reason why there is no answer. */
  get rows() {
    const own = { name: this.name, classifier_id: this.classifierId };
    if (!this.answer) {
      return [{ ...own, status: "unanswered", reason: this.problem?.code ?? this.phase }];
    }
    const slices = this.answer.slices ?? [this.answer];
    return slices.map((slice) => ({ ...this.answer, ...slice, ...own }));
  }

  /** The answer in one line. */
  get summary() {
    return this.problem ? `no answer. ${this.problem.title}` : summariseAnswer(this.answer);
  }

  /** Show its progress. */
  show(phase, text) {
    this.phase = phase;
    this.item.dataset.phase = phase;
    setText(this.#parts.state, text);
  }

  /** Get the answer, and show it. */
  async run(signal) {
    if (this.isVolumeFormat) await this.#classify(signal);
    else await this.#explain(signal);
  }

  async #classify(signal) {
    this.show("running", "Being classified");
    const { answer, classifierId } = await classifyFile(this.file, signal);
    Object.assign(this, { answer, classifierId, problem: null });
    if (answer.status === "rejected" && answer.width_px === null) {
      await this.#showAnswer(answer);
      return;
    }
    let pictures = [];
    try {
      pictures = await renderFile(this.file, signal);
    } catch (problem) { // an answer without pictures is an answer
      if (signal.aborted || problem.isTemporary || problem.status === 401) throw problem;
    }
    this.phase = "answered";
    this.item.remove();
    this.#callbacks.onSlices(this, pictures);
  }

  async #explain(signal) {
    await this.#draw();
    this.show("running", "Being classified");
    let { answer, classifierId } = await explainFile(this.file, { render: this.#render }, signal);
    if (this.#isDrawnDifferently(answer)) {
      this.#render = "overlay";
      ({ answer, classifierId } = await explainFile(this.file, { render: "overlay" }, signal));
    }
    Object.assign(this, { answer, classifierId, problem: null });
    await this.#showAnswer(answer);
  }

  /** Draw the file; the service draws what the browser cannot. */
  async #draw() {
    const { pixels } = this.#parts;
    if (!pixels.hidden) return;
    this.#urls.push(URL.createObjectURL(this.file));
    if (!await this.#load(pixels, this.#urls.at(-1))) this.#render = "overlay";
  }

  /** Whether the heat map would not match the scan as the browser draws it, turned or scaled. */
  #isDrawnDifferently({ width_px: width, height_px: height }) {
    const { pixels } = this.#parts;
    return this.#render === "map" && width !== null
      && (pixels.naturalWidth !== width || pixels.naturalHeight !== height);
  }

  async #showAnswer(answer) {
    const { pixels, map, blank } = this.#parts;
    if (answer.heat_map_png) {
      this.#urls.push(makeUrl(answer.heat_map_png));
      await this.#load(this.#render === "overlay" ? pixels : map, this.#urls.at(-1));
      answer.heat_map_png = null; // the image has it now
    }
    this.show("answered", null);
    showAnswer(this.#parts, answer);
    setText(this.#parts.facts, this.#describe(answer));
    blank.textContent = answer.status === "rejected" ? "Not readable" : "No picture";
    this.item.dataset.status = answer.status;
  }

  /** Show a failure. */
  fail(problem) {
    const { detail, again, blank } = this.#parts;
    Object.assign(this, { problem, answer: null });
    setText(detail, [problem.title, problem.detail].filter(Boolean).join(". "));
    blank.textContent = "No answer";
    again.hidden = problem.code === "body_too_large"; // a retry would fail as well
    this.show("failed", "No answer");
  }

  /** Forget a failure before a retry. */
  reset() {
    const { detail, again, blank } = this.#parts;
    Object.assign(this, { problem: null, numTries: 0 });
    setText(detail, null);
    blank.textContent = "";
    again.hidden = true;
    this.show("waiting", "Waiting");
  }

  remove() {
    this.item.remove();
    for (const url of this.#urls) URL.revokeObjectURL(url);
  }

  async #load(image, url) {
    image.src = url;
    try {
      await image.decode();
    } catch {
      image.removeAttribute("src");
      return false;
    }
    image.hidden = false;
    this.#parts.blank.hidden = true;
    this.#parts.picture.disabled = false;
    return true;
  }

  #describe(answer) {
    const facts = [];
    if (answer.width_px) facts.push(`${answer.width_px} × ${answer.height_px} px`);
    if (answer.reason) facts.push(answer.reason);
    if (answer.status === "abstained") facts.push(`heat map of ${answer.explained_class}`);
    if (answer.status !== "rejected" && this.#render === "overlay") {
      facts.push("drawn by the service, with the heat map");
    }
    return facts.join(" · ");
  }
}
