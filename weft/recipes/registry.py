"""Recipes by name. A recipe is a function without arguments that returns a whole run."""

from collections.abc import Callable, Mapping
from types import MappingProxyType

from weft.config.errors import ConfigError, Problem
from weft.config.suggest import did_you_mean
from weft.recipes import nemotron
from weft.recipes.digits import av_tiny, digits_vlm
from weft.recipes.stdlib_lm import stdlib_lm
from weft.spec.run import RunConfig

Recipe = Callable[[], RunConfig]

_ALL: tuple[Recipe, ...] = (
    stdlib_lm,
    digits_vlm,
    av_tiny,
    nemotron.nemotron_h_8b_pretrain,
    nemotron.nemotron_h_8b_pretrain_tiny,
    nemotron.nemotron_nano_9b_v2_pretrain,
    nemotron.nemotron_nano_9b_v2_pretrain_tiny,
    nemotron.nemotron3_nano_4b_pretrain,
    nemotron.nemotron3_nano_4b_pretrain_tiny,
    nemotron.nemotron3_nano_30b_pretrain,
    nemotron.nemotron3_nano_30b_pretrain_tiny,
    nemotron.nemotron3_super_pretrain,
    nemotron.nemotron3_super_pretrain_tiny,
    nemotron.nemotron3_ultra_pretrain,
    nemotron.nemotron3_ultra_pretrain_tiny,
    nemotron.nemotron3_nano_omni_sft,
    nemotron.nemotron3_nano_omni_sft_tiny,
)

RECIPES: Mapping[str, Recipe] = MappingProxyType({recipe.__name__: recipe for recipe in _ALL})

# "Nemotron 3 Nano" without a size is the 30B-A3B model.
_ALIASES: Mapping[str, str] = MappingProxyType(
    {
        "nemotron3_nano_pretrain": "nemotron3_nano_30b_pretrain",
        "nemotron3_nano_pretrain_tiny": "nemotron3_nano_30b_pretrain_tiny",
    }
)


def build(name: str) -> RunConfig:
    """The run that the recipe ``name`` describes.

    Raises:
        ConfigError: no recipe of that name.
    """
    recipe = RECIPES.get(_ALIASES.get(name, name))
    if recipe is None:
        message = f"no recipe of this name{did_you_mean(name, RECIPES)} (recipes: {', '.join(RECIPES)})"
        raise ConfigError([Problem(name, message)])
    return recipe()
