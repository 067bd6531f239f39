"""Losses by token: what is shown of an example, and the format and content of GSM8K's answers."""

import re
from typing import Any

import numpy as np

from gemma_lora.errors import UserError
from gemma_lora.report.reading import Workdir

SHOWN_TOKENS, SHOWN_WORST = 400, 3  # of an example: tokens in its heat map, and by name
FORMAT = re.compile("<<|>>|####")


def detailed(w: Workdir, split: str, step: int, ids: list[str]) -> dict[str, dict[str, Any]]:
    """id -> completion: index of its first character; prompt_has_loss; pieces and token_nll: its
    first loss tokens and their losses at an eval, in nats; worst_tokens: those with the largest
    loss, [text, nats]. These three are None in a ledger without pieces.
    """
    losses, texts = w.token_losses(split, step, ids), w.pieces(split, ids)
    found: dict[str, dict[str, Any]] = {}
    for i in ids:
        example = w.examples[split][i]
        found[i] = {
            "completion": example["completion"],
            "prompt_has_loss": example["prompt_targets"] > 0 or _cut(w, example),
            "pieces": None, "token_nll": None, "worst_tokens": None, "tokens_left_out": 0,
        }  # fmt: skip
        if i in texts:
            pieces, nll = _checked(w, i, texts[i], losses[i])
            worst = np.argsort(-nll, kind="stable")[:SHOWN_WORST]
            found[i] |= {
                "pieces": pieces[:SHOWN_TOKENS],
                "token_nll": [round(float(x), 4) for x in nll[:SHOWN_TOKENS]],
                "tokens_left_out": max(0, len(pieces) - SHOWN_TOKENS),
                "worst_tokens": [[pieces[k], round(float(nll[k]), 4)] for k in worst],
            }
    return found


def _cut(w: Workdir, example: dict[str, Any]) -> bool:
    """Was the row cut before its completion, so that the tokens with loss are all the prompt's?"""
    return (
        w.config["data"]["loss_on"] == "all"
        and example["completion"] > 0
        and example["prompt_targets"] == 0
    )


def _checked(
    w: Workdir, name: str, pieces: np.ndarray, nll: np.ndarray
) -> tuple[list[str], np.ndarray]:
    if len(pieces) != len(nll):
        raise UserError(
            f"{w.path / 'ledger'}: example {name} has the texts of {len(pieces)} tokens, but the "
            f"losses of {len(nll)}; the files are of different runs"
        )
    return list(pieces), np.asarray(nll, np.float64)


def is_format(pieces: list[str]) -> np.ndarray:
    """[tokens]: does the token hold a character of `<<`, `>>` or `####`.

    These are what GSM8K's answers (Cobbe et al. 2021, arXiv:2110.14168) add to what a person would
    write: the brackets of a calculator annotation, as in `48/2 = <<48/2=24>>24`, and the marker of
    the final answer, `#### 72`. All else is content: the annotation's own sum, the answer's number
    and the end of the text.
    """
    ends = np.cumsum([len(p) for p in pieces])
    starts = ends - [len(p) for p in pieces]
    out = np.zeros(len(pieces), bool)
    for match in FORMAT.finditer("".join(pieces)):
        out |= (starts < match.end()) & (ends > match.start())
    return out


def format_columns(w: Workdir, ids: list[str], steps: tuple[int, int]) -> dict[str, Any] | None:
    """Of the completions of GSM8K's kind among the validation examples, in the order of `ids`.

    tokens [n,2]: of format and of content; nll [n,2,2]: their summed losses in nats, at each of
    two evals. Zero for other examples. None where no completion holds '####'; {} where the ledger
    has no texts of tokens.
    """
    examples = w.examples["validation"]
    of_kind = [
        i
        for i in ids
        if "####" in examples[i]["text"][examples[i]["completion"] :] and not _cut(w, examples[i])
    ]
    if not of_kind:
        return None
    if not w.has_pieces:
        return {}
    texts = w.pieces("validation", of_kind)
    evals = [w.token_losses("validation", step, of_kind) for step in steps]
    tokens, nll = np.zeros((len(ids), 2)), np.zeros((len(ids), 2, 2))
    place = {i: n for n, i in enumerate(ids)}
    for i in of_kind:
        begin = examples[i]["prompt_targets"]
        for e, losses in enumerate(evals):
            pieces, each = _checked(w, i, texts[i], losses[i])
            marked = is_format(pieces[begin:])
            for k, chosen in enumerate((marked, ~marked)):
                nll[place[i], e, k] = each[begin:][chosen].sum()
                tokens[place[i], k] = chosen.sum()
    return {"tokens": tokens, "nll": nll, "examples": len(of_kind)}
