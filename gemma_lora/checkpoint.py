"""Checkpoints of everything that training changes: atomic, asynchronous, latest and best kept.

The order of resuming: (1) the workdir's config must equal this run's but for the mesh; (2) the
newest complete checkpoint is restored, with the run's own bookkeeping; (3) it must be of this
version, its fingerprints of data and weights this run's; (4) metrics written after it are dropped,
since they will be written again.
"""

import contextlib
import pathlib
import re
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy as keep

from gemma_lora.errors import UserError, one_line
from gemma_lora.files import remote


class _LatestAndBest(keep.PreservationPolicy):
    """Keeps the newest checkpoint and that of step `best`.

    The run says which is best: orbax's own BestN forgets the metrics when a run is resumed, and of
    equal losses it keeps the later.
    """

    best: int | None = None

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        return [c is checkpoints[-1] or c.step == self.best for c in checkpoints]


class Checkpoints:
    """step -> (state tree, small JSON notes). A half-written checkpoint is never seen.

    read_only: makes no directory and leaves what another process is still writing.
    """

    def __init__(self, directory: pathlib.Path, read_only: bool = False):
        self._directory = directory if remote(directory) else directory.absolute()
        self._keep = _LatestAndBest()
        options = ocp.CheckpointManagerOptions(
            preservation_policy=self._keep,
            create=not read_only,
            cleanup_tmp_directories=not read_only,
        )
        self._manager = ocp.CheckpointManager(self._directory, options=options)

    def save(self, step: int, state: Any, notes: dict[str, Any]) -> None:
        """Starts a save. The checkpoint of notes['best_step'] stays, those before it go. Raises
        UserError where this save or the last finds no room."""
        self._keep.best = notes["best_step"]
        with self._room():
            # A copy: another thread writes it later, while the run changes its own.
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(state), notes=ocp.args.JsonSave(dict(notes))
                ),
            )

    @contextlib.contextmanager
    def _room(self) -> Iterator[None]:
        """UserError for a full disk, of which tensorstore says only in words."""
        try:
            yield
        except Exception as e:
            if not re.search("no space left|quota exceeded", str(e), re.IGNORECASE):
                raise
            raise UserError(
                f"{self._directory}: no space is left for a checkpoint; make room, and the same "
                "command continues the run"
            ) from e

    def latest(self) -> int | None:
        return self._manager.latest_step()

    def restore(self, step: int, like: Any) -> tuple[Any, dict[str, Any]]:
        """(state with the shapes, dtypes and shardings of `like`, notes).

        Raises UserError for a checkpoint that cannot be restored.
        """
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        try:
            restored = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardRestore(abstract), notes=ocp.args.JsonRestore()
                ),
            )
        except Exception as e:  # orbax and tensorstore have no common base of their errors
            raise UserError(
                f"the checkpoint {self._directory / str(step)} cannot be restored "
                f"({type(e).__name__}: {one_line(e)}); if it is damaged, move "
                "it away to go on from an earlier one, if there is one"
            ) from e
        return restored.state, restored.notes

    def resume(self, step: int, like: Any, notes: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """restore() for the run that `notes` begin.

        Raises UserError, too, where the checkpoint's notes have other names, or other fingerprints
        of data and weights.
        """
        state, old = self.restore(step, like)
        run = self._directory.parent
        if old.keys() != notes.keys():
            differ = ", ".join(sorted(old.keys() ^ notes.keys()))
            raise UserError(
                f"the checkpoints in {run} are of another version of gemma_lora: one of both "
                f"lacks {differ}; give another --workdir"
            )
        for what in ("data", "weights"):
            if old[what] != notes[what]:
                raise UserError(
                    f"the {what} are no longer those of the run in {run}: got {notes[what]}, "
                    f"expected {old[what]}; give another --workdir, or the {what} it began with"
                )
        return state, old

    def close(self) -> None:
        """Waits for a save under way; raises UserError where it finds no room."""
        with self._room():
            self._manager.close()
