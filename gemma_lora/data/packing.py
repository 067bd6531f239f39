"""Which examples share a row: best-fit decreasing, planned before the epoch begins."""

import bisect
import collections
from collections.abc import Sequence


def pack(lengths: Sequence[int], order: Sequence[int], size: int) -> list[list[int]]:
    """Examples 0..n-1 -> rows of at most `size` tokens, as any of them has alone.

    Best-fit decreasing (at most 11/9 of the least count of rows, plus one): longest first, into the
    fullest row that takes it. `order` breaks ties between examples of equal length, so rows differ
    from epoch to epoch while their number does not.
    """
    rows: list[list[int]] = []
    open_rows: dict[int, list[int]] = collections.defaultdict(list)  # by tokens left
    lefts: list[int] = []  # those that some row has, sorted
    for i in sorted(order, key=lambda i: -lengths[i]):
        fit = bisect.bisect_left(lefts, lengths[i])
        if fit == len(lefts):
            left, row = size, len(rows)
            rows.append([])
        else:
            left = lefts[fit]
            row = open_rows[left].pop(0)
            if not open_rows[left]:
                del lefts[fit]
        rows[row].append(i)
        left -= lengths[i]
        if not open_rows[left]:
            bisect.insort(lefts, left)
        open_rows[left].append(row)
    return rows
