"""The `lora:` block of a config: its fields, their defaults, and an error message for each wrong value."""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, TypeVar

from sam2_lora_ext.lora.layer import PLAIN
from sam2_lora_ext.utils.errors import UserError, check_keys

DEFAULT_TARGETS = (
    "image_encoder.trunk.blocks.*.attn.qkv",
    "image_encoder.trunk.blocks.*.attn.proj",
    "sam_mask_decoder.transformer.*.q_proj",
    "sam_mask_decoder.transformer.*.k_proj",
    "sam_mask_decoder.transformer.*.v_proj",
    "sam_mask_decoder.transformer.*.out_proj",
    "sam_mask_decoder.transformer.*.mlp.layers.*",
)
Number = TypeVar("Number", int, float)
QKV = ("q", "k", "v")  # order of the rows of Hiera's fused `qkv`
IMPLEMENTATIONS = ("plain", "lean")
VARIANTS = ("lora", "dora", "pissa")
DROPOUTS = ("inputs", "channels")


@dataclass
class LoRAConfig:
    """The layers that get an adapter, their ranks, and the modules trained in full.

    Globs are matched against full module names, `*` across dots too; one that matches nothing is an error. Where
    several patterns match a layer the last one wins, so that an override can be added at the end.

    Attributes:
        targets: globs of the `nn.Linear` layers to adapt.
        rank: r of the update B A.
        alpha: the update is scaled by alpha / r.
        dropout: probability in [0, 1) with which training zeroes an input of A.
        dropout_on: "inputs" draws for each number of an input, as PEFT does; "channels" draws once for all tokens of a
            call, which saves a pass over the activations but is another regulariser.
        rslora: scale by alpha / sqrt(r) instead (arXiv 2312.03732).
        rank_pattern: glob -> rank of the adapted layers that it matches.
        alpha_pattern: glob -> alpha of the adapted layers that it matches.
        qkv_parts: of layers named `qkv`, adapt only these, e.g. ["q", "v"]; None adapts the fused layer as one.
        trainable: globs of modules that are trained in full besides the adapters, e.g. "*.norm1".
        freeze_a: train only B and keep the initial A (LoRA-FA, arXiv 2308.03303): lean layers then save no input.
        variant: "lora", "dora" (arXiv 2402.09353) or "pissa" (arXiv 2404.02948), see `variants.py`.
        implementation: how the update is computed: "plain", or "lean": same results, less saved for backward.
    """

    targets: list[str] = field(default_factory=lambda: list(DEFAULT_TARGETS))
    rank: int = 8
    alpha: float = 16
    dropout: float = 0.05
    dropout_on: str = "inputs"
    rslora: bool = False
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    qkv_parts: list[str] | None = None
    trainable: list[str] = field(default_factory=list)
    freeze_a: bool = False
    variant: str = "lora"
    implementation: str = "plain"

    def __post_init__(self) -> None:
        """Copies containers (Hydra passes its own types) and checks every value; raises `UserError`."""
        self.targets = _names("targets", self.targets)
        self.trainable = _names("trainable", self.trainable)
        self.rank_pattern = _pattern("rank_pattern", self.rank_pattern)
        self.alpha_pattern = _pattern("alpha_pattern", self.alpha_pattern)
        for where, rank in {"rank": self.rank, **_entries("rank_pattern", self.rank_pattern)}.items():
            if type(rank) is not int or rank < 1:
                raise UserError(f"lora.{where} must be a whole number of at least 1, got {rank!r}")
        for where, alpha in {"alpha": self.alpha, **_entries("alpha_pattern", self.alpha_pattern)}.items():
            if not _is_number(alpha) or alpha <= 0:
                raise UserError(f"lora.{where} must be a number above 0, got {alpha!r}")
        if not _is_number(self.dropout) or not 0 <= self.dropout < 1:
            raise UserError(f"lora.dropout must be a number from 0 to below 1, got {self.dropout!r}")
        for where in ("rslora", "freeze_a"):
            if type(getattr(self, where)) is not bool:
                raise UserError(f"lora.{where} must be true or false, got {getattr(self, where)!r}")
        if self.qkv_parts is not None:
            self.qkv_parts = _names("qkv_parts", self.qkv_parts)
            if not self.qkv_parts or len(set(self.qkv_parts)) < len(self.qkv_parts) or set(self.qkv_parts) - set(QKV):
                raise UserError(f"lora.qkv_parts must be null or some of {list(QKV)}, each once, got {self.qkv_parts}")
        for where, choices in (("variant", VARIANTS), ("implementation", IMPLEMENTATIONS), ("dropout_on", DROPOUTS)):
            if getattr(self, where) not in choices:
                raise UserError(f"lora.{where} must be one of {list(choices)}, got {getattr(self, where)!r}")
        if self.variant == "dora" and self.qkv_parts is not None:
            raise UserError("lora.variant dora gives every row of a fused qkv a magnitude: set lora.qkv_parts to null")
        if not self.targets and not self.trainable:
            raise UserError("lora.targets and lora.trainable are both empty: there is nothing to train")

    @classmethod
    def of(cls, config: "LoRAConfig | Mapping[str, Any]") -> "LoRAConfig":
        """The config itself, or one made from a mapping such as Hydra's.

        Raises:
            UserError: the value is no mapping, has a key that is not a field, or a field has a wrong value.
        """
        if isinstance(config, cls):
            return config
        if not isinstance(config, Mapping):
            raise UserError(f"lora must be a mapping of settings, got {config!r}")
        known = [entry.name for entry in dataclasses.fields(cls)]
        check_keys("lora", config, known)
        return cls(**{key: config[key] for key in config})

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as JSON writes them and `of` reads them."""
        return dataclasses.asdict(self)

    def rank_of(self, name: str) -> int:
        """The rank of the layer `name`."""
        return _last_match(self.rank_pattern, name, self.rank)

    def alpha_of(self, name: str) -> float:
        """The alpha of the layer `name`."""
        return _last_match(self.alpha_pattern, name, self.alpha)

    def parts_of(self, name: str) -> tuple[bool, ...]:
        """`parts` of the layer `name`."""
        if self.qkv_parts is None or name.rpartition(".")[2] != "qkv":
            return PLAIN
        return tuple(part in self.qkv_parts for part in QKV)


def _last_match(pattern: Mapping[str, Number], name: str, default: Number) -> Number:
    return next((value for glob, value in reversed(pattern.items()) if fnmatchcase(name, glob)), default)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _entries(where: str, pattern: dict[str, Any]) -> dict[str, Any]:
    return {f"{where}[{glob!r}]": value for glob, value in pattern.items()}


def _names(where: str, value: Any) -> list[str]:
    if isinstance(value, str) or not isinstance(value, Iterable) or not all(isinstance(item, str) for item in value):
        raise UserError(f"lora.{where} must be a list of names, got {value!r}")
    return list(value)


def _pattern(where: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise UserError(f"lora.{where} must be a mapping from globs to numbers, got {value!r}")
    return dict(value)
