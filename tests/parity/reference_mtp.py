"""Multi-token prediction from transformers' own NemotronH blocks: the reference that it does not have."""

from copy import deepcopy

import torch
from torch import Tensor, nn
from transformers import NemotronHConfig, NemotronHForCausalLM
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHBlock, NemotronHRMSNorm

KINDS = {"M": "linear_attention", "*": "full_attention", "-": "mlp", "E": "moe"}


class ReferenceMTP(nn.Module):
    """Physical depths with the modules of published checkpoints: ``layers.N`` counts through all depths.

    The joining norms and projection lie beside the first layer of a depth, its final norm beside the last.
    """

    def __init__(self, config: NemotronHConfig, depths: tuple[str, ...]) -> None:
        super().__init__()
        inner = deepcopy(config)
        inner.layers_block_type = [KINDS[symbol] for depth in depths for symbol in depth]
        inner._attn_implementation = "sdpa"
        self.layers = nn.ModuleList(
            NemotronHBlock(inner, layer_idx=i) for i in range(len(inner.layers_block_type))
        )
        self.sizes = [len(depth) for depth in depths]
        norm = lambda: NemotronHRMSNorm(config.hidden_size, config.layer_norm_epsilon)  # noqa: E731
        for first, last in self._ends():
            first.enorm, first.hnorm, last.final_layernorm = norm(), norm(), norm()
            first.eh_proj = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)

    def _ends(self) -> list[tuple[nn.Module, nn.Module]]:
        starts = [sum(self.sizes[:k]) for k in range(len(self.sizes))]
        return [(self.layers[a], self.layers[a + n - 1]) for a, n in zip(starts, self.sizes, strict=True)]

    def forward(self, model: NemotronHForCausalLM, tokens: Tensor, depths: int) -> list[Tensor]:
        """Logits of each depth: row ``i`` of depth ``k`` predicts token ``i + k + 1``.

        Args:
            model: embeds tokens, gives the hidden state after its final norm, and has the head.
            tokens: one document, ``[1, T]``.
            depths: repetitions; depth ``k`` uses physical depth ``(k - 1) % physical``.
        """
        hidden = model.model(input_ids=tokens, use_cache=False).last_hidden_state
        logits = []
        for k in range(1, depths + 1):
            which = (k - 1) % len(self.sizes)
            first, last = self._ends()[which]
            ahead = model.model.embeddings(tokens[:, k:])
            joined = torch.cat([first.enorm(ahead), first.hnorm(hidden[:, : ahead.shape[1]])], dim=-1)
            x = first.eh_proj(joined)
            start = sum(self.sizes[:which])
            for layer in self.layers[start : start + self.sizes[which]]:
                x = layer(x)
            hidden = last.final_layernorm(x)
            logits.append(model.lm_head(hidden))
        return logits
