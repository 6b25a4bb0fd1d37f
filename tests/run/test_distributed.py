"""Several gloo ranks through SAM 2's launcher: one training, whatever their number."""

import json
import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hydra.utils import instantiate

from helpers.ranks import recorded, run_ranks, start, with_recorder
from helpers.small_runs import config_of, environment, make_strips, rank_environment, train_here

# The same samples and clicks however they are spread: no random transforms, all objects, clicks by object, no dropout.
SPREADABLE = (
    "trainer.model.prompt_seed=1",
    "trainer.model.prob_to_sample_from_gt_for_train=0.0",
    "scratch.max_num_objects=null",
    "lora.dropout=0.0",
    "scratch.clean_share=0.0",
    "trainer.data.val.batch_sizes=[1]",
    "trainer.early_stop={patience: 1, min_delta: 2.0}",
    "scratch.steps=20",
    # Adam's first steps turn the sign of a tiny gradient into a whole step
    "trainer.optim.optimizer._target_=torch.optim.SGD",
    "scratch.lr=0.1",
)
VALIDATION = "${trainer.data.val.datasets[0]."
FIXED = (
    "trainer.data.train.datasets=[{_target_: training.dataset.vos_dataset.VOSDataset, training: true, multiplier: 1, "
    f"video_dataset: '{VALIDATION}video_dataset}}', transforms: '{VALIDATION}transforms}}', "
    f"sampler: '{VALIDATION}sampler}}'}}]"
)


def test_two_ranks_train_as_one(tmp_path, nano_base, strips, recorder):
    """Adapters are equal on both after every step; batch 1 on two ranks is batch 2 on one; both stop early."""
    shared = [*SPREADABLE, FIXED]
    process = start(tmp_path, nano_base, strips, 2, [*shared, "scratch.batch_size=1", *with_recorder(recorder)], "two")
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 0, output[-4000:]
    for what in ("rank", "after"):  # the gradients of each step, all parameters after it
        first, second = (recorded(recorder, rank, what) for rank in (0, 1))
        assert len(first) == len(second) == 4  # both stopped after the second phase of ten
        assert [row["digest"] for row in first] == [row["digest"] for row in second]
        assert len({row["digest"] for row in first}) == 4
    assert recorded(recorder, 0)[0]["pid"] != recorded(recorder, 1)[0]["pid"]

    train_here(
        environment(nano_base, strips, tmp_path / "one"),
        *(f"++{setting}" for setting in shared),
        "scratch.batch_size=2",
    )
    states = [torch.load(tmp_path / name / "checkpoints/checkpoint.pt", weights_only=True) for name in ("one", "two")]
    assert states[0]["epoch"] == states[1]["epoch"] == 2
    for key, value in states[0]["model"].items():
        torch.testing.assert_close(
            states[1]["model"][key], value, rtol=1e-4, atol=1e-6
        )  # the order of sums, over 4 steps
    moved = [float(value.abs().max()) for key, value in states[0]["model"].items() if key.endswith("lora_b")]
    assert min(moved) > 0 and max(moved) > 1e-3


def test_only_the_gradients_of_adapters_travel():
    """Counted in DDP's communication hook; `python -m benchmarks.traffic` does the same for SAM 2.1 large."""
    from benchmarks.traffic import reduced_bytes

    with rank_environment({}):
        dist.init_process_group("gloo")
        sent, trained = reduced_bytes("demo")
    assert trained == 123_200 and sent == 4 * trained


@pytest.mark.slow
def test_sam_2_1_large_sends_under_a_percent(tmp_path):
    """Rank 8 on the default targets against full fine-tuning, on the real models, as `make bench` prints it."""
    from benchmarks.traffic import main

    assert main(["--out", str(tmp_path / "traffic.json")]) == 0
    lora, full = json.loads((tmp_path / "traffic.json").read_text())
    for row in (lora, full):
        assert row["bytes_per_step"] == 4 * row["params_trained"]
    assert full["params_trained"] > 220_000_000 and 0 < lora["share"] < 0.01
    assert lora["share"] == lora["bytes_per_step"] / full["bytes_per_step"]


@pytest.fixture(scope="module")
def seven(tmp_path_factory) -> Path:
    """Twenty-one strips, of which seven validate."""
    return make_strips(tmp_path_factory.mktemp("seven"), 21)


@pytest.mark.slow
@pytest.mark.parametrize("prompt", ["click", "box"])
def test_validation_does_not_depend_on_the_ranks(prompt, tmp_path, nano_base, seven):
    """1, 2 and 3 ranks, which do not divide the samples: every metric is the same to the last digit."""
    settings = [
        "trainer.mode=val",
        "trainer.data.val.batch_sizes=[1]",
        f"trainer.model.prob_to_use_box_input_for_eval={float(prompt == 'box')}",
    ]
    config = config_of(environment(nano_base, seven, tmp_path / "none"), settings)
    samples = len(instantiate(config.trainer.data.val.datasets[0]))
    assert samples % 2 and samples % 3
    results = []
    train_here(environment(nano_base, seven, tmp_path / "run1"), *settings)
    for ranks in (1, 2, 3):
        if ranks > 1:
            process = start(tmp_path, nano_base, seven, ranks, settings, f"run{ranks}")
            output = process.communicate(timeout=300)[0]
            assert process.returncode == 0, output[-3000:]
        stats = json.loads((tmp_path / f"run{ranks}/logs/val_stats.json").read_text().splitlines()[0])
        results.append({key: value for key, value in stats.items() if key.startswith("Meters_train/")})
    assert results[0] == results[1] == results[2] and len(results[0]) > 10


@pytest.mark.slow
def test_weights_that_are_not_finite_on_one_rank(tmp_path, nano_base, strips, recorder):
    """By a gradient that went bad after its check, so that only rank 1's next loss does: the whole job ends."""
    one_phase = ["scratch.steps_per_phase=6", *with_recorder(recorder, action="nan", rank=1, step=2)]
    process = start(tmp_path, nano_base, strips, 2, one_phase)
    output = process.communicate(timeout=300)[0]
    assert process.returncode != 0
    sentence = r"error: (rank 1: )?the loss \(train\) is not finite at step 3 \(samples: syn"
    assert re.search(sentence, output), output[-3000:]
    assert [path.name for path in (tmp_path / "run/debug").iterdir()] == ["step3_rank1.pt"]


def test_a_loss_that_is_not_finite_on_one_rank_is_told_by_all(tmp_path):
    """Both raise the sentence of the rank that met it, which alone has kept its batch."""
    program = (
        "import os, sys, types, torch; import torch.distributed as dist\n"
        "from pathlib import Path\nfrom sam2_lora_ext.run.guard import StepGuard\n"
        "dist.init_process_group('gloo'); rank = dist.get_rank()\n"
        "ids = torch.tensor([[[rank, 1, 0]]]); batch = types.SimpleNamespace(img_batch=ids, masks=ids, "
        "obj_to_frame_idx=ids, metadata=types.SimpleNamespace(unique_objects_identifier=ids))\n"
        "loss = torch.tensor(float('nan') if rank else 1.0)\n"
        "try:\n    StepGuard(Path(sys.argv[1])).watch(batch, {'Losses/total': loss}, 3, 'train', [])\n"
        "except ValueError as error:\n    Path(sys.argv[1], f'said{rank}').write_text(str(error))\n"
    )
    run_ranks(program, tmp_path, 2)
    said = [(tmp_path / f"said{rank}").read_text() for rank in (0, 1)]
    assert said[0] == said[1] and "the loss (train) is not finite at step 3 (samples: 1; losses: total nan)" in said[0]
    assert [path.name for path in tmp_path.glob("*.pt")] == ["step3_rank1.pt"]
