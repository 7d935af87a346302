"""Layer configs: what one layer is, in counts that a layout may later make smaller."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from weft.config.base import Config, setting
from weft.config.errors import Problem
from weft.spec.param import ONES, ZEROS, Dim, Init, ParamSpec, Part, dim, size


@dataclass(frozen=True, kw_only=True)
class LinearConfig(Config):
    """``y = x W^T + b``: weight ``[rows, cols]``, bias ``[rows]`` where there is one."""

    rows: Dim
    cols: Dim
    std: float = setting(doc="standard deviation of the initial normal draw")
    bias: bool = setting(False, "whether something is added")

    def params(self) -> tuple[ParamSpec, ...]:
        """The weight, and the bias, which starts at zero and never decays."""
        weight = ParamSpec("weight", (self.rows, self.cols), Init("normal", self.std))
        return (weight, ParamSpec("bias", (self.rows,), ZEROS, decay=False)) if self.bias else (weight,)


@dataclass(frozen=True, kw_only=True)
class NormConfig(Config):
    """RMSNorm over ``dims``, in groups of ``group`` elements."""

    dims: Dim
    eps: float
    group: int = setting(doc="elements normalized together, whoever holds them", ge=1)

    def params(self) -> tuple[ParamSpec, ...]:
        """The weight, never decayed."""
        return (ParamSpec("weight", (self.dims,), ONES, decay=False),)


@dataclass(frozen=True, kw_only=True)
class LayerNormConfig(Config):
    """Norm with mean and bias over ``dims``, all of which are on one rank."""

    dims: Dim
    eps: float = setting(1e-5, "added to the variance", gt=0)

    def params(self) -> tuple[ParamSpec, ...]:
        """Weight and bias, never decayed."""
        return tuple(
            ParamSpec(name, (self.dims,), init, decay=False)
            for name, init in (("weight", ONES), ("bias", ZEROS))
        )


def _named(**children: LinearConfig | NormConfig) -> tuple[ParamSpec, ...]:
    return tuple(p.under(name) for name, child in children.items() for p in child.params())


@dataclass(frozen=True, kw_only=True)
class MixerConfig(Config):
    """What every residual branch has: the width it reads and writes, and its initial scale."""

    embed: int = setting(doc="residual width", ge=1, dim="embed")
    std: float = setting(0.02, "standard deviation of initial weights", ge=0)
    out_std: float = setting(0.02, "standard deviation of the projection back to the residual", ge=0)

    def params(self) -> tuple[ParamSpec, ...]:
        """Parameters, with names relative to the mixer."""
        raise NotImplementedError

    def flops_per_token(self, context: float) -> float:
        """Forward floating-point operations per token when ``context`` keys are seen on average."""
        raise NotImplementedError

    def active(self) -> int:
        """Parameters that one token uses."""
        return sum(p.numel for p in self.params())


@dataclass(frozen=True, kw_only=True)
class MambaConfig(MixerConfig):
    """Mamba-2 mixer (Dao and Gu 2024, arXiv 2405.21060), gated group norm after the scan."""

    heads: int = setting(doc="scan heads", ge=1, dim="heads")
    head_dim: int = setting(doc="channels per head", ge=1)
    groups: int = setting(doc="B/C groups, shared by heads/groups heads each", ge=1, dim="groups")
    state: int = setting(doc="state size per channel", ge=1)
    conv: int = setting(4, "taps of the depthwise causal convolution", ge=1)
    chunk: int = setting(128, "tokens per chunk of the scan", ge=1)
    norm_group: int = setting(doc="channels normalized together after the scan", ge=1)
    eps: float = setting(1e-5, "norm epsilon", gt=0)
    dt_min: float = setting(1e-3, "lower bound of the initial time step", gt=0)
    dt_max: float = setting(0.1, "upper bound of the initial time step", gt=0)
    dt_floor: float = setting(1e-4, "floor of the initial time step", gt=0)
    dt_limit: tuple[float, float] = setting((0.0, float("inf")), "clamp of the time step")

    def check(self) -> Iterator[Problem]:
        """Groups divide heads."""
        if self.heads % self.groups:
            yield Problem("groups", f"{self.groups} groups do not divide {self.heads} Mamba heads")

    @property
    def inner(self) -> int:
        """Channels that pass through the scan."""
        return self.heads * self.head_dim

    @property
    def in_rows(self) -> Dim:
        """Rows of the fused input projection, ``[z | x | B | C | dt]``."""
        return (
            Part("heads", self.heads, self.head_dim, "z"),
            *self.conv_rows,
            Part("heads", self.heads, 1, "dt"),
        )

    @property
    def conv_rows(self) -> Dim:
        """Channels of the convolution, ``[x | B | C]``."""
        return (
            Part("heads", self.heads, self.head_dim, "x"),
            Part("groups", self.groups, self.state, "B"),
            Part("groups", self.groups, self.state, "C"),
        )

    @property
    def in_proj(self) -> LinearConfig:
        """Fused input projection."""
        return LinearConfig(rows=self.in_rows, cols=dim("embed", self.embed), std=self.std)

    @property
    def norm(self) -> NormConfig:
        """Gated norm after the scan."""
        return NormConfig(dims=dim("heads", self.heads, self.head_dim), eps=self.eps, group=self.norm_group)

    @property
    def out_proj(self) -> LinearConfig:
        """Projection back to the residual."""
        return LinearConfig(
            rows=dim("embed", self.embed), cols=dim("heads", self.heads, self.head_dim), std=self.out_std
        )

    def params(self) -> tuple[ParamSpec, ...]:
        """Projections, convolution, per-head scalars and norm."""
        per_head = (dim("heads", self.heads),)
        scale = self.conv**-0.5
        dt_bias = Init("dt_bias", low=self.dt_min, high=self.dt_max, floor=self.dt_floor)
        return (
            *_named(in_proj=self.in_proj),
            ParamSpec("conv.weight", (self.conv_rows, dim("tap", self.conv)), Init("uniform", scale)),
            ParamSpec("conv.bias", (self.conv_rows,), Init("uniform", scale), decay=False),
            ParamSpec("A_log", per_head, Init("log_arange"), decay=False, fp32=True),
            ParamSpec("D", per_head, ONES, decay=False, fp32=True),
            ParamSpec("dt_bias", per_head, dt_bias, decay=False, fp32=True),
            *_named(norm=self.norm, out_proj=self.out_proj),
        )

    def flops_per_token(self, context: float) -> float:
        """Projections, convolution and the chunked scan as matrix products."""
        projections = 2 * self.embed * (size(self.in_rows) + self.inner)
        convolution = 2 * self.conv * size(self.conv_rows)
        within = self.chunk * (self.groups * self.state + self.inner)  # causal half of C B^T and its use
        across = 4 * self.inner * self.state  # chunk state in and out
        return projections + convolution + within + across


@dataclass(frozen=True, kw_only=True)
class AttentionConfig(MixerConfig):
    """Causal grouped-query attention without positional encoding (Ainslie et al. 2023)."""

    heads: int = setting(doc="query heads", ge=1, dim="heads")
    kv_heads: int = setting(doc="key and value heads", ge=1, dim="kv_heads")
    head_dim: int = setting(doc="channels per head", ge=1)

    def check(self) -> Iterator[Problem]:
        """Key/value heads divide query heads."""
        if self.heads % self.kv_heads:
            yield Problem(
                "kv_heads", f"{self.kv_heads} key/value heads do not divide {self.heads} query heads"
            )

    @property
    def qkv_proj(self) -> LinearConfig:
        """Fused query, key and value projection, ``[q | k | v]``."""
        rows = (
            Part("heads", self.heads, self.head_dim, "q"),
            Part("kv_heads", self.kv_heads, self.head_dim, "k"),
            Part("kv_heads", self.kv_heads, self.head_dim, "v"),
        )
        return LinearConfig(rows=rows, cols=dim("embed", self.embed), std=self.std)

    @property
    def o_proj(self) -> LinearConfig:
        """Projection back to the residual."""
        return LinearConfig(
            rows=dim("embed", self.embed), cols=dim("heads", self.heads, self.head_dim), std=self.out_std
        )

    def params(self) -> tuple[ParamSpec, ...]:
        """Fused qkv and output projection."""
        return _named(qkv_proj=self.qkv_proj, o_proj=self.o_proj)

    def flops_per_token(self, context: float) -> float:
        """Projections, scores and weighted values."""
        return 2 * self.active() + 4 * context * self.heads * self.head_dim


@dataclass(frozen=True, kw_only=True)
class MLPConfig(MixerConfig):
    """Squared-ReLU MLP (So et al. 2021), not gated: ``down(relu(up(x))^2)``."""

    mlp: int = setting(doc="inner width", ge=1, dim="mlp")

    @property
    def up_proj(self) -> LinearConfig:
        """Into the inner width."""
        return LinearConfig(rows=dim("mlp", self.mlp), cols=dim("embed", self.embed), std=self.std)

    @property
    def down_proj(self) -> LinearConfig:
        """Back to the residual."""
        return LinearConfig(rows=dim("embed", self.embed), cols=dim("mlp", self.mlp), std=self.out_std)

    def params(self) -> tuple[ParamSpec, ...]:
        """Up and down projection."""
        return _named(up_proj=self.up_proj, down_proj=self.down_proj)

    def flops_per_token(self, context: float) -> float:
        """Two products."""
        return 2 * self.active()


DropPolicy = Literal["probs", "position"]


@dataclass(frozen=True, kw_only=True)
class RouterConfig(Config):
    """Sigmoid router with correction bias and group limit (DeepSeek-V3, arXiv 2412.19437, 2.1.2).

    The balance losses differ in the tokens whose choices they count: those of a document (``aux_coef``), of
    all ranks in one forward pass (``batch_coef``), or of the step so far (``global_coef``, arXiv 2501.11873).
    """

    embed: int = setting(doc="residual width", ge=1, dim="embed")
    experts: int = setting(doc="routed experts", ge=1)
    top_k: int = setting(doc="experts per token", ge=1)
    expert_groups: int = setting(1, "groups of experts for group-limited routing", ge=1)
    top_groups: int = setting(1, "groups a token may use", ge=1)
    normalize: bool = setting(True, "divide the chosen scores by their sum")
    scale: float = setting(1.0, "factor on the routing weights")
    aux_coef: float = setting(0.0, "coefficient of the per-document auxiliary loss", ge=0)
    batch_coef: float = setting(0.0, "coefficient of the balance loss of a forward pass", ge=0)
    global_coef: float = setting(0.0, "coefficient of the balance loss of the step so far", ge=0)
    z_coef: float = setting(0.0, "coefficient of the z-loss", ge=0)
    capacity_factor: float = setting(
        0.0, "tokens an expert takes of a group, over an even share; 0 is all", ge=0
    )
    capacity_tokens: int = setting(0, "tokens of a group inside one sample; 0 is the sample", ge=0)
    drop_policy: DropPolicy = setting("probs", "what an expert keeps: large weights, or first tokens")
    pad_to_capacity: bool = setting(False, "pad every expert to its capacity, so that shapes are static")
    jitter: float = setting(0.0, "the input is scaled by U(1 - jitter, 1 + jitter) in training", ge=0, lt=1)
    force_balance: bool = setting(False, "choose experts in turn instead of by score (for benchmarks)")
    std: float = setting(0.02, "standard deviation of initial weights", ge=0)

    def check(self) -> Iterator[Problem]:
        """top_k fits the experts that group-limited routing leaves; capacity settings go together."""
        if not self.capacity_factor:
            for name in ("capacity_tokens", "pad_to_capacity"):
                if value := getattr(self, name):
                    fix = "set moe_capacity_factor (1.25, say), or leave this out"
                    yield Problem(name, f"{value} without a capacity; {fix}")
        if self.experts < self.top_k:
            yield Problem(
                "top_k", f"{self.top_k} experts per token, but there are only {self.experts} experts"
            )
        if self.experts % self.expert_groups:
            yield Problem(
                "expert_groups", f"{self.expert_groups} groups do not divide {self.experts} experts"
            )
        elif self.top_groups > self.expert_groups:
            yield Problem("top_groups", f"{self.top_groups} exceeds the {self.expert_groups} expert groups")
        elif self.experts // self.expert_groups * self.top_groups < min(self.top_k, self.experts):
            yield Problem(
                "top_groups", f"{self.top_groups} groups hold fewer than top_k = {self.top_k} experts"
            )

    def params(self) -> tuple[ParamSpec, ...]:
        """Router matrix and the correction bias, which a rule updates."""
        rows = dim("experts", self.experts)
        return (
            ParamSpec("weight", (rows, dim("embed", self.embed)), Init("normal", self.std)),
            ParamSpec("bias", (rows,), ZEROS, decay=False, fp32=True, buffer=True),
        )


@dataclass(frozen=True, kw_only=True)
class MoEConfig(MixerConfig):
    """Mixture of experts, in a latent width when ``latent`` > 0 (LatentMoE, arXiv 2512.20856)."""

    router: RouterConfig = setting(doc="the router")
    mlp: int = setting(doc="inner width of one expert", ge=1)
    latent: int = setting(0, "width in which experts work; 0 is the residual width", ge=0)
    shared_mlp: int = setting(0, "inner width of the shared expert; 0 is none", ge=0, dim="mlp")

    @property
    def width(self) -> int:
        """Width in which experts read and write."""
        return self.latent or self.embed

    @property
    def experts(self) -> int:
        """Routed experts."""
        return self.router.experts

    @property
    def shared(self) -> MLPConfig:
        """The shared expert."""
        return MLPConfig(embed=self.embed, mlp=self.shared_mlp, std=self.std, out_std=self.out_std)

    @property
    def latent_down(self) -> LinearConfig:
        """Residual width to latent width."""
        return LinearConfig(rows=dim("latent", self.latent), cols=dim("embed", self.embed), std=self.std)

    @property
    def latent_up(self) -> LinearConfig:
        """Latent width back to the residual."""
        return LinearConfig(rows=dim("embed", self.embed), cols=dim("latent", self.latent), std=self.out_std)

    def params(self) -> tuple[ParamSpec, ...]:
        """Router, stacked experts, shared expert and latent projections."""
        width = dim("latent" if self.latent else "width", self.width)
        experts, mlp = dim("experts", self.experts), dim("expert_mlp", self.mlp)
        down_std = self.std if self.latent else self.out_std
        specs = [p.under("router") for p in self.router.params()]
        specs.append(ParamSpec("experts.up_proj", (experts, mlp, width), Init("normal", self.std)))
        specs.append(ParamSpec("experts.down_proj", (experts, width, mlp), Init("normal", down_std)))
        if self.shared_mlp:
            specs += [p.under("shared") for p in self.shared.params()]
        if self.latent:
            specs += _named(latent_down=self.latent_down, latent_up=self.latent_up)
        return tuple(specs)

    def active(self) -> int:
        """All but the experts that a token does not use."""
        idle = (self.experts - self.router.top_k) * 2 * self.width * self.mlp
        return sum(p.numel for p in self.params()) - idle

    def flops_per_token(self, context: float) -> float:
        """Router, chosen experts, shared expert and latent projections."""
        return 2 * (self.active() - self.experts)
