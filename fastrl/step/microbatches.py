"""Microbatches that fit in memory: when one does not, its work starts anew with half the tokens, for good.

Gradients do not depend on the cut but for rounding, so nothing else changes. Work must hold no collective: ranks may
run out of memory one by one.
"""

import gc
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from fastrl.base import ranks
from fastrl.base.exhausted import means_out_of_memory
from fastrl.base.types import TrainBatch
from fastrl.step.batching import cut

T = TypeVar("T")


@dataclass(kw_only=True)
class Fitting:
    tokens: int  # of a microbatch, at most
    say: Callable[[str], None]
    beat: Callable[[], None] = lambda: None  # called with every microbatch
    release: Callable[[], None] = lambda: None  # gives back what was kept for microbatches of the size so far

    whole: bool = field(default=False, init=False)  # whether the microbatch at work cannot be cut further

    def cut(
        self, batch: TrainBatch, *, splits_groups: bool = True, packed: bool
    ) -> Iterator[tuple[Tensor, TrainBatch]]:
        """`batching.cut` at the present limit."""
        for rows, part in cut(batch, self.tokens, splits_groups=splits_groups, packed=packed):
            self.whole = (len(part) if splits_groups else len(part.group.unique())) == 1
            self.beat()
            yield rows, part

    def run(self, work: Callable[[], T]) -> T:
        """work(), which takes its microbatches from `cut` and starts from nothing each time.

        Raises what `means_out_of_memory` when a single sequence (or a group that must stay together) does not fit.
        """
        while True:
            self.whole = True  # before the first microbatch there is nothing to cut
            try:
                return work()
            except (RuntimeError, MemoryError) as error:
                if self.whole or not means_out_of_memory(error):
                    raise
            self.halve()  # out here the failed work's tensors have no frame left that holds them

    def halve(self) -> None:
        self.tokens = max(1, self.tokens // 2)
        self.release()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        text = f"warning: out of memory; going on with --tokens-per-microbatch {self.tokens}, which is for good"
        if ranks.rank() == 0:
            self.say(text)
        else:
            print(f"rank {ranks.rank()}: {text}", file=sys.stderr, flush=True)
