"""LoRA fine-tuning, as one scroll.

    python -m gemma_lora.train --config configs/x.py --workdir DIR [--config.key=value ...]

The same command continues a run that was interrupted, also on another number of devices. On
several hosts each process gets it, with the flags of gemma_lora/distributed.py.
"""

import json
import math
import pathlib
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from gemma_lora import config as configs
from gemma_lora import distributed, evaluate, manifest, report
from gemma_lora.attention import chosen
from gemma_lora.checkpoint import Checkpoints
from gemma_lora.compiled import Compiled, keep_compiled
from gemma_lora.data.dataset import Batch, Dataset
from gemma_lora.data.pipeline import (
    check_files,
    describe,
    in_steps,
    load_data,
    total_steps,
    unshuffled,
)
from gemma_lora.errors import UserError
from gemma_lora.files import path_of, write_text
from gemma_lora.interrupt import Interrupt
from gemma_lora.lora import (
    LoRAConfig,
    check_targets,
    count,
    on_original_base,
    started_from_base,
)
from gemma_lora.metrics import (
    COPY,
    LEDGER,
    STEPS,
    WAIT,
    Metrics,
    Phases,
    Timer,
    banner,
    clock,
    finite,
    peak_memory,
    say,
)
from gemma_lora.optim import optimizer, schedule
from gemma_lora.sharding import (
    check_rows,
    crossing,
    make_mesh,
    replicated,
    to_global,
    unsplit,
)
from gemma_lora.step import init_state, jit_eval_step, jit_train_step
from gemma_lora.weights import peft
from gemma_lora.weights.pretrained import (
    build_model,
    fingerprint,
    load_base,
    not_finite,
    open_weights,
)
from gemma_lora.workdir import claim, forget_after, release, require_space


def main() -> None:
    phases = Phases(imports=True)
    # Defined here: a program that imports this module may have a flag of that name.
    flags.DEFINE_string("workdir", None, "Directory of the run; resumed if it exists.")
    config = configs.parse_flags(("config", "workdir"))
    keep_compiled()
    train(config, path_of(flags.FLAGS.workdir), phases)


def train(config: Any, workdir: pathlib.Path | str, phases: Phases | None = None) -> dict[str, Any]:
    """Runs or resumes the training a config describes; returns the report ({} but on process 0).

    phases: what was spent before; None: nothing. Raises UserError for what the run cannot use and,
    when all is written, for a loss that is not finite; SystemExit(130) where a signal interrupted
    it, which in another thread than the main one none does. The peak memory it records is that of
    the process. compiled.keep_compiled() before it spares later processes the compilation.
    """
    configs.check(config)
    try:
        workdir = path_of(workdir) if isinstance(workdir, str) else workdir
        return _train(config, workdir, phases or Phases())
    finally:
        release()


def _train(config: Any, workdir: pathlib.Path, phases: Phases) -> dict[str, Any]:
    mark = phases.mark

    # ---- what and where -------------------------------------------------------------------------
    plain = configs.to_dict(config)
    wrap = LoRAConfig(**config.lora)
    check_files(config)
    mesh = make_mesh(config.mesh)
    check_rows(config.data.batch_size, mesh, config.train.micro_batches)
    begun = claim(workdir, plain, need_bytes=64 * 2**20)
    with mark("open weights"):
        pretrained = open_weights(
            config.weights, config.arch, config.weights_sha256, config.tokenizer
        )
        tokenizer = pretrained.tokenizer()
    arch = pretrained.arch
    model = build_model(arch, config, wrap, mesh)
    abstract = model.abstract()
    adapted = check_targets(wrap, *nn.unbox((abstract["params"], abstract.get("lora"))))
    peft.check_spelling(wrap, nn.unbox(abstract["lora"]), arch)
    # Three checkpoints of A, B and Adam's two moments, in float32, can be there at once.
    require_space(workdir, 64 * 2**20 + 3 * 12 * count(abstract["lora"]))
    made_with = manifest.facts(config)
    # Another order of the rows, say, would give the processes parts of different batches.
    same = json.dumps([made_with["commit"], made_with["versions"]])
    distributed.agree("the commit and the versions of Python and the packages", same)
    device = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    name = arch.family if config.arch == "auto" else config.arch
    lengths = (config.data.seq_len, *config.data.buckets)
    ranks = dict.fromkeys(f"r {wrap.rank_of(p)} scale {wrap.scale_of(p):g}" for p in adapted)
    banner(
        "model",
        {
            "arch": f"{name}: {count(abstract['params']):,} frozen parameters",
            "weights": f"{config.weights}. {pretrained.notice}".rstrip(". "),
            "adapters": f"{count(abstract['lora']):,} trainable parameters; "
            f"{wrap.variant}, {', '.join(ranks)}, dropout {wrap.dropout:g}, init {wrap.init}",
            "adapted": ", ".join(adapted),
            "dtype": f"{config.dtype}, base matrices {config.quantize or config.dtype}, adapters "
            f"float32; remat {config.remat}",
            "attention": chosen(config.attention, arch, model.dtype, lengths, mesh),
            "devices": f"{device}, mesh {', '.join(f'{a}={n}' for a, n in mesh.shape.items())}"
            f"{crossing(mesh)}; jax {made_with['versions']['jax']}",
            "whole on each device": "; ".join(unsplit(abstract, mesh))
            or "nothing that was to be split",
        },
    )

    # ---- data -----------------------------------------------------------------------------------
    with mark("read data"):
        train_set, validation, probe, counts = load_data(config, tokenizer, arch.vocab)
    steps_per_epoch = train_set.steps_per_epoch
    total = total_steps(config.train, steps_per_epoch)
    every = in_steps(config.train.eval_every, steps_per_epoch)
    ledger_every = in_steps(config.train.ledger_every, steps_per_epoch)
    whole = [unshuffled(train_set, config)] if ledger_every else []
    probe_ids = {e.id for e in probe.examples}
    banner("data", describe(config, train_set, counts, total, every))
    tx = optimizer(config.optim, total)
    # All at once: one that is computed in the loop would wait for the step under way.
    rates = np.broadcast_to(schedule(config.optim, total)(jnp.arange(total)), (total,))

    # ---- weights, adapters, optimizer; or what an earlier run left ------------------------------
    say("\n   loading the weights and compiling ...")
    with mark("load weights"):
        base = load_base(pretrained, model, mesh)
        weights = fingerprint(base)
    state = init_state(model, tx, config.seed, mesh)
    initial = None
    if wrap.reads_base:
        say(f"   starting {wrap.variant}, init {wrap.init}, from the base weights ...")
        with mark("start adapters"):
            # Also where a run continues: what PiSSA leaves of the base is made anew.
            base, lora = jax.block_until_ready(started_from_base(wrap, base, state.lora))
        state = state.replace(lora=lora)
        if wrap.changes_base:
            initial = jax.tree.map(jnp.copy, lora)
    checkpoints = Checkpoints(workdir / "checkpoints")
    notes: dict[str, Any] = {
        "data": train_set.fingerprint() + validation.fingerprint(),
        "weights": weights,
        "best_loss": math.inf,
        "best_step": None,
        "bad_evals": 0,
        "eval_due": False,  # of this step: it was interrupted
        "seconds": 0.0,
        "tokens": 0,
        "loss_tokens": 0,
    }
    for what in ("data", "weights"):
        distributed.agree(f"the {what}", notes[what])
    start = distributed.from_first(checkpoints.latest() if begun else None)
    if start is not None:
        state, notes = checkpoints.resume(start, state, notes)
        say(f"   continuing from the checkpoint of step {start}")

    # ---- compile once ---------------------------------------------------------------------------
    with mark("compile"):
        train_step = jit_train_step(model, tx, config, state, mesh)
        train_step = Compiled(train_step, (state, base), (train_set,), mesh)
        eval_step = jit_eval_step(model, config, train_set.label_tokens, mesh)
        eval_step = Compiled(eval_step, (state.lora, base), (validation, probe, *whole), mesh)
    # Of the longest rows, the largest.
    memory = train_step.made[max(train_step.made)].memory_analysis()
    banner(
        "step",
        {
            "compiled in": f"{phases.seconds['compile']:.1f} s, train and eval step"
            + (f", for {len(train_step.made)} row lengths" if len(train_step.made) > 1 else ""),
            "memory a device": f"{memory.argument_size_in_bytes / 2**30:.2f} GiB arguments, "
            f"{memory.temp_size_in_bytes / 2**30:.2f} GiB temporary",
            "before the first step": f"{clock(phases.since_start())}: {phases.told()}",
        },
    )

    # ---- the loop -------------------------------------------------------------------------------
    run: dict[str, Any] = {
        "status": "running",
        "arch": name,
        "weights": config.weights,
        "trainable_parameters": count(abstract["lora"]),
        "base_parameters": count(abstract["params"]),
        "adapted_modules": len(adapted) * arch.layers,
        "examples": counts,
        "steps_planned": total,
        "steps_per_epoch": steps_per_epoch,
        "devices": device,
        **made_with,
        "data_fingerprint": notes["data"],
        "weights_fingerprint": weights,
        "phases": phases.seconds,
        "nan": None,
    }
    before: dict[str, Any] = {}
    if jax.process_index() == 0:
        if start is not None:
            before = manifest.before(workdir / "run.json")
        forget_after(workdir, start)
    metrics = Metrics(workdir, start, total, notes["eval_due"])
    run["earlier_seconds"] = max(notes["seconds"], metrics.spent)  # of other starts than this
    timer = Timer(run["earlier_seconds"] + phases.since_start())
    seen: list[dict[str, Any]] = []  # rows of the steps since the last save

    def at(step: int) -> str:
        return f"{step:>{len(str(total))}}/{total}"

    def save_run(status: str, step: int) -> None:
        run.update(
            {k: notes[k] for k in ("best_step", "best_loss", "seconds", "tokens", "loss_tokens")},
            status=status,
            steps=step,
            peak_memory=peak_memory(),
        )
        if jax.process_index() == 0:
            told = manifest.joined(before, finite(run), start, made_steps=step != start)
            write_text(workdir / "run.json", json.dumps(told, indent=2) + "\n")

    def upcoming() -> tuple[Batch, dict[str, jax.Array]] | None:
        """The next batch, on its way to the devices; None after the last.

        The device still works on the step before, so the seconds are the most that it waited.
        """
        with mark(WAIT):
            batch = next(batches, None)
        with mark(COPY):
            return batch and (batch, to_global(batch.arrays, mesh))

    def save_seen(step: int) -> None:
        if seen and jax.process_index() == 0:
            evaluate.write_seen(workdir / "ledger" / f"seen_{step:06d}.parquet", seen)
        seen.clear()

    def save_all(step: int) -> None:
        """What a later start continues from, and what the steps since the last one saw."""
        with mark("save"):
            save_seen(step)
            metrics.save()
            checkpoints.save(step, state, notes)

    def patience_over(bad_evals: int) -> bool:
        return 0 < config.train.patience <= bad_evals

    def at_ledger(step: int) -> bool:
        return ledger_every > 0 and (step % ledger_every == 0 or step == total)

    def evaluate_now(step: int) -> None:
        """Both fixed sets: ledger, metrics, best so far; raises _NotFiniteError, StoppedError."""
        notes["eval_due"] = True

        def rows(data: Dataset, split: str) -> dict[str, np.ndarray]:
            return evaluate.ledger_rows(
                eval_step, state.lora, base, data, mesh, split, step, lambda: stop(interrupt.asked)
            )

        with mark("evaluate"):
            parts = [rows(validation, "validation")]
        found = {"validation": evaluate.metrics(parts[0], config.data.batch_size)}
        loss = found["validation"]["loss"]
        # A look of the ledger between the evals changes neither when a run stops nor what is best.
        planned = step % every == 0 or step == total
        better = planned and loss < notes["best_loss"]
        bad_evals = 0 if better else notes["bad_evals"] + planned
        if at_ledger(step) or (whole and patience_over(bad_evals)):
            with mark(LEDGER):
                parts.append(rows(whole[0], "train"))
                parts.append(evaluate.part_of(parts[-1], probe_ids, "train_probe"))
        else:
            with mark("evaluate"):
                parts.append(rows(probe, "train_probe"))
        notes.update(eval_due=False, bad_evals=bad_evals)
        found |= {p["split"][0]: evaluate.metrics(p, config.data.batch_size) for p in parts[1:]}
        if jax.process_index() == 0:
            evaluate.write_ledger(workdir / "ledger" / f"eval_{step:06d}.parquet", parts)
        bad = [i for p in parts for i in evaluate.not_finite(p)]
        better &= not bad
        if better:
            notes.update(best_loss=loss, best_step=step)
        notes["seconds"] = timer.total()
        flat = {f"{s}/{k}": v for s, m in found.items() for k, v in m.items()}
        classes = found["validation"].get("class_accuracy")
        metrics.write(
            {"kind": "eval", "step": step, "epoch": step / steps_per_epoch, **flat,
             "seconds": notes["seconds"]},
            f"eval {at(step)}  validation loss {loss:.4f}  "
            f"acc {found['validation']['token_accuracy']:.4f}  "
            + (f"class acc {classes:.4f}  " if classes is not None else "")
            + f"train-probe loss {found['train_probe']['loss']:.4f}  "
            + ("best" if better else f"{notes['bad_evals']} without a better one"),
        )  # fmt: skip
        if bad:
            raise _NotFiniteError(step, bad)

    def log(step: int, sums: dict[str, jax.Array], batch_tokens: int, owner: np.ndarray) -> None:
        """The record of a finished step; raises _NotFiniteError."""
        token_nll = sums.pop("token_nll")
        sums = {k: np.asarray(v, np.float64) for k, v in jax.device_get(sums).items()}
        seconds = timer.lap()
        phases.add(STEPS, seconds)
        loss_tokens = sums["tokens"].sum()
        loss = float(sums["nll"].sum() / loss_tokens)
        norm = float(sums["grad_norm"])
        if not (math.isfinite(loss) and math.isfinite(norm)):
            owners = train_set.batch_at(step - 1).owner
            members = np.unique(owners[owners >= 0])
            raise _NotFiniteError(step, [train_set.examples[i].id for i in members])
        seen.extend(evaluate.seen_rows(token_nll, owner, train_set, step))
        notes["tokens"] += batch_tokens
        notes["loss_tokens"] += int(loss_tokens)
        accuracy = float(sums["correct"].sum() / loss_tokens)
        has = sums["tokens"] > 0  # the empty rows that fill an epoch's last batch are no batch
        trl = float(np.mean(sums["correct"][has] / sums["tokens"][has]))
        notes["seconds"] = timer.total()
        metrics.write(
            {"kind": "train", "step": step, "epoch": step / steps_per_epoch, "loss": loss,
             "token_accuracy": accuracy, "trl_compat/mean_token_accuracy": trl,
             "lr": float(rates[step - 1]),
             "grad_norm": norm, "tokens": batch_tokens, "loss_tokens": int(loss_tokens),
             "seconds": notes["seconds"], "step_seconds": seconds},
            f"step {at(step)}  epoch {step / steps_per_epoch:.2f}  loss {loss:.4f}  "
            f"acc {accuracy:.4f}  lr {rates[step - 1]:.2e}  grad {norm:.3f}  "
            f"{batch_tokens / seconds:>7,.0f} tok/s  eta {clock((total - step) * seconds)}",
        )  # fmt: skip

    with Interrupt() as interrupt:
        stop = distributed.Vote(mesh)
        step = start or 0
        status = "finished"
        in_flight: tuple | None = None
        try:
            if start is None:
                sets = {"train": train_set, "validation": validation, "train_probe": probe}
                if jax.process_index() == 0:
                    evaluate.write_examples(
                        workdir / "ledger" / "examples.parquet", sets, tokenizer
                    )
                evaluate_now(0)
                save_all(0)
            elif notes["eval_due"]:
                evaluate_now(step)
            save_run("running", step)
            batches = iter(train_set.batches(step, total))
            timer.lap()
            coming = upcoming()
            while step < total and not patience_over(notes["bad_evals"]):
                batch, arrays = coming
                with jax.transfer_guard("disallow"):
                    state, sums = train_step(state, base, arrays)
                coming = upcoming()  # while the device works
                step += 1
                # The device works on this step while the host reports the one before.
                if in_flight is not None:
                    log(*in_flight)
                in_flight = (step, sums, batch.filled, batch.owner)
                evaluating = step % every == 0 or step == total or at_ledger(step)
                if stop(interrupt.asked) or evaluating or step % config.train.save_every == 0:
                    log(*in_flight)
                    in_flight = None
                    if evaluating:
                        evaluate_now(step)
                    save_all(step)
                    save_run("running", step)
                    timer.lap()
                    # Only here: a signal must not end the run at a step that was not saved.
                    if stop(interrupt.asked):
                        status = "interrupted"
                        break
            else:
                if step < total:
                    status = "stopped early"
        except _NotFiniteError as e:
            step, status, run["nan"] = e.step, "nan", {"steps": [e.step, e.step], "ids": e.ids}
            save_seen(step)
        except evaluate.StoppedError:
            status = "interrupted"
            notes["seconds"] = timer.total()
            if step != start:
                save_all(step)
        finally:
            try:
                checkpoints.close()
            finally:
                metrics.close()
    if status != "interrupted" or step != start:  # a start that made nothing changes no record
        save_run(status, step)

    # ---- what is left behind --------------------------------------------------------------------
    if status == "interrupted":
        say(f"\ninterrupted after step {step}; the same command continues from there")
        distributed.wait_for_all()
        raise SystemExit(130)
    written = report.write(workdir) if jax.process_index() == 0 else {}
    best = notes["best_step"]
    if best is not None:
        checkpoints = Checkpoints(workdir / "checkpoints")
        state = checkpoints.restore(best, state)[0]
        checkpoints.close()
        exported, lora = on_original_base(wrap, state.lora, initial)
        # Whole on every process, so that the first one can write all of it.
        lora = jax.jit(lambda x: x, out_shardings=replicated(mesh))(lora)
        if jax.process_index() == 0:
            base_model = pretrained.base_name, pretrained.inner, pretrained.revision
            peft.export(workdir / "adapter", lora, exported, arch, *base_model)
    distributed.wait_for_all()
    if status == "nan":
        ids = run["nan"]["ids"]
        more = f" and {len(ids) - 8} more" if len(ids) > 8 else ""
        bad = not_finite(base)
        cause = f". The base weights {bad[0]} are not finite: a damaged file?" if bad else ""
        raise UserError(
            f"the loss or its gradient was not finite at step {step}, on examples "
            f"{', '.join(ids[:8])}{more}; "
            + ("no adapter was written" if best is None else f"the adapter is that of step {best}")
            + cause
        )
    if written:
        banner(
            status,
            {
                "validation loss": "{start:.4f} -> {best:.4f}: {conclusion}".format(
                    **written["validation"]["loss"]
                ),
                "waiting for data": phases.waited(),
                "ledger": phases.share(LEDGER),
                "peak memory": ", ".join(
                    f"{n / 2**30:.2f} GiB on the {where}"
                    for where, n in run["peak_memory"].items()
                    if n is not None
                ),
                "adapter": f"{workdir / 'adapter'} (PEFT format), of step {best}",
                "report": workdir / "report.html",
            },
        )
    return written


class _NotFiniteError(Exception):
    """The loss or the gradient of a step, or the loss of the eval after it, is not finite."""

    def __init__(self, step: int, ids: list[str]):
        super().__init__(step, ids)
        self.step, self.ids = step, ids


if __name__ == "__main__":
    distributed.run(main)
