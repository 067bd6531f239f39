"""One run against another: their best evals on the validation examples that both have."""

from typing import Any

import numpy as np

from gemma_lora.config import differences
from gemma_lora.evaluate import label_is_likeliest
from gemma_lora.report.reading import Eval, Workdir
from gemma_lora.stats import FEW, bootstrap, conclusion, interval, mcnemar

SEED = 2  # not those of the run's own splits


def best_of(w: Workdir) -> Eval:
    """The eval whose adapter was kept; the one of step 0 where none was finite in all sets."""
    return next(e for e in w.evals if e.step == (w.run["best_step"] or 0))


def compared(here: Workdir, there: Workdir) -> dict[str, Any]:
    """Differences are this run minus the other, paired by example. `obstacles` says why there are
    none: no example, or examples with other texts or tokens, whose losses mean something else.
    """
    ours, theirs = best_of(here), best_of(there)
    a, b = (e.rows["validation"] for e in (ours, theirs))
    ids, i, j = np.intersect1d(a["id"], b["id"], return_indices=True)
    obstacles = _obstacles(here, there, ids.tolist(), a["tokens"][i], b["tokens"][j])
    cautions = []
    if len(ids) < max(len(a["id"]), len(b["id"])):
        cautions.append(
            f"{len(a['id']) - len(ids)} validation examples of this run and "
            f"{len(b['id']) - len(ids)} of the other are left out, the other run lacks them"
        )
    if not obstacles and len(ids) < FEW:
        cautions.append(
            f"they share {len(ids)} validation examples: with fewer than about {FEW} the "
            "intervals are too narrow"
        )
    data = [w.run.get("data_fingerprint") for w in (here, there)]
    if None in data or data[0] != data[1]:
        cautions.append("the two runs did not train and validate on the same data")
    for w, whose in ((here, "this"), (there, "the other")):
        if w.run["status"] != "finished":
            cautions.append(f"{whose} run's status is {w.run['status']!r}")
    out: dict[str, Any] = {
        "workdir": str(there.path), "shared": len(ids), "obstacles": obstacles,
        "cautions": cautions, "config": differences(here.config, there.config),
        "best": [ours.step, theirs.step],
    }  # fmt: skip
    if obstacles:
        return out
    a, b = ({k: x[at] for k, x in rows.items()} for rows, at in ((a, i), (b, j)))
    draws = bootstrap(b, a, SEED)
    tokens = a["tokens"].sum()
    for n, (name, column) in enumerate((("loss", "nll"), ("token_accuracy", "correct"))):
        mean = [float(x[column].sum() / tokens) for x in (a, b)]
        limits = interval(draws[:, n])
        out[name] = {
            "this": mean[0], "other": mean[1], "difference": mean[0] - mean[1], "interval": limits,
            "conclusion": _conclusion(limits, len(ids)),
        }  # fmt: skip
    labelled = (a["label"] >= 0) & (a["label"] == b["label"])
    if labelled.any() and here.config["data"]["labels"] == there.config["data"]["labels"]:
        right = [label_is_likeliest(x)[labelled] for x in (a, b)]
        out["class_accuracy"] = {
            "this": float(right[0].mean()), "other": float(right[1].mean()),
            "only_this_right": int((right[0] & ~right[1]).sum()),
            "only_other_right": int((right[1] & ~right[0]).sum()), "p": mcnemar(right[1], right[0]),
        }  # fmt: skip
    return out


def _conclusion(limits: list[float] | None, n: int) -> str:
    words = (
        "no difference that these examples can show",
        *(f"this run's is {side}, beyond the 95 % interval" for side in ("lower", "higher")),
    )
    return conclusion(limits, n, *words)


def _obstacles(
    here: Workdir, there: Workdir, ids: list[str], ours: np.ndarray, theirs: np.ndarray
) -> list[str]:
    if not ids:
        return ["no validation example has the same id in both runs"]
    texts = [w.examples["validation"] for w in (here, there)]
    other = {
        "text": sum(texts[0][i]["text"] != texts[1][i]["text"] for i in ids),
        "number of loss tokens": int((ours != theirs).sum()),
    }
    if here.has_pieces and there.has_pieces:
        pieces = [w.pieces("validation", ids) for w in (here, there)]
        other["tokens"] = sum(not np.array_equal(pieces[0][i], pieces[1][i]) for i in ids)
    return [f"{n} of {len(ids)} shared examples differ in their {k}" for k, n in other.items() if n]
