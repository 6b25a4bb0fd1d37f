"""Runs with class prompts: the tokens' learning rate, the files of a run, and a rank without one of the classes."""

import json

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from training.optimizer import construct_optimizer

from helpers.class_batches import CLASSES
from helpers.ranks import run_ranks
from helpers.small_runs import config_of, environment, train_here
from sam2_lora_ext.adapters.class_prompts import load_class_prompts
from sam2_lora_ext.adapters.sources import read_adapter
from sam2_lora_ext.adapters.weights import read_weights
from sam2_lora_ext.inspection.segmenter import load_segmenter
from sam2_lora_ext.lora.class_tokens import STATE_KEY, find_tokens

DEMO = "configs/demo_classes.yaml"


@pytest.fixture(scope="module")
def run(tmp_path_factory, nano_base, strips):
    """The folder and Trainer of a run of the demo's config: three phases of two steps, with a merged file."""
    folder = tmp_path_factory.mktemp("classes") / "run"
    trainer = train_here(environment(nano_base, strips, folder), "trainer.export.merged=true", name=DEMO)
    return folder, trainer


def test_tokens_have_their_own_rate_and_no_weight_decay(tmp_path, nano_base, strips):
    trainer = config_of(environment(nano_base, strips, tmp_path / "run"), ["scratch.token_lr=0.03"], DEMO).trainer
    model = instantiate(trainer.model, _convert_="all")
    optimizer = construct_optimizer(
        model, trainer.optim.optimizer, OmegaConf.create(OmegaConf.to_container(trainer.optim.options)), None
    )
    optimizer.step_schedulers(0.05, step=0)  # the end of the warm-up
    groups = {id(value): group for group in optimizer.optimizer.param_groups for value in group["params"]}
    adapter = next(value for name, value in model.named_parameters() if name.endswith("lora_a"))
    tokens, other = groups[id(find_tokens(model).tokens)], groups[id(adapter)]
    assert tokens["lr"] == pytest.approx(0.03) and tokens["weight_decay"] == 0 and len(tokens["params"]) == 1
    assert other["lr"] == pytest.approx(3e-3) and other["weight_decay"] == pytest.approx(0.01)


def test_what_a_run_leaves(run, nano_base):
    """Checkpoint and adapters have the same tokens, the merged file those of the best adapter; both can inspect."""
    folder, trainer = run
    checkpoint = read_weights(folder / "checkpoints/checkpoint.pt")
    assert {key for key in checkpoint if "lora" not in key and "obj_score" not in key} == {STATE_KEY}
    tokens = (
        find_tokens(trainer.model).tokens
        if not hasattr(trainer.model, "module")
        else find_tokens(trainer.model.module).tokens
    )
    assert torch.equal(checkpoint[STATE_KEY], tokens.detach())
    final, latest = (read_adapter(folder / "adapters" / kind) for kind in ("final", "latest"))
    of_checkpoint = read_adapter(folder / "checkpoints/checkpoint.pt")
    for adapter in (final, latest, of_checkpoint):
        assert torch.equal(adapter.class_prompts.tokens, checkpoint[STATE_KEY])
        assert adapter.class_prompts.crop == 256 and adapter.class_prompts.resolution == 128
        assert adapter.class_prompts.class_names == ("defect_1", "defect_2", "defect_3", "defect_4")
    assert adapter.class_prompts.base_id == adapter.metadata["base_id"] and not final.class_prompts.decision.fitted
    best = read_adapter(folder)
    assert torch.equal(load_class_prompts(folder / "merged_best.pt").tokens, best.class_prompts.tokens)
    assert STATE_KEY not in read_weights(folder / "merged_best.pt")
    facts = json.loads((folder / "lora.json").read_text())
    assert "sam_prompt_encoder.class_tokens" in facts["groups"]["full modules"]["layers"]
    image = torch.zeros(64, 300, 3, dtype=torch.uint8).numpy()
    one, other = (load_segmenter(None, path, device="cpu")(image) for path in (folder, folder / "merged_best.pt"))
    torch.testing.assert_close(one.logits, other.logits, rtol=1e-4, atol=1e-4)


def test_full_fine_tuning_leaves_weights_with_class_prompts_beside(tmp_path, nano_base, strips):
    folder = tmp_path / "run"
    train_here(
        environment(nano_base, strips, folder),
        "trainer.model.lora=null",
        "scratch.lr=1e-5",
        "trainer.checkpoint.model_weight_initializer.ignore_missing_keys=null",
        "trainer.distributed.find_unused_parameters=true",
        "scratch.steps=2",
        name=DEMO,
    )
    state = read_weights(folder / "weights/final.pt")
    assert STATE_KEY not in state and state.keys() == read_weights(nano_base).keys()
    assert load_segmenter(None, folder / "weights/final.pt", device="cpu").prompts.tokens.shape == (4, 8, 64)


PROGRAM = """
import os, sys, torch
from pathlib import Path
sys.path.insert(0, {tests!r})
from helpers.class_batches import gradients_of_ranks
rank = int(os.environ["RANK"])
torch.save(gradients_of_ranks(rank), Path(sys.argv[1], f"{{rank}}.pt"))
"""


def test_no_rank_waits_for_a_token_of_a_class_that_it_lacks(tmp_path, repository):
    """Both ranks have the same gradients: of all classes' tokens in class steps, and zero for tokens in click steps."""
    run_ranks(PROGRAM.format(tests=str(repository / "tests")), tmp_path, 2)
    one, other = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    for kind in ("classes", "clicks"):
        for name, value in one[kind].items():
            assert value is not None and torch.equal(value, other[kind][name]), name
    gradient = one["classes"][STATE_KEY]
    assert gradient.shape[0] == len(CLASSES) and gradient.flatten(1).any(1).all()  # the score's, of absent ones too
    assert not one["clicks"][STATE_KEY].any()
