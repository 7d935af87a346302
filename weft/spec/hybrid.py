"""The hybrid Mamba-attention mixture-of-experts family (Nemotron-H, Nano v2, Nemotron 3).

Field names are those of the published ``config.json`` where the meaning is the same.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from weft.config.base import Config, setting
from weft.config.errors import Problem
from weft.spec.layers import (
    AttentionConfig,
    DropPolicy,
    LinearConfig,
    MambaConfig,
    MixerConfig,
    MLPConfig,
    MoEConfig,
    NormConfig,
    RouterConfig,
)
from weft.spec.param import Dim, Init, ParamSpec, Part, dim
from weft.spec.pattern import Pattern, faults, parse


@dataclass(frozen=True, kw_only=True)
class BlockConfig(Config):
    """One residual layer: ``x + mixer(norm(x))``."""

    norm: NormConfig
    mixer: MixerConfig

    def params(self) -> tuple[ParamSpec, ...]:
        """Norm, then mixer."""
        norm = (p.under("norm") for p in self.norm.params())
        return (*norm, *(p.under("mixer") for p in self.mixer.params()))


@dataclass(frozen=True, kw_only=True)
class EmbeddingConfig(Config):
    """Token table ``[vocab, embed]``; also the output head's matrix."""

    vocab: int
    embed: int
    std: float

    @property
    def dims(self) -> tuple[Dim, Dim]:
        """Rows are tokens."""
        return (dim("vocab", self.vocab), dim("embed", self.embed))

    def params(self) -> tuple[ParamSpec, ...]:
        """The table."""
        return (ParamSpec("weight", self.dims, Init("normal", self.std)),)


@dataclass(frozen=True, kw_only=True)
class MTPDepthConfig(Config):
    """One physical multi-token-prediction depth (DeepSeek-V3, 2.2; hybrid form of Nemotron 3)."""

    embed: int
    eps: float
    std: float
    blocks: tuple[BlockConfig, ...]

    @property
    def norm(self) -> NormConfig:
        """Shape of ``enorm``, ``hnorm`` and the final ``norm``."""
        return NormConfig(dims=dim("embed", self.embed), eps=self.eps, group=self.embed)

    @property
    def eh_proj(self) -> LinearConfig:
        """``[embedding | hidden]`` to the residual width."""
        cols = (Part("embed", self.embed, 1, "embedding"), Part("embed", self.embed, 1, "hidden"))
        return LinearConfig(rows=dim("embed", self.embed), cols=cols, std=self.std)

    def params(self) -> tuple[ParamSpec, ...]:
        """Joining projection, inner layers, norms."""
        specs = [p.under(name) for name in ("enorm", "hnorm") for p in self.norm.params()]
        specs += [p.under("eh_proj") for p in self.eh_proj.params()]
        specs += [p.under(f"layers.{i}") for i, block in enumerate(self.blocks) for p in block.params()]
        specs += [p.under("norm") for p in self.norm.params()]
        return tuple(specs)


@dataclass(frozen=True, kw_only=True)
class HybridConfig(Config):
    """A hybrid decoder. ``pattern`` names its layers; the rest sizes them."""

    pattern: str = setting(
        doc="one letter per layer (M Mamba-2, * attention, - MLP, E MoE); '/' before each MTP depth"
    )
    vocab_size: int = setting(131072, "tokens in the vocabulary", ge=1)
    hidden_size: int = setting(doc="residual width", ge=1)
    num_attention_heads: int = setting(1, "query heads", ge=1)
    num_key_value_heads: int = setting(1, "key and value heads", ge=1)
    head_dim: int = setting(128, "channels per attention head", ge=1)
    mamba_num_heads: int = setting(1, "Mamba-2 heads", ge=1)
    mamba_head_dim: int = setting(64, "channels per Mamba-2 head", ge=1)
    ssm_state_size: int = setting(128, "Mamba-2 state per channel", ge=1)
    n_groups: int = setting(1, "Mamba-2 B/C groups", ge=1)
    conv_kernel: int = setting(4, "taps of the Mamba-2 convolution", ge=1)
    chunk_size: int = setting(128, "tokens per chunk of the Mamba-2 scan (speed only)", ge=1)
    time_step_min: float = setting(1e-3, "lower bound of the initial time step", gt=0)
    time_step_max: float = setting(0.1, "upper bound of the initial time step", gt=0)
    time_step_floor: float = setting(1e-4, "floor of the initial time step", gt=0)
    time_step_limit: tuple[float, float] = setting((0.0, float("inf")), "clamp of the time step")
    intermediate_size: int = setting(1, "inner width of dense MLP layers", ge=1)
    n_routed_experts: int = setting(1, "routed experts per MoE layer", ge=1)
    num_experts_per_tok: int = setting(1, "experts per token", ge=1)
    moe_intermediate_size: int = setting(1, "inner width of one expert", ge=1)
    moe_shared_expert_intermediate_size: int = setting(0, "inner width of the shared expert; 0 is none", ge=0)
    moe_latent_size: int = setting(0, "width in which experts work; 0 is hidden_size", ge=0)
    n_group: int = setting(1, "expert groups of group-limited routing", ge=1)
    topk_group: int = setting(1, "expert groups a token may use", ge=1)
    norm_topk_prob: bool = setting(True, "divide the chosen scores by their sum")
    routed_scaling_factor: float = setting(1.0, "factor on the routing weights")
    router_aux_loss_coef: float = setting(1e-4, "coefficient of the per-document balance loss", ge=0)
    router_batch_aux_loss_coef: float = setting(
        0.0, "coefficient of the balance loss over the tokens of all ranks in a forward pass", ge=0
    )
    router_global_aux_loss_coef: float = setting(
        0.0, "coefficient of the balance loss over all tokens of the step so far", ge=0
    )
    router_z_loss_coef: float = setting(0.0, "coefficient of the router z-loss", ge=0)
    router_bias_update_rate: float = setting(
        1e-3, "step of the correction bias per global batch; 0 is off", ge=0
    )
    moe_capacity_factor: float = setting(
        0.0, "tokens an expert takes of a group of tokens, over an even share; 0 drops none", ge=0
    )
    moe_capacity_tokens: int = setting(0, "tokens of such a group inside one sample; 0 is the sample", ge=0)
    moe_drop_policy: DropPolicy = setting(
        "probs", "what an expert at its capacity keeps: the largest weights, or the first tokens (position)"
    )
    moe_pad_to_capacity: bool = setting(False, "pad every expert to its capacity: static shapes")
    moe_jitter: float = setting(
        0.0, "router inputs are scaled by U(1 - this, 1 + this) in training; 0 is off", ge=0, lt=1
    )
    moe_force_balance: bool = setting(False, "choose experts in turn instead of by score (for benchmarks)")
    mtp_num_depths: int = setting(0, "MTP depths trained; 0 is one per '/' of the pattern", ge=0)
    mtp_loss_scale: float = setting(0.3, "weight of the mean MTP loss", ge=0)
    layer_norm_epsilon: float = setting(1e-5, "norm epsilon", gt=0)
    initializer_range: float = setting(0.02, "standard deviation of initial weights", ge=0)
    rescale_prenorm_residual: bool = setting(True, "scale initial residual projections by 1/sqrt(layers)")
    tie_word_embeddings: bool = setting(False, "the output head is the token table")
    max_position_embeddings: int = setting(
        262144, "longest context in tokens (a label: there are no positions)", ge=1
    )

    def check(self) -> Iterator[Problem]:
        """The pattern, MTP depths, and every layer that the pattern names."""
        wrong = list(faults(self.pattern))
        yield from (Problem("pattern", message) for message in wrong)
        if wrong:
            return
        parts = self.parts
        if self.mtp_num_depths and not parts.mtp:
            yield Problem("mtp_num_depths", f"{self.mtp_num_depths} depths, but the pattern has no '/' part")
        if len(parts.mtp) > 1 and self.depths != len(parts.mtp):
            yield Problem(
                "mtp_num_depths",
                f"{self.depths} depths need one '/' part (repeated) or {self.depths} of them",
            )
        for symbol in sorted(set(parts.main + "".join(parts.mtp))):
            for problem in self.mixer(symbol).problems():
                if (symbol, problem.path) in _FIELDS:  # the others are limits of this section's own fields
                    yield Problem(_FIELDS[symbol, problem.path], problem.message)

    @property
    def parts(self) -> Pattern:
        """Main layers and MTP depths."""
        return parse(self.pattern)

    @property
    def depths(self) -> int:
        """MTP depths trained (a single physical depth may be repeated)."""
        return self.mtp_num_depths or len(self.parts.mtp)

    @property
    def out_std(self) -> float:
        """Initial scale of projections back to the residual."""
        layers = len(self.parts.main)
        return (
            self.initializer_range / layers**0.5 if self.rescale_prenorm_residual else self.initializer_range
        )

    def mixer(self, symbol: str) -> MixerConfig:
        """The mixer that ``symbol`` stands for."""
        base: dict[str, Any] = {
            "embed": self.hidden_size,
            "std": self.initializer_range,
            "out_std": self.out_std,
        }
        match symbol:
            case "M":
                return MambaConfig(**base, **self._mamba)
            case "*":
                return AttentionConfig(
                    **base,
                    heads=self.num_attention_heads,
                    kv_heads=self.num_key_value_heads,
                    head_dim=self.head_dim,
                )
            case "-":
                return MLPConfig(**base, mlp=self.intermediate_size)
            case "E":
                return MoEConfig(
                    **base,
                    router=self.router,
                    mlp=self.moe_intermediate_size,
                    latent=self.moe_latent_size,
                    shared_mlp=self.moe_shared_expert_intermediate_size,
                )
            case _:
                raise ValueError(f"{symbol!r} is not a layer of the pattern language")

    @property
    def _mamba(self) -> dict[str, Any]:
        return {
            "heads": self.mamba_num_heads,
            "head_dim": self.mamba_head_dim,
            "groups": self.n_groups,
            "state": self.ssm_state_size,
            "conv": self.conv_kernel,
            "chunk": self.chunk_size,
            "norm_group": max(1, self.mamba_num_heads * self.mamba_head_dim // self.n_groups),
            "eps": self.layer_norm_epsilon,
            "dt_min": self.time_step_min,
            "dt_max": self.time_step_max,
            "dt_floor": self.time_step_floor,
            "dt_limit": self.time_step_limit,
        }

    @property
    def router(self) -> RouterConfig:
        """Router of every MoE layer."""
        return RouterConfig(
            embed=self.hidden_size,
            experts=self.n_routed_experts,
            top_k=self.num_experts_per_tok,
            expert_groups=self.n_group,
            top_groups=self.topk_group,
            normalize=self.norm_topk_prob,
            scale=self.routed_scaling_factor,
            aux_coef=self.router_aux_loss_coef,
            batch_coef=self.router_batch_aux_loss_coef,
            global_coef=self.router_global_aux_loss_coef,
            z_coef=self.router_z_loss_coef,
            capacity_factor=self.moe_capacity_factor,
            capacity_tokens=self.moe_capacity_tokens,
            drop_policy=self.moe_drop_policy,
            pad_to_capacity=self.moe_pad_to_capacity,
            jitter=self.moe_jitter,
            force_balance=self.moe_force_balance,
            std=self.initializer_range,
        )

    def block(self, symbol: str) -> BlockConfig:
        """The residual layer that ``symbol`` stands for."""
        return BlockConfig(norm=self.norm, mixer=self.mixer(symbol))

    @property
    def norm(self) -> NormConfig:
        """Norm over the residual width."""
        width = self.hidden_size
        return NormConfig(dims=dim("embed", width), eps=self.layer_norm_epsilon, group=width)

    @property
    def embedding(self) -> EmbeddingConfig:
        """Token table (and head)."""
        return EmbeddingConfig(vocab=self.vocab_size, embed=self.hidden_size, std=self.initializer_range)

    @cached_property
    def blocks(self) -> tuple[BlockConfig, ...]:
        """Main layers."""
        return tuple(self.block(symbol) for symbol in self.parts.main)

    @cached_property
    def mtp(self) -> tuple[MTPDepthConfig, ...]:
        """Physical MTP depths."""
        return tuple(
            MTPDepthConfig(
                embed=self.hidden_size,
                eps=self.layer_norm_epsilon,
                std=self.initializer_range,
                blocks=tuple(self.block(symbol) for symbol in depth),
            )
            for depth in self.parts.mtp
        )

    def params(self) -> tuple[ParamSpec, ...]:
        """Every parameter and persistent buffer, global names, in module order."""
        specs = [p.under("embed") for p in self.embedding.params()]
        specs += [p.under(f"layers.{i}") for i, block in enumerate(self.blocks) for p in block.params()]
        specs += [p.under("norm") for p in self.norm.params()]
        if not self.tie_word_embeddings:
            specs += [p.under("head") for p in self.embedding.params()]
        specs += [p.under(f"mtp.{i}") for i, depth in enumerate(self.mtp) for p in depth.params()]
        return tuple(specs)


# Layer fields that a user sets under another name in the model section.
_FIELDS = {
    ("*", "kv_heads"): "num_key_value_heads",
    ("M", "groups"): "n_groups",
    ("E", "router.top_k"): "num_experts_per_tok",
    ("E", "router.expert_groups"): "n_group",
    ("E", "router.top_groups"): "topk_group",
    ("E", "router.capacity_tokens"): "moe_capacity_tokens",
    ("E", "router.pad_to_capacity"): "moe_pad_to_capacity",
}
