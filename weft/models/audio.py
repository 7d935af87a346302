"""The sound encoder: mel frames to rows, FastConformer layers, projector."""

from collections.abc import Callable, Sequence

from jaxtyping import Float
from torch import Tensor

from weft.models.encoder import Encoder, whole
from weft.models.hybrid import Localize
from weft.nn.audio import Conformer, Subsampling
from weft.nn.context import Context
from weft.nn.encoder import pieces_of
from weft.spec.audio import AudioConfig


class AudioEncoder(Encoder[AudioConfig]):
    """Clips of sound to residual rows of the decoder. Every layer ends with a norm, so none comes after.

    Args:
        config: the whole encoder.
        local: each layer's config as one rank computes it; the same by default.
        has: whether a unit is here; all are by default.
    """

    def __init__(
        self, config: AudioConfig, local: Localize = whole, has: Callable[[str], bool] = lambda unit: True
    ) -> None:
        super().__init__(
            config,
            lambda: Subsampling(local(config.embed)),
            lambda i: Conformer(local(config.blocks[i]), config.heard),
            local,
            has,
        )

    def first(self, data: Sequence[Float[Tensor, "_ _"]], ctx: Context) -> Float[Tensor, "rows embed"]:
        """The rows of this rank before the first layer.

        Args:
            data: for each piece of these rows the mel frames that it depends on (``config.frames``).
            ctx: the pass.
        """
        pieces = pieces_of(ctx)
        return self.embed(data, pieces.part(range(pieces.rows)[ctx.rows]), pieces.sizes)
