// DICOM and NIfTI files: sent in requests that the service takes, and put together to series.

import { element } from "./model.js";
import { makePicture } from "./scan.js";
import { Series } from "./series.js";
import { classifyFiles, Problem, renderFiles, summariseAnswers } from "./service.js";
import { explainProblem, explainStatus, formatBytes, formatCount } from "./words.js";

const FORM_BYTES = 1024; // around each file of a request
const ASSUMED_LIMITS = { files: 16, body_bytes: 16 * 2 ** 20 }; // until the service has said its own
const $ = (id) => document.getElementById(id);

/** Files of one request: their answers, then their pictures. */
class Batch {
  tries = 0;
  isDone = false;
  #study;
  #hasPictures = false;

  constructor(files, study) {
    this.files = files;
    this.records = null;
    this.#study = study;
  }

  async run(signal) {
    this.#study.say("");
    if (!this.records) {
      const { answers, classifierId } = await classifyFiles(this.files, signal);
      this.records = answers.map((answer, at) => ({ file: this.files[at], answer, classifierId }));
      this.#study.take(this.records);
    }
    if (!this.#hasPictures) await this.#draw(this.records.filter(isReadable), signal);
    this.#hasPictures = true;
    this.isDone = true;
  }

  /** Draw the slices of files; those of a file that has too many have no picture. */
  async #draw(records, signal) {
    if (!records.length) return;
    try {
      const pictures = await renderFiles(records.map(({ file }) => file), signal);
      for (const { upload, frame, png } of pictures) {
        if (png) this.#study.draw(records[upload], frame, makePicture(png));
      }
    } catch (error) {
      if (error.code !== "too_many_slices") throw error;
      const half = Math.ceil(records.length / 2);
      if (records.length === 1) return;
      await this.#draw(records.slice(0, half), signal);
      await this.#draw(records.slice(half), signal);
    }
  }

  /** Make two requests of one that has too many slices; null where that is no remedy. */
  split(problem) {
    if (problem.code !== "too_many_slices" || this.records || this.files.length < 2) return null;
    const half = Math.ceil(this.files.length / 2);
    this.isDone = true;
    return this.#study.replace(this, [this.files.slice(0, half), this.files.slice(half)]);
  }

  show(_, words) {
    this.#study.say(words);
  }

  fail(problem) {
    this.isDone = true;
    if (!this.records) this.#study.leaveOut(this.files, explainProblem(problem), problem);
  }
}

/** Puts the answers of a series together, once there are all of them. */
class Gathering {
  tries = 0;
  isDone = false;
  files = [];

  constructor(series) {
    this.series = series;
    series.isGathered = true;
  }

  async run(signal) {
    const { records } = this.series;
    const summary = await summariseAnswers(records.map(({ answer }) => answer), signal);
    this.series.showSummary(summary);
    this.isDone = true;
  }

  split() {
    return null;
  }

  show() {}

  fail(problem) {
    this.isDone = true;
    this.series.showMissing(explainProblem(problem));
  }
}

/** All series of the page, and the files that belong to none. */
export class Study {
  #batches = [];
  #series = new Map();
  #leftOut = [];

  /** @param {{onExplain: Function, speak: Function, onRetry: Function}} callbacks */
  constructor(callbacks) {
    this.callbacks = callbacks;
  }

  /** Take files; return the requests to make. */
  add(files, limits = ASSUMED_LIMITS) {
    const fitting = files.filter((file) => file.size + FORM_BYTES <= limits.body_bytes);
    const large = files.filter((file) => !fitting.includes(file));
    const most = formatBytes(limits.body_bytes);
    this.leaveOut(large, `The file is larger than this service takes: at most ${most}.`);
    const batches = cut(fitting, limits).map((some) => new Batch(some, this));
    this.#batches.push(...batches);
    $("study").hidden = false;
    return batches;
  }

  replace(batch, parts) {
    const batches = parts.map((files) => new Batch(files, this));
    this.#batches.splice(this.#batches.indexOf(batch), 1, ...batches);
    return batches;
  }

  /** Whether there is anything. */
  get isEmpty() {
    return !this.#batches.length && !this.#leftOut.length;
  }

  /** How many files there are, and how many of them are done with. */
  get progress() {
    const count = (batches) => batches.reduce((sum, { files }) => sum + files.length, 0);
    const large = this.#leftOut.filter(({ isSent }) => !isSent).length;
    return {
      total: count(this.#batches) + large,
      done: count(this.#batches.filter(({ isDone }) => isDone)) + large,
    };
  }

  /** The statuses of all slices, and of files that have none. */
  get statuses() {
    return this.rows.map(({ status }) => status);
  }

  /** The rows for the CSV. */
  get rows() {
    const answered = this.#batches.flatMap(({ records }) => records ?? []).flatMap(
      ({ file, answer, classifierId }) => (answer.slices ?? [answer]).map((slice) => ({
        ...answer, ...slice, name: file.name, classifier_id: classifierId,
      })));
    const unanswered = this.#leftOut.filter(({ answer }) => !answer).map(
      ({ file, problem }) => ({ name: file.name, status: "unanswered", reason: problem?.code ?? "body_too_large" }));
    return [...answered, ...unanswered];
  }

  /** Once all files are answered: put the series together that have changed. */
  gather() {
    if (this.#batches.some(({ isDone }) => !isDone)) return [];
    this.say("");
    return [...this.#series.values()]
      .filter(({ isGathered, isNamed }) => isNamed && !isGathered)
      .map((series) => new Gathering(series));
  }

  /** Sort the answers of a request to their series. */
  take(records) {
    const changed = new Set();
    for (const record of records) {
      if (!isReadable(record)) {
        this.leaveOut([record.file], explainStatus(record.answer), null, record.answer);
        continue;
      }
      const series = this.#find(record.answer);
      series.add(record);
      changed.add(series);
    }
    for (const series of changed) series.refresh();
  }

  draw({ answer }, frame, picture) {
    this.#find(answer).draw(answer, frame, picture);
  }

  leaveOut(files, words, problem = null, answer = null) {
    const isSent = Boolean(problem || answer);
    this.#leftOut.push(...files.map((file) => ({ file, words, problem, answer, isSent })));
    this.#showLeftOut();
  }

  /** Say how far it has come. */
  say(words) {
    $("study-state").textContent = words;
  }

  clear() {
    for (const series of this.#series.values()) series.remove();
    this.#series.clear();
    this.#batches = [];
    this.#leftOut = [];
    this.#showLeftOut();
    this.say("");
    $("study").hidden = true;
  }

  #find(answer) {
    const key = answer.series ?? answer.content_sha256;
    if (!this.#series.has(key)) {
      const number = this.#series.size + 1;
      const series = new Series(number, answer.series !== null, this.callbacks);
      this.#series.set(key, series);
      $("series-list").append(series.item);
    }
    return this.#series.get(key);
  }

  #showLeftOut() {
    const failed = this.#leftOut.filter(({ problem }) => problem);
    $("left-out").hidden = !this.#leftOut.length;
    $("left-out-count").textContent = `${formatCount(this.#leftOut.length, "file")} left out`;
    $("left-out-list").replaceChildren(...this.#leftOut.map(({ file, words }) => element("li", "",
      element("span", "name", file.name), element("span", "", words))));
    $("left-out-retry").hidden = !failed.length;
    $("left-out-retry").textContent = `Try ${formatCount(failed.length, "file")} again`;
  }

  /** Take back the files that got no answer, to try them anew. */
  takeFailed() {
    const failed = this.#leftOut.filter(({ problem }) => problem).map(({ file }) => file);
    this.#leftOut = this.#leftOut.filter(({ problem }) => !problem);
    this.#batches = this.#batches.filter(({ records, isDone }) => records || !isDone);
    this.#showLeftOut();
    return failed;
  }
}

function isReadable({ answer }) {
  return answer.status !== "rejected" || answer.width_px !== null;
}

/** Cut files into requests that the service takes. */
function cut(files, limits) {
  const batches = [];
  let numBytes = Infinity;
  for (const file of files) {
    numBytes += file.size + FORM_BYTES;
    if (numBytes > limits.body_bytes || batches.at(-1).length >= limits.files) {
      batches.push([]);
      numBytes = file.size + FORM_BYTES;
    }
    batches.at(-1).push(file);
  }
  return batches;
}
