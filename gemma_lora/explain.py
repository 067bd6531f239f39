"""Why examples are suspicious: a category for each, and what the flagged ones have in common."""

import pathlib
from typing import Any

import numpy as np

from gemma_lora import confident, traits
from gemma_lora.errors import UserError

WORST = 0.05  # a score is a reason where the example is in its highest share of this size

# The first category of which an example has a reason. Reasons are the rules that it breaks, the
# scores that put it among the WORST, and the two that LABEL_REASONS explain.
LABEL_REASONS = {
    "label_issue": "confident learning doubts the label",
    "other_label": "the likeliest other label of every eval has on average the larger p",
}
CATEGORIES: dict[str, tuple[str, ...]] = {
    "in training and validation": ("overlap",),
    "same prompt, another answer": ("conflict",),
    "duplicate": ("duplicate", "near_duplicate"),
    "a sum that does not hold": ("arithmetic",),
    "the answer does not follow from its steps": ("final_answer",),
    "empty": ("empty",),
    "the label contradicts the model": ("label_issue", "other_label"),
    "truncated": ("cut", "unfinished"),
    "unusual length": ("length",),
    "hard: high loss": ("fold_loss", "fold_label", "label_loss", "loss", "length_z", "seen_loss"),
    "the prompt does not help to foresee the answer": ("ifd",),
    "the answer does not begin as the prompt asks": ("opening_loss",),
    "loss fell little or rose": ("not_learnt",),
    "learnt late": ("confidence", "correctness", "aum", "label_aum", "el2n"),
    "forgotten": ("forgetting",),
    "a single surprising token": ("token_max",),
    "pulls the adapters elsewhere": ("grad_norm", "grad_misfit"),
    "prompt fills the length": ("full_prompt",),
    "no single reason": (),
}


def category(reasons: set[str]) -> str:
    """The first of CATEGORIES that one of the reasons stands for."""
    return next((k for k, of in CATEGORIES.items() if reasons.intersection(of)), [*CATEGORIES][-1])


def explain(
    workdir: pathlib.Path,
    examples: list[dict[str, Any]],
    columns: dict[str, np.ndarray],
    ranks: dict[str, np.ndarray],
    broken: dict[str, dict[str, str]],
    worst: np.ndarray,
) -> tuple[list[str], list[str]]:
    """(the category of every example, the lines of outliers.md on what the worst share).

    examples, the columns and their ranks are in id order; worst: indices.
    """
    label = np.array([e["label"] for e in examples])
    doubted, lines = np.zeros(len(label), bool), []
    if (label >= 0).any():
        try:
            found = confident.find(label, confident.read(workdir, columns["id"]))
            doubted, lines = found.issue, _confident(found, _words(examples))
        except UserError as e:
            lines = ["", "# Confident learning", "", f"Not computed: {e}."]
    categories = []
    for i, example in enumerate(columns["id"]):
        reasons = {k for k, x in ranks.items() if x[i] > 1 - WORST} | broken.get(example, {}).keys()
        reasons |= {"label_issue"} if doubted[i] else set()
        other = "label_aum" in columns and columns["label_aum"][i] > 0
        categories.append(category(reasons | {"other_label"} if other else reasons))
    shared = _shared(examples, worst, categories)
    return categories, [*_categories(categories, worst), *shared, *lines]


def _categories(categories: list[str], worst: np.ndarray) -> list[str]:
    lines = ["", f"# Categories of the {len(worst)} most suspicious", ""]
    lines += [
        "An example's category is the first below that it has a reason for: a rule that it breaks, "
        f"or a score by which its rank is in the highest {WORST:.0%}, of which there is always one "
        "(equal ones share theirs).",
        "",
        *(f"- `{k}`: {why}" for k, why in LABEL_REASONS.items()),
        "",
        "| category | reasons | most suspicious | all |",
        "| --- | --- | --- | --- |",
    ]
    mine = [categories[i] for i in worst]
    return lines + [
        f"| {k} | {', '.join(of)} | {mine.count(k)} | {categories.count(k)} |"
        for k, of in CATEGORIES.items()
        if k in categories
    ]


def _words(examples: list[dict[str, Any]]) -> dict[int, str]:
    return {e["label"]: e["answer"].strip() for e in examples if e["label"] >= 0}


def _shared(examples: list[dict[str, Any]], worst: np.ndarray, categories: list[str]) -> list[str]:
    """Traits and clusters of the worst against all others."""
    flagged = np.zeros(len(examples), bool)
    flagged[worst] = True
    features = traits.measure([(e["prompt"], e["answer"]) for e in examples])
    words = _words(examples)
    labels = np.array([e["label"] for e in examples])
    features |= {f"label {code(words[k])}": labels == k for k in sorted(words)}
    tested = traits.lifts(flagged, features)
    certain = [t for t in tested if t.p < 0.05]
    lines = ["", f"# Traits of the {len(worst)} most suspicious", ""]
    lines += [
        f"Of {len(tested)} traits measured, those that they have more or less often than the "
        f"{len(examples) - len(worst)} others, Fisher's exact p below 0.05 after Holm's correction "
        "for all of them. Numbers are cut at the quartiles. Lift is the ratio of the two shares "
        "(Katz's 95 % interval; 0.5 is added to every cell where one side has none).",
        "",
        *(_table(certain) if certain else ["None was found."]),
    ]
    groups = traits.clusters([e["text"] for e in examples], flagged)
    lines += ["", f"# Clusters of the {len(worst)} most suspicious", ""]
    lines += [
        f"Groups of {traits.CLUSTER_LEAST} or more whose texts are on average as alike as the "
        f"closest {traits.CLOSE:.0%} of pairs of others (cosine of TF-IDF). They are made from "
        "their texts, so the p of their traits, as above, describes and does not test.",
        "",
    ]
    for rows, top in groups:
        inside = np.zeros(len(examples), bool)
        inside[rows] = True
        found = [t for t in traits.lifts(inside, features, ~flagged) if t.p < 0.05]
        kinds = ", ".join(sorted({categories[i] for i in rows}))
        lines += [f"- {len(rows)} examples with {', '.join(top)} ({kinds}): "
                  f"{', '.join(code(examples[i]['id']) for i in rows)}"]  # fmt: skip
        lines += ["", *_table(found), ""] if found else []
        certain += found
    lines += [] if groups else ["None was found."]
    return [*lines, "", *_meanings(certain)]


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _table(found: list[traits.Trait]) -> list[str]:
    rows = [
        f"| {_cell(t.name)} | {t.flagged:.0%} | {t.others:.0%} | {t.lift:.2f} "
        f"[{t.interval[0]:.2f}, {t.interval[1]:.2f}] | {t.p:.2g} |"
        for t in found
    ]
    return ["| trait | these | others | lift | p |", "| --- | --- | --- | --- | --- |", *rows]


def _meanings(found: list[traits.Trait]) -> list[str]:
    """What the features that the traits are of count, where that is not their name."""
    names = dict.fromkeys(t.name.partition(": ")[0] for t in found)
    # Two backticks: one is among what a feature counts.
    return [f"- {k}: `` {traits.FEATURES[k][0]} ``" for k in names if k in traits.FEATURES]


def code(text: str) -> str:
    """One line of code in Markdown, which reads nothing else into an id or a text."""
    return f"`{' '.join(text.replace('`', chr(39)).split())}`"


def _confident(found: confident.Issues, words: dict[int, str]) -> list[str]:
    issues = int(found.issue.sum())
    named = [code(words.get(k, str(k))) for k in range(len(found.joint))]
    lines = ["", "# Confident learning", ""]
    lines += [
        f"Of {found.known} labels {issues} ({issues / found.known:.1%}) are doubted out of fold: "
        "of the labels whose p reaches the mean p that they have over their own examples, the "
        "likeliest is another (where several reach theirs, the likeliest of all labels, as "
        "cleanlab has it). The model's own mistakes count, too: with a weak model there are more "
        "of these than label errors.",
        "",
        "Of each given label, the p above which an example counts as confidently of a label, and "
        f"how many are so of {', '.join(named)} (of its own at least 1, as cleanlab counts).",
        "",
        "| given label | threshold | examples confidently of each |",
        "| --- | --- | --- |",
    ]
    rows = zip(found.thresholds, found.joint, strict=True)
    return lines + [
        f"| {_cell(name)} | {t:.3f} | {', '.join(map(str, x))} |"
        for name, (t, x) in zip(named, rows, strict=True)
    ]
