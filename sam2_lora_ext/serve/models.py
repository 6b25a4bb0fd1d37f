"""Loads the models of the page: a base with its adapters, and other full weights."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from sam2_lora_ext.adapters.sources import find_adapter, source_files
from sam2_lora_ext.adapters.weights import identify, read_weights
from sam2_lora_ext.deploy.load import load_sam2
from sam2_lora_ext.evaluate.models import short_name, split_name
from sam2_lora_ext.serve.classes import Inspector, maker_of
from sam2_lora_ext.serve.engine import Model
from sam2_lora_ext.utils.errors import UserError


@dataclass
class Loaded:
    """The models and their class prompts.

    Attributes:
        models: in the order of the page's list.
        makers: model's name -> function that builds its inspector, for models with class prompts.
        class_names: of the class prompts; empty without any.
        inputs: the files that were read.
    """

    models: list[Model] = field(default_factory=list)
    makers: dict[str, Callable[[], Inspector]] = field(default_factory=dict)
    class_names: dict[int, str] = field(default_factory=dict)
    inputs: list[Path] = field(default_factory=list)


def load_models(
    checkpoint: Path,
    adapters: Mapping[str, Path],
    others: Sequence[Path] = (),
    *,
    config: str | None = None,
    image_size: int | None = None,
    device: str = "cpu",
) -> Loaded:
    """Builds each network once; adapters share the checkpoint's network.

    Args:
        checkpoint: full weights, the base of the adapters.
        adapters: by name.
        others: more full weights, such as the base of a merged file.
        config: a stock config's name; None identifies it from each weight file.
        image_size: side of the models' input in pixels.
        device: such as cuda.

    Raises:
        UserError: weights or adapters are missing or do not fit, two have the same name, or class tables differ.
    """
    loaded = Loaded()
    for place, path in enumerate((checkpoint, *others)):
        if path.is_dir():
            raise UserError(f"{path} is a folder: give a weight file here, and a run or adapter folder with --adapter")
        if not path.is_file():
            raise UserError(f"there is no file {path}: give weights of a SAM 2, such as those from merge_lora.py")
        own = config or identify(read_weights(path))
        if own is None:
            raise UserError(f"{path} does not look like a stock SAM 2: name its config with --config")
        chosen = {} if place else dict(adapters)
        network = load_sam2(own, path, chosen, image_size=image_size, device=device)
        for name, where in ((path.stem, None), *chosen.items()):
            if name in {model.name for model in loaded.models}:
                how = f"rename the file {path}" if where is None else "name adapters with --adapter NAME=PATH"
                raise UserError(f"two models are called {name!r}: {how}")
            source = path if where is None else find_adapter(where)
            loaded.models.append(Model(name, network, None if where is None else name, source))
            loaded.inputs += [path] if where is None else source_files(source)
            _add_class_prompts(loaded, name, maker_of(own, source, None if where is None else path, device))
    return loaded


def _add_class_prompts(loaded: Loaded, name: str, found: tuple[Callable[[], Inspector], dict[int, str]] | None) -> None:
    if found is None:
        return
    loaded.makers[name], table = found
    for number, word in table.items():
        if loaded.class_names.setdefault(number, word) != word:
            raise UserError(
                f"class {number} is {loaded.class_names[number]!r} in one model, but {word!r} in {name}: serve one only"
            )


def named_adapters(texts: Sequence[str]) -> dict[str, Path]:
    """Adapters by name, from `PATH` or `NAME=PATH`; by default a run's adapter has the run's name.

    Raises:
        UserError: two have the same name.
    """
    found: dict[str, Path] = {}
    for text in texts:
        given, path = split_name(text)
        name = short_name(path) if given is None else given
        if name in found:
            raise UserError(f"two adapters are called {name!r}: name them with --adapter NAME=PATH")
        found[name] = path
    return found
