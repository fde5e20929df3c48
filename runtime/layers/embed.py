"""Token embedding and output head over a vocabulary that is split over ranks.

Letters: T tokens, E width, V vocabulary entries here.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from paceline.parallel.mesh import Axis


class Embedding:
    """Rows of the table that this rank holds; the others contribute theirs by a sum.

    A token that no rank holds, such as one that only a drafter's target knows, is a row of zeros.
    """

    def __init__(self, table_VE: Tensor, *, offset: int, axis: Axis, num_ids: int) -> None:
        """`num_ids` is how many token ids there are in all."""
        self._axis = axis
        self._offset = offset
        self.num_here = table_VE.shape[0]
        self.partial = table_VE.shape[0] < num_ids
        """Whether other ranks have rows too, or nobody has some."""
        # a row of zeros answers for every token that is not here
        self.table = F.pad(table_VE, (0, 0, 0, 1)) if self.partial else table_VE

    def __call__(self, token_ids_T: Tensor) -> Tensor:
        """`[T]` int64 to `[T, E]` float32, the same on every rank."""
        if not self.partial:
            return F.embedding(token_ids_T, self.table).float()
        local = token_ids_T - self._offset
        here = (local >= 0) & (local < self.num_here)
        rows = F.embedding(torch.where(here, local, self.num_here), self.table).float()
        return self._axis.collectives.all_reduce_(rows)
