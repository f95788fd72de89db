// What a person reads: numbers, and why there is no class.

const REJECTIONS = {
  missing: "There is no file at that place. Choose it again.",
  unreadable: "The file is there but could not be read. Check its permissions, and choose it again.",
  empty: "The file has no bytes. Copy or export it again.",
  truncated: "The file ends before its image does: it was cut off on its way. Copy or export it again.",
  corrupt: "The file contradicts its own format. Export the image again.",
  not_an_image: "This is not an image in any known format. Choose a JPEG, PNG, BMP, GIF, TIFF, WebP, DICOM or NIfTI file.",
  too_large: "The image is larger than this service takes. Send a smaller one, or a single slice.",
  unsupported: "This format, or this variant of it, is not supported. Save the image as PNG.",
  multi_frame: "The file holds several images, and which is meant is ambiguous. Save the slice you mean by itself.",
  not_an_image_object: "This DICOM object is a report or something else that is no image.",
  no_pixels: "This DICOM object has no pixels.",
  not_mr: "This is not a magnetic resonance image.",
  other_body_part: "The header names a part of the body other than the head.",
  localizer: "This is a localizer.",
  projection: "This is a projection or a reformatted image.",
  derived_map: "This is a computed map or a phase image.",
  mosaic: "This frame is a mosaic of many slices.",
  secondary_capture: "This is a screen capture.",
  colour: "This image has colours.",
  burned_in: "The header says that text is burned into the image.",
  little_tissue: "This slice of the volume has little tissue.",
  duplicate: "The same slice is there already.",
  unlike_training: "This does not look like the brain MRI slices that the classifier was trained on. Send a slice like those.",
};
const ABSTENTION = "No class was probable enough to be given. These are the probabilities.";

const INDETERMINATE = {
  too_few_slices: "There are too few slices with answers to tell.",
  several_classes: "The slices speak for several classes.",
  weak_evidence: "Some slices speak for a tumour, but too few of them are neighbours.",
  localizer: "This is a localizer: a few slices of several directions.",
};

const FLAGS = {
  body_part_unknown: "body part not stated",
  contrast_diffusion: "diffusion-weighted",
  echo_planar: "echo planar",
  frames_rejected: "some frames left out",
  incomplete: "slices missing",
  lossy: "lossily compressed",
  mixed: "several directions",
  modality_unknown: "modality not stated",
  multi_volume: "first volume only",
  no_window: "no window",
  non_axial: "not axial",
  orientation_unknown: "orientation not stated",
};

const PROBLEMS = {
  unauthorized: "The service did not accept the token.",
  body_too_slow: "The file did not reach the service in time. Check the connection.",
  body_too_large: "The file is larger than this service takes.",
  too_many_files: "The service takes fewer files in a request.",
  too_many_slices: "The file has more slices than this service takes. `brainray classify` takes it.",
  too_busy: "The service has more to do than it can take. Try again in a while.",
  internal: "The service failed on this scan.",
  model_unavailable: "The model cannot answer now. Try again in a while.",
  timeout: "The answer took too long. Try again in a while.",
  unreachable: "The service cannot be reached. Check the connection, and that it is running.",
  file_unreadable: "The browser could not read the file. Was it moved or changed? Choose it again.",
  not_understood: "Something answered that is not this service. Check the address.",
};

/** Say why a scan has no class; null where it has one. */
export function explainStatus(answer) {
  if (answer.status === "rejected") {
    return REJECTIONS[answer.reason] ?? answer.detail ?? "The scan could not be read.";
  }
  return answer.status === "abstained" ? ABSTENTION : null;
}

/** Say why a series has no class; null where it has one. */
export function explainSeries(summary) {
  if (summary.answer !== "indeterminate") return null;
  return INDETERMINATE[summary.reason] ?? "The slices do not agree on a class.";
}

/** Say what is unknown or unusual about a slice or a series. */
export function nameFlag(flag) {
  return FLAGS[flag] ?? flag.replaceAll("_", " ");
}

/** Say what went wrong, and what to do. */
export function explainProblem(problem) {
  return PROBLEMS[problem.code] ?? problem.title ?? "The service gave no answer.";
}

/** Write a probability; what is not quite 0 or 1 never looks as if it were. */
export function formatShare(fraction) {
  if (fraction > 0 && fraction < 0.001) return "< 0.1 %";
  if (fraction < 1 && fraction > 0.999) return "> 99.9 %";
  return `${(100 * fraction).toFixed(1)} %`;
}

/** Write a number of bytes. */
export function formatBytes(bytes) {
  const units = ["B", "KiB", "MiB", "GiB"];
  let power = 0;
  while (bytes >= 1024 && power < units.length - 1) {
    bytes /= 1024;
    power += 1;
  }
  const digits = bytes < 10 && !Number.isInteger(bytes) ? 1 : 0;
  return `${bytes.toFixed(digits)} ${units[power]}`;
}

/** Write a count with its noun: 1 scan, 2 scans. */
export function formatCount(count, noun) {
  return `${count.toLocaleString("en")} ${noun}${count === 1 ? "" : "s"}`;
}
