"""The training examples of a run that looked at all of them: data map, scores, the worst."""

from typing import Any

import numpy as np

from gemma_lora import outliers
from gemma_lora.evaluate import column_names, read_table
from gemma_lora.report.reading import Workdir
from gemma_lora.report.tokens import detailed

# The training ledger, scores [n] by name, the rules that each example breaks, where both are from.
Scored = tuple[outliers.Ledger, dict[str, np.ndarray], list[list[str]], str]


def scored(w: Workdir) -> Scored | None:
    """The scores of outliers.parquet, or made anew where it is not of what the workdir holds now.

    None where no eval took all training examples.
    """
    if not any(e.whole for e in w.evals):
        return None
    ledger = outliers.read_ledger(w.path)
    path = w.path / "outliers.parquet"
    if path.exists():
        held = column_names(path)
        names = [k for k in outliers.SCORES if k in held and k != "loss"]
        names = ["loss", *names, "combined"]
        table = read_table(path, ("id", "rules", *names))
        ids, loss = table["id"].to_numpy(), table["loss"].to_numpy()
        same = np.array_equal(loss, ledger.loss[-1], equal_nan=True)
        same = same and np.array_equal(ids, ledger.ids)
        more = outliers.read_more(w.path, ids) if same else {}
        made = {k for scores in outliers.MORE.values() for k in scores}
        same = same and made.intersection(names) == more.keys()
        same = same and all(np.array_equal(table[k], x, equal_nan=True) for k, x in more.items())
        if same:
            scores = {k: table[k].to_numpy() for k in names}
            return ledger, scores, table["rules"].to_pylist(), "outliers.parquet"
        source = (
            "the ledger; outliers.parquet is of another eval or other examples, or of other files "
            "of scores than are there, and is not used"
        )
    else:
        source = "the ledger; python -m gemma_lora.outliers also looks for broken rules"
    with np.errstate(invalid="ignore"):  # of losses that are not finite
        scores = outliers.score(w.path, ledger)
    names = [k for k in scores if k not in ("id", "tokens")]
    return ledger, {k: scores[k] for k in names}, [[] for _ in ledger.ids], source


def data_map(ledger: outliers.Ledger) -> dict[str, np.ndarray] | None:
    """Of exp(-loss) over the evals after step 0 the mean [n] and the standard deviation [n], and
    the share of tokens that were the first choice [n] (cartography, Swayamdipta 2020).

    None with fewer than two such evals.
    """
    tuned = [i for i, step in enumerate(ledger.steps) if step > 0]
    if len(tuned) < 2:
        return None
    p = np.exp(-ledger.loss[tuned])
    return {"mean": p.mean(0), "std": p.std(0), "correct": ledger.correct[tuned].mean(0)}


def summary(w: Workdir, found: Scored, top: int) -> dict[str, Any]:
    """Quartiles of every score and the `top` examples with the highest combined rank."""
    ledger, scores, broken, source = found
    shares = {k: outliers.share(x) for k, x in scores.items()}
    worst = np.argsort(-scores["combined"], kind="stable")[:top]
    ids = [ledger.ids[i] for i in worst]
    detail = detailed(w, "train", ledger.steps[-1], ids)
    quantiles = {
        k: np.quantile(x[np.isfinite(x)], [0, 0.25, 0.5, 0.75, 1]).tolist()
        if np.isfinite(x).any()
        else [None] * 5
        for k, x in scores.items()
    }
    return {
        "source": source,
        "examples": len(ledger.ids),
        "evals": ledger.steps,
        "mapped": data_map(ledger) is not None,
        "scores": quantiles,
        "worst": [
            {"id": name, "combined": float(scores["combined"][i]), "tokens": int(ledger.tokens[i]),
             "scores": {k: [float(scores[k][i]), float(shares[k][i])] for k in scores
                        if k != "combined"},
             "rules": broken[i], "text": w.examples["train"][name]["text"], **detail[name]}
            for i, name in zip(worst, ids, strict=True)
        ],
    }  # fmt: skip
