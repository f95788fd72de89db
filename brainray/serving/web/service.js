// The service over HTTP: the token it may need, and its refusals.

const TOKEN_KEY = "brainray-token"; // of sessionStorage: this tab, until it is closed
const REQUEST_TIME_MS = 120_000;

/** A request that got no answer but a reason: RFC 9457's members, how long to wait, and the token
 *  that it was made with. */
export class Problem extends Error {
  constructor({ code, status = 0, title = null, detail = null, waitSeconds = null, token = null }) {
    super(detail ?? code);
    Object.assign(this, { code, status, title, detail, waitSeconds, token });
  }

  /** Whether the same request may well be answered later. */
  get mayPass() {
    return this.status === 429 || this.status === 503;
  }
}

export function readToken() {
  return sessionStorage.getItem(TOKEN_KEY);
}

export function keepToken(token) {
  if (token === null) sessionStorage.removeItem(TOKEN_KEY);
  else sessionStorage.setItem(TOKEN_KEY, token);
}

/** Read the card of the classifier that answers. */
export async function readModel() {
  return ask("v1/model", {});
}

/**
 * Have one scan, or one slice of a file, answered and explained.
 * @param {File} file
 * @param {{render: "map" | "overlay", frame: ?number}} options the map alone, or with the scan under
 *   it; the number of the slice, where the file has several.
 * @param {AbortSignal} signal
 * @returns {Promise<{answer: object, classifierId: string, classes: string[]}>}
 */
export async function explainScan(file, { render = "map", frame = null }, signal) {
  const query = new URLSearchParams({ render, ...(frame !== null && { frame }) });
  const body = await postFiles(`v1/explain?${query}`, [file], signal);
  const [answer] = body.answers ?? [];
  if (!answer) throw new Problem({ code: "not_understood" });
  return { answer, classifierId: body.classifier_id, classes: body.classes };
}

/** Have files answered, slice by slice; one answer for each, in order. */
export async function classifyFiles(files, signal) {
  const body = await postFiles("v1/classify", files, signal);
  if (body.answers?.length !== files.length) throw new Problem({ code: "not_understood" });
  return { answers: body.answers, classifierId: body.classifier_id };
}

/** Have all slices of files drawn: `upload`, the number of the file, `frame` and `png` of each. */
export async function renderFiles(files, signal) {
  const { pictures } = await postFiles("v1/render", files, signal);
  if (!Array.isArray(pictures)) throw new Problem({ code: "not_understood" });
  return pictures;
}

/** Have the answers to the files of one series put together. */
export async function summariseAnswers(answers, signal) {
  const headers = { "content-type": "application/json" };
  const body = JSON.stringify({ answers });
  const [summary] = (await ask("v1/series", { method: "POST", body, headers, signal })).series ?? [];
  if (!summary) throw new Problem({ code: "not_understood" });
  return summary;
}

function postFiles(path, files, signal) {
  const form = new FormData();
  for (const file of files) form.append("files", file, file.name);
  return ask(path, { method: "POST", body: form, signal });
}

async function ask(path, { signal, headers = {}, ...request }) {
  const token = readToken();
  const late = AbortSignal.timeout(REQUEST_TIME_MS);
  let response;
  try {
    response = await fetch(path, {
      ...request,
      headers: {
        accept: "application/json", ...headers, ...(token && { authorization: `Bearer ${token}` }),
      },
      signal: signal ? AbortSignal.any([signal, late]) : late,
    });
  } catch (error) {
    if (signal?.aborted) throw error;
    throw new Problem({ code: late.aborted ? "timeout" : "unreachable" });
  }
  if (!response.ok) throw await readProblem(response, token);
  try {
    return await response.json();
  } catch (error) {
    if (signal?.aborted) throw error;
    throw new Problem({ code: "not_understood", status: response.status });
  }
}

async function readProblem(response, token) {
  const { status } = response;
  const waitSeconds = readRetryAfter(response.headers.get("retry-after"));
  let body = {};
  try {
    body = await response.json();
  } catch {
    // a proxy's own page: its status says enough
  }
  const code = body.code ?? { 401: "unauthorized", 413: "body_too_large", 429: "too_busy",
    503: "model_unavailable", 504: "timeout" }[status] ?? "not_understood";
  return new Problem({ ...body, code, status, waitSeconds, token });
}

/** Read seconds, or a date (RFC 9110, 10.2.3); null where there is neither. */
function readRetryAfter(value) {
  if (value === null) return null;
  if (/^\d+$/.test(value.trim())) return Number(value);
  const moment = Date.parse(value);
  return Number.isNaN(moment) ? null : Math.max(0, (moment - Date.now()) / 1000);
}
