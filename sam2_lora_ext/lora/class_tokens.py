"""The learned tokens of the classes, and the point labels that select them in SAM 2's prompt encoder.

    label of token k of class position c = FIRST_LABEL + c K + k

SAM 2 uses the labels -1 (padding), 0 and 1 (clicks), 2 and 3 (corners of a box). Needs torch only.

Legend: C classes, K tokens of a class, D width of a prompt token, N prompts. The position of a class, 0 to C - 1, is
its index in the ascending list of class ids.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sam2_lora_ext.utils.errors import UserError

FIRST_LABEL = 16
MOST_LABELS = 2**20  # stock converts labels to float32, which is exact far beyond this
TOKENS = "class_tokens"  # the prompt encoder's attribute for its `ClassTokens`
STATE_KEY = f"sam_prompt_encoder.{TOKENS}.tokens"  # of the parameter in the state dict of a SAM 2


class ClassTokens(nn.Module):
    """The parameter `tokens` float32 [C, K, D] and the classes that it represents.

    Args:
        tokens: the initial values.
        class_ids: the ids of the C classes in the data, ascending, not necessarily 1 to C.
        class_names: their names.
        crop: columns of the training windows; None for whole images, or if unknown.
        exclusive: whether a pixel has at most one class.

    Raises:
        UserError: the shapes do not fit, an id or name is repeated, ids are not ascending, or a value is not finite.
    """

    def __init__(
        self,
        tokens: Tensor,
        class_ids: Sequence[int],
        class_names: Sequence[str],
        crop: int | None = None,
        exclusive: bool = True,
    ):
        super().__init__()
        if tokens.dim() != 3 or 0 in tokens.shape:
            raise UserError(f"class tokens must be [classes, tokens, width], each at least 1, got {list(tokens.shape)}")
        self.class_ids = tuple(int(class_id) for class_id in class_ids)
        self.class_names = tuple(str(name) for name in class_names)
        if not len(tokens) == len(self.class_ids) == len(self.class_names):
            raise UserError(
                f"class tokens of {len(tokens)} classes need the same number of ids and names, got "
                f"{list(self.class_ids)} and {list(self.class_names)}"
            )
        if list(self.class_ids) != sorted(set(self.class_ids)) or self.class_ids[0] < 0:
            raise UserError(
                f"the class ids of class tokens must be distinct whole numbers of at least 0 in ascending "
                f"order, got {list(self.class_ids)}"
            )
        if len(set(self.class_names)) < len(self.class_names):
            raise UserError(f"each class needs its own name, got {list(self.class_names)}")
        if tokens.shape[0] * tokens.shape[1] > MOST_LABELS:
            raise UserError(f"{tokens.shape[0]} classes of {tokens.shape[1]} tokens exceed {MOST_LABELS} labels")
        if not tokens.isfinite().all():
            raise UserError("class tokens must be finite, but some are NaN or infinite")
        self.crop, self.exclusive = crop, exclusive
        self.tokens = nn.Parameter(tokens.detach().float().clone())

    def extra_repr(self) -> str:
        return f"classes={len(self.class_ids)}, tokens={self.tokens.shape[1]}, width={self.tokens.shape[2]}"

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Loads as usual, but the tokens may be missing, so that Meta's files still load strictly."""
        if f"{prefix}tokens" in state_dict:
            super()._load_from_state_dict(state_dict, prefix, *args)

    def position_of(self, class_ids: Tensor) -> Tensor:
        """The positions int64 of class ids of any shape and number type; synchronises with a GPU.

        Raises:
            UserError: there are no tokens for one of the ids.
        """
        wanted = class_ids.long()
        known = torch.tensor(self.class_ids, device=wanted.device)
        positions = torch.searchsorted(known, wanted.contiguous()).clamp(max=len(known) - 1)
        if unknown := wanted[known[positions] != wanted].flatten().tolist():
            classes = ", ".join(f"{key} {name}" for key, name in zip(self.class_ids, self.class_names))
            raise UserError(f"there is no class prompt for class {unknown[0]}: the model has prompts for {classes}")
        return positions

    def prompt_of(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """The points that prompt for the classes at `positions` int64 [N].

        Returns:
            Coordinates float32 [N, K, 2], all 0 and without effect, and labels int32 [N, K].
        """
        count = self.tokens.shape[1]
        places = torch.arange(count, device=positions.device)
        labels = (FIRST_LABEL + positions[:, None] * count + places).int()
        return torch.zeros(*labels.shape, 2, device=positions.device), labels

    def rows(self, labels: Tensor) -> Tensor:
        """The token [..., D] of each label; a label outside the range is clamped to the nearest valid one."""
        table = self.tokens.flatten(0, 1)
        return nn.functional.embedding((labels.long() - FIRST_LABEL).clamp(0, len(table) - 1), table)


def find_tokens(model: nn.Module) -> ClassTokens | None:
    """The class tokens of a model, found by their type; None if it has none."""
    return next((module for module in model.modules() if isinstance(module, ClassTokens)), None)
