// Answers as CSV (RFC 4180), under the names that the table of a bulk run has.

// A spreadsheet takes a cell that begins so for a formula, whatever quotes are around it.
const FORMULA = /^[\s\p{Cf}]*[=+\-@\uFF1D\uFF0B\uFF0D\uFF20|%]|^[\t\r\n]/u;
const ASCII = /^[\x00-\x7F]*$/;

const OF_SLICES = ["series", "frame", "position_mm"]; // columns where a row has one of them

/**
 * Write a table of answers.
 * @param {object[]} rows name, status, reason, predicted_class, confidence, probs, width_px,
 *   height_px, content_sha256, classifier_id of each scan, and series, frame, position_mm of a slice;
 *   what is null or absent is left empty.
 * @param {string[]} classes in the order of the columns.
 * @returns {string} with a byte order mark where spreadsheets need one to read it rightly.
 */
export function renderCsv(rows, classes) {
  const columns = [
    "name", "content_sha256", "status", "reason", "predicted_class", "confidence",
    ...classes.map((name) => `prob_${name}`),
    "width_px", "height_px", "classifier_id",
  ];
  const further = OF_SLICES.filter((name) => rows.some((row) => (row[name] ?? null) !== null));
  const lines = rows.map((row) => [
    row.name, row.content_sha256, row.status, row.reason, row.predicted_class, row.confidence,
    ...classes.map((name) => row.probs?.[name]),
    row.width_px, row.height_px, row.classifier_id, ...further.map((name) => row[name]),
  ]);
  const text = [[...columns, ...further], ...lines].map((line) => line.map(renderCell).join(",") + "\r\n").join("");
  return ASCII.test(text) ? text : `\uFEFF${text}`;
}

function renderCell(value) {
  if (value === null || value === undefined) return "";
  if (typeof value === "number") return String(value);
  const text = FORMULA.test(value) ? `'${value}` : String(value);
  return /[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
}
