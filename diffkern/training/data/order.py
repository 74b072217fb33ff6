"""In which order a training run meets its images: a pure function of seed, step and process."""

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler


def epoch_order(length: int, seed: int, epoch: int) -> np.ndarray:
    """int64 (length,): the permutation of the dataset used in ``epoch``; epochs are independent of each other."""
    key = np.array([seed, epoch], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key)).permutation(length)


class StreamBatches(Sampler[list[int]]):
    """Endless batches of dataset indices for one process, starting at any optimiser step.

    The epochs' permutations follow one another in one stream without gaps, and step s owns its
    positions [s·batch_size, (s + 1)·batch_size): nothing has to be remembered to resume in the
    middle of an epoch, and no image is dropped. Each step gives ``accumulation`` micro-batches;
    micro-batch j of process r holds the positions of the global batch from
    (j·world_size + r)·micro_size on (``offset``), so that one process, several processes and
    accumulation train on the same global batch.

    Raises:
        ValueError: ``batch_size`` cannot be divided by world_size · accumulation, or no images.
    """

    def __init__(
        self,
        length: int,
        batch_size: int,
        seed: int,
        *,
        start_step: int = 0,
        accumulation: int = 1,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if length < 1:
            raise ValueError("the dataset is empty")
        if batch_size < 1 or batch_size % (world_size * accumulation):
            raise ValueError(
                f"batch_size={batch_size} must be a multiple of "
                f"processes · accumulation = {world_size} · {accumulation}"
            )
        self.length, self.batch_size, self.seed, self.start_step = length, batch_size, seed, start_step
        self.accumulation, self.rank, self.world_size = accumulation, rank, world_size
        self.micro_size = batch_size // (world_size * accumulation)

    def offset(self, micro: int) -> int:
        """The position in the global batch of the first image of micro-batch ``micro`` of this process."""
        return (micro * self.world_size + self.rank) * self.micro_size

    def __iter__(self) -> Iterator[list[int]]:
        orders: dict[int, np.ndarray] = {}
        step = self.start_step
        while True:
            for micro in range(self.accumulation):
                first = step * self.batch_size + self.offset(micro)
                batch = []
                for position in range(first, first + self.micro_size):
                    epoch, place = divmod(position, self.length)
                    if epoch not in orders:
                        # A global batch larger than the dataset spans several epochs; older ones are done with.
                        orders = {e: o for e, o in orders.items() if e >= first // self.length}
                        orders[epoch] = epoch_order(self.length, self.seed, epoch)
                    batch.append(int(orders[epoch][place]))
                yield batch
            step += 1
