"""Unmerging: recovers an adapter from the difference between a merged file and its base. Needs torch only.

    D = merged - base = U S V^T,   B = U_r sqrt(S_r),   A = sqrt(S_r) V_r^T

B A is the closest matrix of rank r to D (Eckart and Young). By default r is the numerical rank of D: a singular value
counts when it is above e/2 rms(merged) (sqrt(out) + sqrt(in)), twice the norm of the rounding errors at machine
precision e. A fused `qkv` is adapted by parts if that takes fewer parameters. Shapes: see `lora/layer.py`.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from sam2_lora_ext.adapters.merge_state import one_thread
from sam2_lora_ext.adapters.names import LARGEST_ERROR
from sam2_lora_ext.adapters.weights import explain_mismatch
from sam2_lora_ext.lora import Adapter, LayerAdapter
from sam2_lora_ext.lora.config import QKV
from sam2_lora_ext.lora.inject import above, outermost
from sam2_lora_ext.lora.layer import PLAIN
from sam2_lora_ext.utils.errors import UserError

LOW = 0.9  # a rank is low up to this share of the largest possible one; training in full gives nearly full rank


@dataclass
class Recovered:
    """An adapter from a merged file.

    Attributes:
        adapter: with a scaling of 1; modules that were trained in full have the merged file's values.
        errors: by layer, |D - B A| / |D| (Frobenius).
        max_abs_weight_diff: largest difference between the merged file and the base with this adapter, over its layers.
    """

    adapter: Adapter
    errors: dict[str, float]
    max_abs_weight_diff: float


class Change:
    """The change of one linear layer: D (out, in) in one piece, and by the parts of a fused layer."""

    def __init__(self, name: str, base: Tensor, merged: Tensor) -> None:
        self.name, self.delta = name, merged.double() - base.double()
        self.fused = name.rpartition(".")[2] == "qkv" and len(base) % len(QKV) == 0
        pairs = zip(merged.chunk(len(QKV)), base.chunk(len(QKV)))
        self.touched = tuple(not _same(part, before) for part, before in pairs) if self.fused else PLAIN
        # the rounding error of a value v is at most e/2 |v|
        self.rounding = torch.finfo(merged.dtype).eps / 2 * float(merged.double().norm())
        self._spectra: dict[tuple[bool, ...], list[tuple[Tensor, Tensor, Tensor]]] = {}

    def spectra(self, parts: tuple[bool, ...]) -> list[tuple[Tensor, Tensor, Tensor]]:
        """U, S, V^T of each adapted part."""
        if parts not in self._spectra:
            chunks = zip(self.delta.chunk(len(parts)), parts)
            self._spectra[parts] = [torch.linalg.svd(part, full_matrices=False) for part, adapted in chunks if adapted]
        return self._spectra[parts]

    def rank(self, parts: tuple[bool, ...]) -> int:
        """The numerical rank, the largest of the parts; at least 1."""
        out, inputs = self.delta.shape
        noise = self.rounding / math.sqrt(out * inputs) * (math.sqrt(out // len(parts)) + math.sqrt(inputs))
        return max(1, *(int((values > noise).sum()) for _, values, _ in self.spectra(parts)))

    def largest_rank(self, parts: tuple[bool, ...]) -> int:
        """The largest possible rank of a part."""
        return len(self.spectra(parts)[0][1])

    def numbers(self, parts: tuple[bool, ...]) -> int:
        """The number of parameters of an adapter of that rank."""
        out, inputs = self.delta.shape
        return self.rank(parts) * sum(parts) * (inputs + out // len(parts))

    def layer(self, parts: tuple[bool, ...], rank: int) -> LayerAdapter:
        """The update truncated to a rank, at most the largest possible one."""
        spectra = self.spectra(parts)
        rank = min(rank, self.largest_rank(parts))
        roots = [values[:rank].sqrt() for _, values, _ in spectra]
        a = torch.cat([root[:, None] * vh[:rank] for root, (_, _, vh) in zip(roots, spectra)])
        b = torch.cat([u[:, :rank] * root for root, (u, _, _) in zip(roots, spectra)])
        return LayerAdapter(a.float(), b.float(), float(rank), False, parts)


def unmerge(
    base: Mapping[str, Tensor],
    merged: Mapping[str, Tensor],
    rank: int | None = None,
    *,
    bound: float = LARGEST_ERROR,
    keep_full: bool = False,
    shown: Callable[[Iterable[Change]], Iterable[Change]] = lambda changes: changes,
) -> Recovered:
    """The adapter that turns `base` into `merged`.

    Args:
        base: the weights that were merged into.
        merged: the result, in any precision.
        rank: of each layer (of each adapted part); by default the numerical rank.
        bound: largest error of a layer as a share of its change, in addition to rounding errors.
        keep_full: keep changes that are not low-rank updates of linear layers as modules trained in full.
        shown: wraps the layers in a progress bar.

    Raises:
        UserError: the two are equal or of different models, or a change is not of low rank within the bound.
    """
    if rank is not None and rank < 1:
        raise UserError(f"--rank must be at least 1, got {rank}")
    if not 0 <= bound < 1:
        raise UserError(f"--bound is a share from 0 to below 1, got {bound:g}")
    if mismatch := explain_mismatch(merged, base):
        raise UserError(f"the merged file is not of the base's model: {mismatch}")
    changed = [key for key in base if not _same(merged[key], base[key])]
    if not changed:
        raise UserError("the merged file holds the base's values: nothing was merged into it")
    for key in changed:
        if not merged[key].isfinite().all():
            raise UserError(f"{key} of the merged file holds NaN or infinity: use another one")
    linear = {key.removesuffix(".weight"): key for key in changed if _is_linear(key, base, changed)}
    full = {
        key: "changed, and is not the weight of a linear layer with an unchanged bias"
        for key in changed
        if key not in linear.values()
    }
    layers, errors, largest = {}, {}, 0.0
    with one_thread():
        changes = [Change(name, base[key], merged[key]) for name, key in linear.items()]
        parts = _parts([change for change in changes if change.fused])
        for change in shown(changes):
            own = parts if change.fused else PLAIN
            seen = change.rank(own)
            layer = change.layer(own, rank or seen)
            rest = change.delta - layer.delta_weight()
            error, size = float(rest.norm()), float(change.delta.norm())
            if rank is None and seen > LOW * (largest_rank := change.largest_rank(own)):
                full[linear[change.name]] = f"changed by a matrix of rank {seen} of {largest_rank}, which is not low"
            elif error > bound * size + change.rounding:
                full[linear[change.name]] = (
                    f"differs by {error / size:.3g} of its change at rank {layer.rank} ({bound:g} is allowed)"
                )
            else:
                layers[change.name], errors[change.name] = layer, error / size
                largest = max(largest, float(rest.abs().max()))
    if full and not keep_full:
        key, what = next(iter(full.items()))
        more = f", and {len(full) - 1} more tensors have no low-rank change" if len(full) > 1 else ""
        raise UserError(
            f"{key} {what}{more}: give --full to keep such modules whole, or for a cruder adapter --rank "
            "with a larger --bound"
        )
    modules = _modules(full, layers)
    kept = {key: value for key, value in merged.items() if any(key.startswith(f"{module}.") for module in modules)}
    return Recovered(Adapter(layers, kept, modules), errors, largest)


def _same(merged: Tensor, base: Tensor) -> bool:
    return torch.equal(merged, base.to(merged.dtype))  # a half-precision file differs from its base by rounding alone


def _is_linear(key: str, base: Mapping[str, Tensor], changed: list[str]) -> bool:
    """Whether it is the weight of an `nn.Linear` with an unchanged bias; an embedding has no bias."""
    bias = f"{key.removesuffix('.weight')}.bias"
    return key.endswith(".weight") and base[key].dim() == 2 and bias in base and bias not in changed


def _parts(fused: list[Change]) -> tuple[bool, ...]:
    """The `parts` with fewer parameters, for all fused layers alike, since a config has only one value."""
    if not fused:
        return PLAIN
    touched = tuple(any(flags) for flags in zip(*(change.touched for change in fused)))
    apart, whole = (sum(change.numbers(parts) for change in fused) for parts in (touched, PLAIN))
    return touched if apart < whole else PLAIN


def _modules(full: Iterable[str], layers: Mapping[str, LayerAdapter]) -> list[str]:
    modules = list(dict.fromkeys(key.rpartition(".")[0] for key in full))
    for key, module in zip(full, (key.rpartition(".")[0] for key in full)):
        inside = next((name for name in layers if module in (name, *above(name))), None)
        if not module or inside:
            whole = f"{module}, {inside} included" if module else "the model"
            raise UserError(f"{key} changed, which an adapter can hold only with all of {whole}: keep the merged file")
    return outermost(modules)
