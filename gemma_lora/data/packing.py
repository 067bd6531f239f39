"""Which examples share a row: best-fit decreasing, planned before the epoch begins."""

import bisect
import collections
from collections.abc import Sequence


def pack(
    lengths: Sequence[int], loads: Sequence[int], order: Sequence[int], size: int, slots: int
) -> list[list[int]]:
    """Examples 0..n-1 -> rows of at most `size` tokens and at most `slots` loss positions.

    Best-fit decreasing (where `slots` never binds at most 11/9 of the least count of rows plus
    one): longest first, into the fullest row that takes it. `order` breaks ties between examples of
    equal length and load, so rows differ from epoch to epoch while their number does not. Every
    example fits alone.
    """
    by_length = sorted(order, key=lambda i: (-lengths[i], -loads[i]))
    rows: list[list[int]] = []
    loss_left: list[int] = []
    open_rows: dict[int, list[int]] = collections.defaultdict(list)  # by tokens left
    lefts: list[int] = []  # those that some row has, sorted
    for i in by_length:
        fit = next(
            (
                (lefts[k], row)
                for k in range(bisect.bisect_left(lefts, lengths[i]), len(lefts))
                for row in open_rows[lefts[k]]
                if loss_left[row] >= loads[i]
            ),
            None,
        )
        if fit is None:
            left, row = size, len(rows)
            rows.append([])
            loss_left.append(slots)
        else:
            left, row = fit
            open_rows[left].remove(row)
            if not open_rows[left]:
                lefts.remove(left)
        rows[row].append(i)
        loss_left[row] -= loads[i]
        left -= lengths[i]
        if not open_rows[left]:
            bisect.insort(lefts, left)
        open_rows[left].append(row)
    return rows
