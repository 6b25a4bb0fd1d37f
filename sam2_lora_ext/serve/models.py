"""What `tools/serve.py` is given, as the models of the page: a base with its adapters, and other whole weights."""

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
    """The models, and what was found with them.

    Attributes:
        models: in the order in which the page lists them.
        makers: model's name -> what builds its inspector, for those with class prompts.
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
    """Builds every network once; adapters share the checkpoint's.

    Args:
        checkpoint: whole weights, the base of the adapters.
        adapters: by name.
        others: further whole weights, such as the base of a merged file.
        config: a stock config's name; None tells it from each weight file.
        image_size: pixels of a side of the models' input.
        device: such as cuda.

    Raises:
        UserError: weights or adapters are missing or do not fit, two have one name, or class tables contradict.
    """
    loaded = Loaded()
    for place, path in enumerate((checkpoint, *others)):
        if path.is_dir():
            raise UserError(f"{path} is a folder: give a weight file here, and a run or adapter folder with --adapter")
        if not path.is_file():
            raise UserError(f"there is no file {path}: give weights of a SAM 2, such as merge_lora.py writes")
        own = config or identify(read_weights(path))
        if own is None:
            raise UserError(f"{path} looks like no stock SAM 2: name its config with --config")
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
                f"class {number} is {loaded.class_names[number]!r} in one model, {word!r} in {name}: serve them apart"
            )


def named_adapters(texts: Sequence[str]) -> dict[str, Path]:
    """Adapters by name, of `PATH` or `NAME=PATH`; a run's adapter is called as the run.

    Raises:
        UserError: two have one name.
    """
    found: dict[str, Path] = {}
    for text in texts:
        given, path = split_name(text)
        name = short_name(path) if given is None else given
        if name in found:
            raise UserError(f"two adapters are called {name!r}: name them with --adapter NAME=PATH")
        found[name] = path
    return found
