"""Will it fit, how long, how much: a run's steps compiled for devices that need not be there.

    python -m gemma_lora.plan --config configs/x.py --topology v5e:2x2,v5e:4x4,v5p:2x2x1
        [--examples N] [--prices FILE] [--largest] [--leaves] [--json] [--config.key=value ...]

needs the package libtpu and no TPU; --topology cpu:8 takes eight devices of this host. It reads
neither weights nor data sets (it counts those of data.path, data.validation_path, generated:N).
A price file:
{"source": "https://...", "date": "2026-01-31", "currency": "USD", "chip_hour": {"v5e": 1.2}}.
"""

import datetime
import json
import pathlib
from typing import Any, NamedTuple

import jax
from absl import flags

from gemma_lora import ahead
from gemma_lora.arch import Arch, get_arch
from gemma_lora.attention import chosen, splits_heads
from gemma_lora.config import parse_flags
from gemma_lora.data import sources
from gemma_lora.data.examples import held_out
from gemma_lora.data.pipeline import in_steps, total_steps
from gemma_lora.errors import UserError, nearest, run_main
from gemma_lora.sharding import bytes_a_device, check_rows, leaves, make_mesh, unsplit

GIB = 2**30


class Chip(NamedTuple):
    """A chip's peaks, as its maker states them."""

    hbm: int  # bytes
    flops: float  # a second, bfloat16
    traffic: float  # bytes a second from and to HBM
    sent: float  # bytes a second to other chips, over all links
    source: str


CHIPS = {
    "v5e": Chip(16 * GIB, 197e12, 819e9, 200e9, "https://docs.cloud.google.com/tpu/docs/v5e"),
    "v5p": Chip(95 * GIB, 459e12, 2765e9, 600e9, "https://docs.cloud.google.com/tpu/docs/v5p"),
    "v6e": Chip(32 * GIB, 918e12, 1600e9, 400e9, "https://docs.cloud.google.com/tpu/docs/v6e"),
}
ASSUMPTIONS = (
    "step: the longest of products, HBM traffic and collectives, each at the chip's stated peak "
    "and all at once; a real step takes longer",
    "products: those of the compiled program, loops counted in full; the attention kernel's by the "
    "pairs of positions that see each other",
    "HBM: what the program's operations read and write; sent: by the algorithm on a ring, over all "
    "links of the chip, each way",
    "hours: every row full, one example a row; evaluations among them; no start, no compilation, "
    "no waiting for data",
)
HELD = ("arguments", "temporaries", "outputs", "code")  # the bytes that a program takes


class Job(NamedTuple):
    """What is planned: a config on one topology."""

    arch: Arch
    config: Any
    topology: str

    @property
    def chip(self) -> Chip | None:
        return CHIPS.get(self.topology.partition(":")[0])


def plan(job: Job, examples: int | None, prices: dict[str, Any] | None) -> dict[str, Any]:
    """One row of the table. `error`: why the config cannot run on the topology, and nothing else.

    examples: rows that are trained on and held out, None: not known. Bytes, floating point
    operations and seconds are of one device and one step.
    """
    data, chip = job.config.data, job.chip
    row: dict[str, Any] = {"topology": job.topology}
    try:
        mesh = _mesh(job)
        check_rows(data.batch_size, mesh, job.config.train.micro_batches)
        dtype = jax.numpy.dtype(job.config.dtype)
        attention = chosen(job.config.attention, job.arch, dtype, (data.seq_len,), mesh)
    except UserError as e:
        return row | {"error": str(e)}
    trees = ahead.shapes(job.arch, job.config, mesh, data.batch_size, data.seq_len)
    model = ahead.abstract(job.arch, job.config, mesh)
    row |= {
        "devices": mesh.size,
        "mesh": dict(mesh.shape),
        "batch": [data.batch_size, data.seq_len],
        "attention": attention,
        "head": f"swept in chunks of {job.config.head.chunk} words",
        "whole": unsplit(model, mesh),
        "trees": {k: sum(map(bytes_a_device, jax.tree.leaves(v))) for k, v in trees.items()},
        "hbm": chip and chip.hbm,
    }
    size = data.batch_size
    row["train"] = _facts(job, mesh, size, "train")
    row["peak"] = _peak(row["train"])
    row["fits"] = None if chip is None else row["peak"] <= chip.hbm and not _refused(row["train"])
    if _refused(row["train"]):
        return row
    row["eval"] = _facts(job, mesh, size, "eval")
    # While an evaluation runs, the optimizer's state is held, too.
    state = row["trees"]["state"] - _lora(trees)
    row["eval_peak"] = _peak(row["eval"]) + (0 if _refused(row["eval"]) else state)
    if chip:
        row["fits"] &= row["eval_peak"] <= chip.hbm and not _refused(row["eval"])
        row |= _time(job, mesh, row, chip, examples, prices)
    return row


def _mesh(job: Job):
    return make_mesh(job.config.mesh, ahead.devices_of(job.topology))


def _lora(trees: dict[str, Any]) -> int:
    return sum(map(bytes_a_device, jax.tree.leaves(trees["state"].lora)))


def _facts(job: Job, mesh: Any, rows: int, step: str) -> dict[str, Any]:
    length = job.config.data.seq_len
    return ahead.facts(job.arch, job.config, job.topology, mesh, rows, length, step)


def _refused(facts: dict[str, Any]) -> bool:
    return "too_large" in facts


def _peak(facts: dict[str, Any]) -> int:
    if _refused(facts):
        return facts["needs"]
    return sum(facts[k] for k in HELD)


def _chip(job: Job) -> Chip:
    if job.chip is None:
        _mesh(job)  # says so where there is no such topology
        raise UserError(f"--largest: the memory of a {job.topology} is not known")
    return job.chip


def largest(job: Job) -> dict[str, Any]:
    """The most rows a device that fit a training step: {'rows': fits, 'too_many': does not}.

    Between two sizes whose memory is known it compiles where a line through them meets the chip's
    memory, and in the middle, in turn, until they are neighbours.
    """
    mesh, chip = _mesh(job), _chip(job)
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    unit = ways * job.config.train.micro_batches  # what the rows of a batch must divide by
    known: dict[int, int] = {}

    def fits(units: int) -> bool:
        found = _facts(job, mesh, units * unit, "train")
        known[units] = _peak(found)
        return known[units] <= chip.hbm and not _refused(found)

    low, high = 0, max(1, job.config.data.batch_size // unit)
    while fits(high):
        low, high = high, 2 * high
    along = True
    while high - low > 1:
        at = (low + high) // 2
        if along and low:
            slope = (known[high] - known[low]) / (high - low)
            at = low + int((chip.hbm - known[low]) / slope) if slope > 0 else at
        along = not along  # in turn with halving, as memory is no line where programs differ
        at = min(max(at, low + 1), high - 1)
        low, high = (at, high) if fits(at) else (low, at)
    each = unit // ways
    return {"rows": low * each, "too_many": high * each, "peak": known.get(low), "ways": ways}


def _time(
    job: Job, mesh: Any, row: dict[str, Any], chip: Chip, examples: int | None, prices: Any
) -> dict[str, Any]:
    config, arch = job.config, job.arch
    rows, length = row["batch"]
    bounds = {}
    for step in ahead.STEPS:
        if _refused(row[step]):
            return {}
        at_once = ahead.rows_at_once(config, rows)
        flops = row[step]["flops"] + _attention_flops(row[step], arch, mesh, at_once, length)
        row[step]["flops"], row[step]["sent_bytes"] = flops, sum(row[step]["sent"].values())
        bounds[step] = {
            "products": flops / chip.flops,
            "HBM": row[step]["traffic"] / chip.traffic,
            "collectives": row[step]["sent_bytes"] / chip.sent,
        }
    seconds = {k: max(v.values()) for k, v in bounds.items()}
    out: dict[str, Any] = {
        "seconds": seconds,
        "bounds": bounds,
        "bound": max(bounds["train"], key=bounds["train"].get),
        "tokens_a_second": rows * length / seconds["train"],
        "hours": None,
        "money": None,
    }
    if examples is None:
        return out
    steps, evals = _steps(config, examples)
    out["steps"], out["eval_steps"] = steps, evals
    out["hours"] = (steps * seconds["train"] + evals * seconds["eval"]) / 3600
    price = prices and prices["chip_hour"].get(job.topology.partition(":")[0])
    if price is not None:
        out["money"] = out["hours"] * mesh.size * price
    return out


def _attention_flops(facts: dict[str, Any], arch: Arch, mesh: Any, rows: int, length: int) -> float:
    """Of the splash kernels, mean over the layers' local and global ones."""

    def pairs(back: int) -> int:
        return sum(min(i + 1, back) for i in range(length))

    seen = [pairs(arch.window if local else length) for local in arch.is_local]
    sizes = ahead.letter_sizes(arch, mesh, rows, length)
    split = splits_heads(arch.kv_heads, mesh.shape["tensor"])
    heads = sizes["N"] if split else arch.heads
    each = 2 * sum(seen) / len(seen) * sizes["B"] * heads * arch.head_dim
    return facts["attention"] * each


def _steps(config: Any, examples: int) -> tuple[int, int]:
    """(training steps, evaluation steps) of a run to its end, early stopping aside.

    An evaluation takes the validation set, and the probe of the training set or, for the ledger,
    all of it.
    """
    data, train = config.data, config.train
    held, fit = held_out(examples, data.validation_fraction), examples
    if data.validation_path:
        source, path = sources.divided(data.validation_path)
        if source.startswith("tfds:"):
            raise UserError(
                f"data.validation_path {source}: plan fetches no data set; give a file of as many "
                "rows, or generated:N"
            )
        held = len(sources.read(source, path, data.limit))
    else:
        fit = examples - held
    each, size = max(1, -(-fit // data.batch_size)), train.eval_examples
    total = total_steps(train, each)

    def at(every: int) -> set[int]:
        return {0, *range(every, total, every), total} if every else set()

    def batches(n: int) -> int:
        return -(-(min(n, size) if size else n) // data.batch_size)

    ledgers = at(in_steps(train.ledger_every, each))
    evals = at(in_steps(train.eval_every, each)) | ledgers
    probed = len(evals - ledgers)
    # The probe is as large as the validation set, where the training set is.
    probe = batches(min(held, fit))
    return total, len(evals) * batches(held) + probed * probe + len(ledgers) * each


def count_examples(config: Any) -> int | None:
    """The rows of the config's data; None where they would have to be fetched."""
    data = config.data
    if not data.path and not data.source.startswith("generated:"):
        return None
    return len(sources.read(data.source, data.path, data.limit))


def read_prices(path: str) -> dict[str, Any]:
    """The price file; UserError for one that lacks what a price needs to be believed."""
    try:
        found = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
        datetime.date.fromisoformat(found["date"])
        good = all(isinstance(found[k], str) and found[k] for k in ("source", "currency"))
        chips = found["chip_hour"]
        good = good and all(isinstance(v, int | float) and v >= 0 for v in chips.values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise UserError(f"price file {path}: {type(e).__name__}: {e}; {_PRICES}") from e
    if not good:
        raise UserError(f"price file {path}: {_PRICES}")
    if unknown := sorted(set(chips) - set(CHIPS)):
        raise UserError(f"price file {path}: chip {unknown[0]!r}, {nearest(unknown[0], CHIPS)}")
    return found


_PRICES = (
    "expected source, date (year-month-day) and currency as texts, and chip_hour: "
    '{"v5e": price of a chip and hour}'
)


def table(rows: list[dict[str, Any]], prices: dict[str, Any] | None) -> str:
    """The rows as text: one line a topology, then what the columns leave out."""
    memory = "GiB a chip = arguments + temporaries + outputs + code"
    heads = ["topology", "fits", memory, "eval GiB", "TFLOP", "HBM GB", "sent GB", "step ms",
             "tokens/s", "hours", "money"]  # fmt: skip
    lines, notes = [heads], []
    for row in rows:
        name = row["topology"]
        if "error" in row:
            lines.append([name, "cannot run: below"])
            notes.append(f"{name}: {row['error']}")
            continue
        if _refused(row["train"]):
            over = row["peak"] - row["train"]["available"]
            lines.append([name, f"no, by {over / GIB:.2f} GiB", f"{row['peak'] / GIB:.2f}"])
            notes.append(f"{name}: the compiler: {row['train']['too_large']}")
        else:
            lines.append(_cells(row, prices))
        trees = ", ".join(f"{k} {v / GIB:.3f}" for k, v in row["trees"].items())
        if padding := row["train"].get("padding"):
            trees += f", padding to the chip's tiles {padding / GIB:.3f}"
        notes += [
            f"{name}: {row['devices']} devices, mesh "
            f"{', '.join(f'{a}={n}' for a, n in row['mesh'].items())}; batch "
            f"{row['batch'][0]} x {row['batch'][1]}; attention {row['attention']}; head "
            f"{row['head']}; sharded trees, GiB a device: {trees}",
            *(f"{name}: whole on each device: {what}" for what in row["whole"]),
        ]
        if loops := row["train"].get("unknown_loops"):
            notes.append(
                f"{name}: {loops} loops as long as the data say, counted once: products, traffic "
                "and times are the least"
            )
        if host := row["train"].get("host"):
            notes.append(
                f"{name}: {host / GIB:.2f} GiB a device go to the host's memory and back in every "
                "training step, in a time that no bound holds"
            )
        if sent := row["train"].get("sent"):
            kinds = ", ".join(f"{k} {v / 1e9:.3f}" for k, v in sorted(sent.items()) if v)
            notes.append(f"{name}: sent GB a training step: {kinds or 'nothing'}")
        if found := row.get("largest"):
            notes.append(
                f"{name}: the largest batch: {found['rows']} rows a device x {found['ways']} "
                f"({found['too_many']} do not fit)"
            )
    width = [max(len(x[i]) for x in lines if i < len(x)) for i in range(len(heads))]
    text = ["  ".join(c.ljust(w) for c, w in zip(x, width, strict=False)).rstrip() for x in lines]
    chips = {k: v for k, v in CHIPS.items() if any(r["topology"].startswith(k) for r in rows)}
    notes += [
        f"{k}: {v.hbm / GIB:.0f} GiB, {v.flops / 1e12:.0f} TFLOP/s, {v.traffic / 1e9:.0f} and "
        f"{v.sent / 1e9:.0f} GB/s, by {v.source}"
        for k, v in chips.items()
    ]
    notes += [f"{x}" for x in ASSUMPTIONS]
    if prices:
        notes.append(f"prices: {prices['source']}, {prices['date']}")
    return "\n".join([*text, "", *notes])


def _cells(row: dict[str, Any], prices: dict[str, Any] | None) -> list[str]:
    train, chip = row["train"], row["hbm"]
    parts = " + ".join(f"{train[k] / GIB:.2f}" for k in HELD)
    room = row["eval"].get("available", chip or 0)  # what the compiler counts with is less
    over = max(row["peak"] - (chip or 0), row["eval_peak"] - room)
    fits = (
        "memory not known" if chip is None else "yes" if row["fits"] else f"no, by {over / GIB:.2f}"
    )
    cells = [row["topology"], fits, f"{row['peak'] / GIB:.2f} = {parts}"]
    cells += [f"{row['eval_peak'] / GIB:.2f}", f"{train['flops'] / 1e12:.3f}"]
    cells += [f"{train['traffic'] / 1e9:.1f}", f"{sum(train['sent'].values()) / 1e9:.2f}"]
    if "seconds" not in row:
        return [*cells, "no peaks known"]
    hours, money = row["hours"], row["money"]
    cells += [f"{1e3 * row['seconds']['train']:.1f} ({row['bound']})"]
    cells += [f"{row['tokens_a_second']:,.0f}"]
    cells += ["--examples not given" if hours is None else f"{hours:.3f}"]
    unknown = "no price" if hours is not None else "no price" if not prices else "no hours"
    return [*cells, unknown if money is None else f"{money:.2f} {prices['currency']}"]


def main() -> None:
    # Defined here: tests import this module beside others and must not take these flags.
    flags.DEFINE_list("topology", None, "Topologies: v5e:2x2,v5p:2x2x1 or cpu:8.")
    flags.DEFINE_integer("examples", None, "Examples of the data set, where it is not read.", 1)
    flags.DEFINE_string("prices", None, "A file of dated prices a chip and hour.")
    flags.DEFINE_bool("largest", False, "Also search the largest batch that fits: more compiles.")
    flags.DEFINE_bool("leaves", False, "Print every leaf's partition and bytes; compile nothing.")
    flags.DEFINE_bool("json", False, "Print JSON instead of the table.")
    config = parse_flags(("config", "topology"))
    asked = flags.FLAGS
    jax.config.update("jax_platforms", "cpu")  # nothing is run; a TPU that is here stays free
    if hosts := max(map(ahead.host_devices, asked.topology)):
        jax.config.update("jax_num_cpu_devices", hosts)
    if config.arch == "auto":
        raise UserError("arch is 'auto', which the weights would say; give --config.arch")
    jobs = [Job(get_arch(config.arch), config, topology) for topology in asked.topology]
    if asked.leaves:
        for job in jobs:
            mesh, data = _mesh(job), config.data
            check_rows(data.batch_size, mesh, config.train.micro_batches)
            trees = ahead.shapes(job.arch, config, mesh, data.batch_size, data.seq_len)
            print(f"{job.topology}: bytes a device", *leaves(trees), sep="\n")
        return
    for job in jobs if asked.largest else ():
        _chip(job)  # before minutes of compiling
    prices = read_prices(asked.prices) if asked.prices else None
    examples = asked.examples or count_examples(config)
    if examples and config.data.limit:
        examples = min(examples, config.data.limit)
    if examples and any(job.chip for job in jobs):
        _steps(config, examples)  # may refuse the validation file
    rows = []
    for job in jobs:
        rows.append(plan(job, examples, prices))
        if asked.largest and "error" not in rows[-1]:
            rows[-1]["largest"] = largest(job)
    failed = [f"{row['topology']} cannot run: {row['error']}" for row in rows if "error" in row]
    if asked.json:
        print(json.dumps({"rows": rows, "assumptions": ASSUMPTIONS, "prices": prices}, indent=2))
    elif len(failed) < len(rows):
        print(table(rows, prices))
    if len(failed) == len(rows):
        raise UserError("; ".join(failed))


if __name__ == "__main__":
    run_main(main)
