// Requests to the service, the token, and refusals.

const TOKEN_KEY = "brainray-token"; // in sessionStorage: of this tab, until it is closed
const REQUEST_TIME_MS = 120_000;

/** A refused or failed request: the members of RFC 9457, the time to wait, and the token used. */
export class Problem extends Error {
  constructor({ code, status = 0, title, detail = null, waitSeconds = 0, token = null }) {
    super(title);
    Object.assign(this, { code, status, title, detail, waitSeconds, token });
  }

  /** Whether the same request may succeed later. */
  get isTemporary() {
    return this.status === 429 || this.status === 503;
  }
}

export function readToken() {
  return sessionStorage.getItem(TOKEN_KEY);
}

export function storeToken(token) {
  if (token === null) sessionStorage.removeItem(TOKEN_KEY);
  else sessionStorage.setItem(TOKEN_KEY, token);
}

/** Describe the classifier and the limits. */
export async function readModel() {
  return request("v1/model", {});
}

/**
 * Classify and explain a picture, or one slice of a file.
 * @param {{render: "map" | "overlay", frame: ?number}} options the heat map alone or on the scan;
 *   the number of the slice, if the file has several.
 */
export async function explainFile(file, { render = "map", frame = null }, signal) {
  const query = new URLSearchParams({ render, ...(frame !== null && { frame }) });
  return readAnswer(await postFile(`v1/explain?${query}`, file, signal));
}

/** Classify all slices of a file. */
export async function classifyFile(file, signal) {
  return readAnswer(await postFile("v1/classify", file, signal));
}

/** Render all slices of a file: the frame, and the PNG in base64, of each. */
export async function renderFile(file, signal) {
  return (await postFile("v1/render", file, signal)).pictures;
}

/** Summarise the answers to the files of one series; undefined if they name no series. */
export async function summariseSeries(answers, signal) {
  const headers = { "content-type": "application/json" };
  const body = JSON.stringify({ answers });
  return (await request("v1/series", { method: "POST", body, headers, signal })).series?.[0];
}

function readAnswer({ answers, classifier_id: classifierId }) {
  if (!answers?.length) throw notUnderstood(200);
  return { answer: answers[0], classifierId };
}

function postFile(path, file, signal) {
  const body = new FormData();
  body.append("files", file, file.name);
  return request(path, { method: "POST", body, signal });
}

async function request(path, { signal, headers = {}, ...options }) {
  const token = readToken();
  const timeout = AbortSignal.timeout(REQUEST_TIME_MS);
  const authorization = token && { authorization: `Bearer ${token}` };
  try {
    const response = await fetch(path, {
      ...options,
      headers: { accept: "application/json", ...headers, ...authorization },
      signal: signal ? AbortSignal.any([signal, timeout]) : timeout,
    });
    const body = await response.json().catch((error) => {
      if (signal?.aborted || timeout.aborted) throw error;
      return null; // a proxy's own page
    });
    if (response.ok && body) return body;
    const { status } = response;
    const waitSeconds = Number(response.headers.get("retry-after")) || 0;
    throw new Problem({ ...(body?.code ? body : notUnderstood(status)), status, waitSeconds, token });
  } catch (error) {
    if (error instanceof Problem || signal?.aborted) throw error;
    throw new Problem(timeout.aborted
      ? { code: "timeout", title: "The answer took too long. Try again later." }
      : { code: "unreachable",
        title: "The service cannot be reached. Check the connection, and whether it runs." });
  }
}

function notUnderstood(status) {
  const title = `The response (status ${status}) is not from this service. Check the address.`;
  return new Problem({ code: "not_understood", status, title });
}
