"""Confident learning (Northcutt 2021): label errors, estimated from out-of-fold probabilities.

By cleanlab, of the extra 'clean'. Its label quality is p of the label, which orders examples as
the score fold_label does; what it adds is the confident joint and the threshold of each class.
Letters: n examples, k labels.
"""

import dataclasses
import importlib.util
import pathlib

import numpy as np

from gemma_lora.errors import UserError, extra
from gemma_lora.evaluate import column_names, read_table


@dataclasses.dataclass(frozen=True)
class Issues:
    """Of the labelled examples: which labels are doubted, and by which counts.

    known: how many have a label and finite probabilities; issue [n] bool; joint [k,k], rows the
    given labels: examples confidently of the column's label;
    thresholds [k]: the mean p of a label over its own examples.
    """

    known: int
    issue: np.ndarray
    joint: np.ndarray
    thresholds: np.ndarray


def find(label: np.ndarray, p: np.ndarray) -> Issues:
    """Label issues of label [n] (-1: none) and out-of-fold probabilities p [n,k].

    An example is one where it counts off the diagonal of the joint: of the labels whose p reaches
    the label's threshold, the likeliest is not its own. Where several reach theirs, cleanlab takes
    the likeliest of all labels, which from three labels on may be one that does not. Raises
    UserError without cleanlab, or where a label has no example.
    """
    if not importlib.util.find_spec("cleanlab"):
        raise UserError(f"confident learning takes cleanlab; run: {extra('clean')}")
    from cleanlab import count  # takes seconds, with pandas and scikit-learn

    known = (label >= 0) & np.isfinite(p).all(1)
    if absent := set(range(p.shape[1])) - set(label[known].tolist()):
        raise UserError(f"confident learning takes examples of every label; none of {absent}")
    joint, rows = count.compute_confident_joint(
        label[known], p[known], calibrate=False, return_indices_of_off_diagonals=True
    )
    issue = np.zeros(len(label), bool)
    issue[np.flatnonzero(known)[rows]] = True
    thresholds = count.get_confident_thresholds(label[known], p[known])
    return Issues(int(known.sum()), issue, joint, thresholds)


def read(workdir: pathlib.Path, ids: np.ndarray) -> np.ndarray:
    """[n,k] out-of-fold probabilities of the labels, in the order of ids; UserError: why not."""
    path = workdir / "folds" / "scores.parquet"
    if not path.exists():
        raise UserError("confident learning takes the run's folds: python -m gemma_lora.folds")
    if "label_p" not in column_names(path):
        raise UserError(f"{path.parent} is of an earlier version: remove it and make folds again")
    table = read_table(path, ("id", "label_p"))
    p = dict(zip(table["id"].to_pylist(), table["label_p"].to_pylist(), strict=True))
    return np.array([p[i] for i in ids], float)
