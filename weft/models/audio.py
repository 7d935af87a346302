"""The sound encoder: mel frames to rows, FastConformer layers, projector."""

from weft.models.encoder import Encoder
from weft.models.hybrid import Localize
from weft.nn.audio import Conformer, Subsampling
from weft.spec.audio import AudioConfig


class AudioEncoder(Encoder[AudioConfig]):
    """Clips of sound to residual rows of the decoder. Every layer ends with a norm, so none comes after."""

    def make_embed(self, local: Localize) -> Subsampling:
        """Convolutions over mel frames."""
        return Subsampling(local(self.config.embed))

    def make_block(self, number: int, local: Localize) -> Conformer:
        """A conformer layer."""
        return Conformer(local(self.config.blocks[number]), self.config.heard)
