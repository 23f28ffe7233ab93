"""Which images each step sees, by seed and number of the step: a resumed run needs nothing else."""

from __future__ import annotations

import torch
from torch import Tensor


class Shuffled:
    """Row numbers in an order drawn anew for each pass; what does not fill a batch at its end is left out.

    Args:
        num_rows: how many there are.
        batch_size: rows of a batch. None, or more than there are, takes all, in order.
        seed: of the orders.
    """

    def __init__(self, num_rows: int, batch_size: int | None, seed: int) -> None:
        self._num_rows, self._seed = num_rows, seed
        self._size = min(batch_size or num_rows, num_rows)
        self.batches_per_epoch = num_rows // self._size
        self._epoch, self._order = -1, torch.arange(num_rows)

    def batch(self, number: int) -> Tensor:
        """The batch of a step, counted from 0: int64 row numbers."""
        if self._size == self._num_rows:
            return torch.arange(self._num_rows)
        epoch, place = divmod(number, self.batches_per_epoch)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(self._seed * 1_000_003 + epoch)
            self._epoch, self._order = epoch, torch.randperm(self._num_rows, generator=generator)
        return self._order[place * self._size : (place + 1) * self._size]
