"""Checkpoints of everything that training changes: atomic, asynchronous, latest and best kept.

The order of resuming: (1) the workdir's config must equal this run's; (2) the newest complete
checkpoint is restored, with the run's own bookkeeping; (3) its data fingerprint must equal this
run's; (4) metrics written after it are dropped, since they will be written again.
"""

import pathlib
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy as keep


class Checkpoints:
    """step -> (state tree, small JSON notes). A half-written checkpoint is never seen."""

    def __init__(self, directory: pathlib.Path):
        policy = keep.AnyPreservationPolicy(
            [
                keep.LatestN(1),
                keep.BestN(
                    get_metric_fn=lambda m: m["loss"],
                    reverse=True,
                    n=1,
                    keep_checkpoints_without_metrics=False,
                ),
            ]
        )
        options = ocp.CheckpointManagerOptions(preservation_policy=policy)
        self._manager = ocp.CheckpointManager(directory.absolute(), options=options)

    def save(self, step: int, state: Any, notes: dict[str, Any], loss: float | None) -> None:
        """Starts a save; `loss` is the validation loss where this step was evaluated."""
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state), notes=ocp.args.JsonSave(notes)
            ),
            metrics=None if loss is None else {"loss": loss},
        )

    def latest(self) -> int | None:
        return self._manager.latest_step()

    def restore(self, step: int, like: Any) -> tuple[Any, dict[str, Any]]:
        """(state with the shapes, dtypes and shardings of `like`, notes)."""
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        restored = self._manager.restore(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardRestore(abstract), notes=ocp.args.JsonRestore()
            ),
        )
        return restored.state, restored.notes

    def close(self) -> None:
        """Waits for saves under way."""
        self._manager.wait_until_finished()
        self._manager.close()
