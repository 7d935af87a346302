"""Random values for every parameter and buffer of a transformers NemotronH model, so that all of them matter."""

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
    uniform = torch.rand(tensor.shape, generator=generator)
    match name.rpartition(".")[2]:
        case "A_log":
            return (1 + 15 * uniform).log()
        case "dt_bias":
            return -5 + 5 * uniform  # time steps from 0.007 to 0.7
        case "D":
            return normal
        case "bias":  # of the convolution
            return 0.3 * normal
        case "e_score_correction_bias":
            return 0.2 * normal  # of the order of the spread of scores: choices change
    if "conv1d" in name:
        return normal / 2
    if tensor.dim() == 1:  # norms
        return 1 + 0.3 * normal
    if "embeddings" in name:
        return normal
    return normal / tensor.shape[-1] ** 0.5
