"""The vision encoder, and which rows of a video are kept."""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from weft.models.encoder import Encoder, whole
from weft.models.hybrid import Localize
from weft.nn.context import Context
from weft.nn.encoder import pieces_of
from weft.nn.slots import Regroup
from weft.nn.vision import Patches, VisionBlock
from weft.spec.vision import VisionConfig, kept


class VisionEncoder(Encoder[VisionConfig]):
    """Patches of pictures and of groups of frames to residual rows of the decoder."""

    def __init__(
        self, config: VisionConfig, local: Localize = whole, has: Callable[[str], bool] = lambda unit: True
    ) -> None:
        super().__init__(config, local, has)
        self.regroup = Regroup(config.prefix, config.merge**2)

    def make_embed(self, local: Localize) -> Patches:
        """Projections of patches, with positions and a prefix."""
        return Patches(local(self.config.embed))

    def make_block(self, number: int, local: Localize) -> VisionBlock:
        """A transformer layer."""
        return VisionBlock(local(self.config.blocks[number]))

    def last(self, x: Float[Tensor, "rows embed"], ctx: Context) -> Float[Tensor, "outputs feature"]:
        """Without the prefix; the patches of a block side by side."""
        return self.regroup(super().last(x, ctx), pieces_of(ctx))


def choose(
    rows: Float[Tensor, "rows width"], groups: int, cells: int, pruning: float
) -> Int[Tensor, " kept"]:
    """Efficient video sampling (arXiv 2604.24954): which rows of a whole video are kept, in order.

    A row is kept for its cosine distance from the row of the same cell one group of frames before; all of the
    first group are, and the first of equals. How many is known without the rows (``weft.spec.vision.kept``).

    Args:
        rows: the projected rows of ``groups`` groups of frames of ``cells`` rows each.
        groups: groups of frames.
        cells: rows of a group.
        pruning: part of all rows that is dropped.
    """
    video = rows.detach().unflatten(0, (groups, cells))
    distance = 1 - F.cosine_similarity(video[1:], video[:-1], dim=-1)
    first = distance.new_full((1, cells), float("inf"))
    order = torch.argsort(torch.cat([first, distance]).flatten(), descending=True, stable=True)
    return order[: kept(groups, cells, pruning)].sort().values
