// Answers as CSV (RFC 4180), with the column names of the table of predictions.

// Spreadsheets evaluate a cell that begins so as a formula, even if it is quoted.
const FORMULA = /^[\s\p{Cf}]*[=+\-@\uFF1D\uFF0B\uFF0D\uFF20|%]|^[\t\r\n]/u;
const ASCII = /^[\x00-\x7F]*$/;
const SLICE_COLUMNS = ["series", "frame", "position_mm"]; // left out if no row has a value

/**
 * Write a table of answers.
 * @param {object[]} rows one for each slice; null and absent members become empty cells.
 * @param {string[]} classes in the order of the columns.
 * @returns {string} with a byte order mark if it is not ASCII, for spreadsheets.
 */
export function renderCsv(rows, classes) {
  const columns = [
    "name", "content_sha256", "status", "reason", "predicted_class", "confidence",
    ...classes.map((name) => `prob_${name}`),
    "width_px", "height_px", "classifier_id",
    ...SLICE_COLUMNS.filter((name) => rows.some((row) => (row[name] ?? null) !== null)),
  ];
  const cells = rows.map((row) => {
    const probs = classes.map((name) => [`prob_${name}`, row.probs?.[name]]);
    const values = { ...row, ...Object.fromEntries(probs) };
    return columns.map((name) => values[name]);
  });
  const text = [columns, ...cells].map((line) => `${line.map(renderCell).join(",")}\r\n`).join("");
  return ASCII.test(text) ? text : `\uFEFF${text}`;
}

function renderCell(value) {
  if (value === null || value === undefined) return "";
  if (typeof value === "number") return String(value);
  const text = FORMULA.test(value) ? `'${value}` : String(value);
  return /[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
}
