"""Random values for every parameter and buffer of a transformers NemotronH model: all of them matter."""

import torch
from torch import Tensor, nn


@torch.no_grad()
def randomize(model: nn.Module, seed: int) -> None:
    """Draw norms, decays, time steps, biases and router biases too, at scales of trained models."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        tensor.copy_(_draw(name, tensor, generator))


def _draw(name: str, tensor: Tensor, generator: torch.Generator) -> Tensor:
    normal = torch.randn(tensor.shape, generator=generator)
    match name.removesuffix(".weight").rpartition(".")[2]:
        case "A_log":
            value = (1 + 15 * torch.rand(tensor.shape, generator=generator)).log()
        case "dt_bias":  # time steps from 0.007 to 0.7
            value = -5 + 5 * torch.rand(tensor.shape, generator=generator)
        case "D" | "embeddings":
            value = normal
        case "bias":  # of the convolution
            value = 0.3 * normal
        case "e_score_correction_bias":  # of the order of the spread of scores, so that choices change
            value = 0.2 * normal
        case "conv1d":
            value = normal / 2
        case _ if tensor.dim() == 1:  # norms
            value = 1 + 0.3 * normal
        case _:
            value = normal / tensor.shape[-1] ** 0.5
    return value
