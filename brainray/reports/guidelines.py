"""Reporting guidelines: which of their items a training run can answer, and where.

Topics are in our own words; the numbers are the guidelines'. That an item has an answer here says
where to look, not that a report meets it: that is for its authors and readers to judge.
"""

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Item:
    """One item of a checklist."""

    number: str
    """As the guideline counts."""
    topic: str
    answer: str | None = None
    """What the software knows, or the section of the card that says it; None: open."""


@dataclass(frozen=True, slots=True)
class Guideline:
    """A checklist, in its own order."""

    name: str
    citation: str
    items: tuple[Item, ...]

    def describe(self) -> dict[str, Any]:
        """Return it ready for JSON."""
        return asdict(self)


CLAIM = Guideline(
    "CLAIM 2024",
    "Tejani et al., Radiology: Artificial Intelligence 2024;6(4):e240300",
    (
        Item("1", "AI named in the title, with its kind", "Deep learning: see Classifier."),
        Item("2", "Structured summary"),
        Item("3", "Background and intended role", "In part: see Use."),
        Item("4", "Aims and hypotheses"),
        Item("5", "Prospective or retrospective"),
        Item("6", "Goal of the study"),
        Item("7", "Sources of the data", "In part: see Data."),
        Item("8", "Who and what was included", "In part: see Data, of scans that were rejected."),
        Item("9", "Preprocessing", "See Classifier, and the augmentation fields in Training."),
        Item("10", "Choice of a subset", "In part: every readable scan of the data set was used."),
        Item("11", "De-identification"),
        Item("12", "Missing data", "In part: scans that cannot be read are counted in Data."),
        Item("13", "Acquisition of the images"),
        Item("14", "Reference standard", "In part: the class that the data set gives each scan."),
        Item("15", "Why this reference standard"),
        Item("16", "Who annotated"),
        Item("17", "Annotation of the test set"),
        Item("18", "Agreement of annotators"),
        Item("19", "How the data were split", "See Data."),
        Item("20", "What no two partitions share", "See Data: groups of near-identical slices."),
        Item("21", "Planned sample size"),
        Item("22", "The model in detail", "See Classifier."),
        Item("23", "Libraries and versions", "See Software."),
        Item("24", "Where the weights started", "See Training."),
        Item("25", "How it was trained", "See Training."),
        Item("26", "How the final model was chosen", "See Training."),
        Item("27", "Ensembling", "None: one network."),
        Item("28", "Measures of performance", "See Results."),
        Item("29", "Uncertainty", "See Results: bootstrap over groups."),
        Item("30", "Robustness", "In part: see Results, of images without a near duplicate."),
        Item("31", "Explainability", "In part: class activation maps exist; none was judged here."),
        Item("32", "Evaluation on internal data", "See Results."),
        Item("33", "Testing on external data", "In part: this run judged no other data set."),
        Item("34", "Registration as a trial"),
        Item("35", "Numbers included and excluded", "In part: scans in Data; patients not known."),
        Item("36", "Demographics of each partition"),
        Item("37", "Performance, with uncertainty", "See Results."),
        Item("38", "Diagnostic accuracy, with precision", "See Results."),
        Item("39", "Analysis of mistakes", "In part: see Results; report.html shows the worst."),
        Item("40", "Limitations", "In part: see Known limits."),
        Item("41", "What it means for practice", "In part: see Use."),
        Item("42", "Full protocol or details", "In part: every setting is in Training."),
        Item("43", "Availability of software, model and data", "In part: see Software."),
        Item("44", "Funding, and the funders' role"),
    ),
)
"""44 items."""

TRIPOD_AI = Guideline(
    "TRIPOD+AI",
    "Collins et al., BMJ 2024;385:e078378",
    (
        Item("1", "Title"),
        Item("2", "Abstract"),
        Item("3a", "Medical context and rationale"),
        Item("3b", "Target population, purpose and users", "In part: see Use."),
        Item("3c", "Known health inequalities"),
        Item("4", "Objectives"),
        Item("5a", "Sources of the data", "In part: see Data."),
        Item("5b", "Dates of the data"),
        Item("6a", "Setting and centres"),
        Item("6b", "Eligibility", "In part: see Data, of scans that were rejected."),
        Item("6c", "Treatments"),
        Item("7", "Preparation and checks of the data", "In part: see Classifier and Data."),
        Item("8a", "Outcome", "In part: one of the classes in Classifier."),
        Item("8b", "Who assessed the outcome"),
        Item("8c", "Blinding of that assessment"),
        Item("9a", "Choice of predictors", "The pixels of one slice, and nothing else."),
        Item("9b", "Definition of the predictors", "See Classifier."),
        Item("9c", "Who assessed the predictors", "Nobody: they are pixels."),
        Item("10", "Sample size"),
        Item("11", "Missing data", "Scans that cannot be read are left out, and counted in Data."),
        Item("12a", "Use and partition of the data", "See Data."),
        Item("12b", "Handling of the predictors", "See Classifier."),
        Item("12c", "Model, building, tuning, internal validation", "See Classifier and Training."),
        Item("12d", "Heterogeneity over clusters"),
        Item("12e", "Measures of performance", "See Results."),
        Item("12f", "Updating", "In part: see Calibration, abstention, outsiders."),
        Item("12g", "How predictions were calculated", "By the weights in this folder, sealed."),
        Item("13", "Class imbalance", "In part: the field optimisation.class_weights in Training."),
        Item("14", "Fairness"),
        Item("15", "Output of the model", "See Classifier."),
        Item("16", "Training and evaluation data compared", "In part: counts in Data."),
        Item("17", "Ethical approval"),
        Item("18a", "Funding"),
        Item("18b", "Conflicts of interest"),
        Item("18c", "Protocol"),
        Item("18d", "Registration"),
        Item("18e", "Data sharing"),
        Item("18f", "Code sharing", "In part: its revision is in Software."),
        Item("19", "Patient and public involvement"),
        Item("20a", "Flow of participants", "In part: scans in Data; participants not known."),
        Item("20b", "Characteristics of participants"),
        Item("20c", "Their distribution against development", "In part: classes in Data."),
        Item("21", "Numbers in each analysis", "In part: scans in Data and Results."),
        Item("22", "The full model", "The weights and classifier.json in this folder."),
        Item("23a", "Performance, with intervals", "In part: see Results; no subgroups."),
        Item("23b", "Heterogeneity of performance"),
        Item("24", "Results of updating", "In part: see Calibration, abstention, outsiders."),
        Item("25", "Interpretation"),
        Item("26", "Limitations", "In part: see Known limits."),
        Item("27a", "Poor or missing input", "In part: what cannot be read is rejected."),
        Item("27b", "What users must do and know", "In part: see Use."),
        Item("27c", "Next steps"),
    ),
)
"""52 items and subitems."""
