// One file on the page: its picture, its progress, and its answer.

import { copyTemplate, element, renderAnswer, setPicture } from "./dom.js";
import { classifyFile, explainFile, renderFile } from "./service.js";
import { joinFacts, summariseAnswer } from "./words.js";

/** A file, and the list item that shows it until its slices are shown in a series. */
export class Scan {
  phase = "waiting"; // then "running", and "answered" or "failed"
  numTries = 0;
  answer = null;
  classifierId = null;
  problem = null;
  #render = "map"; // or "overlay", if the browser cannot draw the file
  #url = null;

  /**
   * @param {boolean} isVolumeFormat whether it is DICOM or NIfTI.
   * @param {{onSlices: Function, onRetry: Function}} callbacks
   */
  constructor(file, isVolumeFormat, { onSlices, onRetry }) {
    Object.assign(this, { file, isVolumeFormat, onSlices }, copyTemplate("scan-template"));
    const { card, title, picture, again } = this.parts;
    card.ariaLabel = title.textContent = title.title = file.name;
    picture.ariaLabel = `Enlarge ${file.name}`;
    picture.addEventListener("click", () => {
      if (document.fullscreenElement) document.exitFullscreen();
      else picture.requestFullscreen();
    });
    again.addEventListener("click", () => {
      title.focus({ preventScroll: true });
      onRetry(this);
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
    this.phase = this.item.dataset.phase = phase;
    this.parts.result.replaceChildren(element("p", "state", text));
  }

  /** Get the answer, and show it. */
  async run(signal) {
    if (this.isVolumeFormat) await this.#classify(signal);
    else await this.#explain(signal);
  }

  async #classify(signal) {
    this.show("running", "Being classified");
    Object.assign(this, await classifyFile(this.file, signal), { problem: null });
    if (this.answer.status === "rejected" && this.answer.width_px === null) {
      await this.#showAnswer();
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
    this.onSlices(this, pictures);
  }

  async #explain(signal) {
    const { pixels } = this.parts;
    if (!pixels.hasAttribute("src")) { // the service draws what the browser cannot
      this.#url ??= URL.createObjectURL(this.file);
      pixels.src = this.#url;
      if (!await this.#decode(pixels)) this.#render = "overlay";
    }
    this.show("running", "Being classified");
    let found = await explainFile(this.file, { render: this.#render }, signal);
    const { width_px: width, height_px: height } = found.answer;
    const isSame = pixels.naturalWidth === width && pixels.naturalHeight === height;
    if (this.#render === "map" && width !== null && !isSame) { // the browser turns or scales it
      this.#render = "overlay";
      found = await explainFile(this.file, { render: "overlay" }, signal);
    }
    Object.assign(this, found, { problem: null });
    await this.#showAnswer();
  }

  async #showAnswer() {
    const { pixels, map, result, facts, blank } = this.parts;
    const { answer } = this;
    const { status, reason, width_px: width, height_px: height } = answer;
    const isDrawn = this.#render === "overlay";
    if (answer.heat_map_png) {
      const image = isDrawn ? pixels : map;
      setPicture(image, answer.heat_map_png);
      await this.#decode(image);
      answer.heat_map_png = null; // the image has it now
    }
    this.phase = this.item.dataset.phase = "answered";
    this.item.dataset.status = status;
    result.replaceChildren(...renderAnswer(answer));
    facts.textContent = joinFacts(
      width && `${width} × ${height} px`,
      reason,
      status === "abstained" && `heat map of ${answer.explained_class}`,
      status !== "rejected" && isDrawn && "drawn by the service, with the heat map",
    );
    blank.textContent = status === "rejected" ? "Not readable" : "No picture";
  }

  /** Show a failure. */
  fail(problem) {
    const { result, again, blank } = this.parts;
    Object.assign(this, { problem, answer: null });
    this.show("failed", "No answer");
    const text = [problem.title, problem.detail].filter(Boolean).join(". ");
    result.append(element("p", "detail", text));
    blank.textContent = "No answer";
    again.hidden = problem.code === "body_too_large"; // a retry would fail as well
  }

  /** Forget a failure before a retry. */
  reset() {
    Object.assign(this, { problem: null, numTries: 0 });
    this.parts.blank.textContent = "";
    this.parts.again.hidden = true;
    this.show("waiting", "Waiting");
  }

  remove() {
    this.item.remove();
    if (this.#url) URL.revokeObjectURL(this.#url);
  }

  /** Wait for an image; hide it if the browser cannot draw it, and return whether it can. */
  async #decode(image) {
    try {
      await image.decode();
    } catch {
      image.removeAttribute("src");
      return false;
    }
    this.parts.picture.disabled = false;
    return true;
  }
}
