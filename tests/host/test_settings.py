"""The table of settings agrees with the classes that it describes, and is checked before anything is built."""

import contextlib
import inspect
import io
from pathlib import Path

import pytest
from hydra.utils import get_object
from omegaconf import OmegaConf

from helpers.small_runs import config_of, environment, rank_environment, train_here
from sam2_lora_ext.activations.policy import ActivationsConfig, renamed
from sam2_lora_ext.data.phases import PhasedDataset
from sam2_lora_ext.data.sampler import ObjectSampler
from sam2_lora_ext.data.windows import Windows
from sam2_lora_ext.host.compose import compose
from sam2_lora_ext.host.configs import known_configs
from sam2_lora_ext.lora import LoRAConfig
from sam2_lora_ext.run.early_stop import EarlyStop
from sam2_lora_ext.settings import check
from sam2_lora_ext.settings.containers import Section
from sam2_lora_ext.settings.kinds import accepts
from sam2_lora_ext.settings.model import ACTIVATIONS, LORA, MEMORY
from sam2_lora_ext.settings.stock import OURS
from sam2_lora_ext.settings.table import SECTIONS, TARGETS
from sam2_lora_ext.utils.errors import UserError

POOL = [
    None,
    True,
    False,
    -1,
    0,
    1,
    2,
    3,
    7,
    8,
    16,
    17,
    32,
    100,
    2**31,
    10**40,
    -0.5,
    0.0,
    1e-9,
    0.5,
    1.0,
    1.5,
    8.0,
    1e300,
    float("nan"),
    float("inf"),
    -float("inf"),
    "",
    "foo",
    "8",
    "max",
    [],
    [1],
    [1, 2],
    [0.5, 0.5, 0.5],
    ["a"],
    ["q", "v"],
    [None],
    {},
    {"a": 1},
    {1: 2.0},
    {1: "pit"},
    {9: -1.0},
    {True: 1.0},
    {1: [255, 0, 0]},
]


def composed(*overrides: str, name: str = "configs/demo.yaml"):
    with rank_environment({}):
        return compose(name, list(overrides))


@pytest.mark.parametrize("target", TARGETS)
def test_the_table_has_the_arguments_of_each_class(target):
    """Exactly the arguments of each class of this package."""
    found = get_object(target)
    known, stock = set(), found
    for stock in [found, *getattr(found, "__mro__", ())[1:-1]]:  # `**kwargs` go to the class above
        parameters = inspect.signature(stock.__init__ if inspect.isclass(stock) else stock).parameters.values()
        known |= {one.name for one in parameters if one.kind not in (one.VAR_KEYWORD, one.VAR_POSITIONAL)} - {"self"}
        if not any(one.kind == one.VAR_KEYWORD for one in parameters):
            break
    if "Logger" in target or "logger" in target:
        return  # of what the writers take, the table lists what is of use
    given = {"params"} if target.startswith("torch.optim") else {"model", "batch"}  # by the Trainer
    assert known - set(TARGETS[target].rows) <= given
    assert not set(TARGETS[target].rows) - known


def test_sections_of_ours_have_the_fields_of_their_classes():
    assert set(LORA.rows) == set(inspect.signature(LoRAConfig).parameters)
    assert set(ACTIVATIONS.kinds[1].rows) == set(inspect.signature(ActivationsConfig).parameters)
    assert set(OURS["early_stop"].kind.rows) | {"mode"} == set(inspect.signature(EarlyStop).parameters)


DATA = "sam2_lora_ext.data."
BUILT = {  # what is built without data, and the arguments that it needs
    **{f"{DATA}transforms.{name}": {"width": 100} for name in ("RandomStripCrop", "FixedStripCrop")},
    **{f"{DATA}transforms.{name}": {} for name in ("RandomHorizontalFlip", "RandomVerticalFlip")},
    f"{DATA}pixels.RandomBrightnessContrast": {},
    f"{DATA}pixels.ModelInput": {"size": 64},
    f"{DATA}sampler.ObjectSampler": {},
    f"{DATA}kaggle.KaggleReader": {"image_dir": "a", "csv": "b"},
    f"{DATA}label_png.LabelPNGReader": {"image_dir": "a", "label_dir": "b"},
    "sam2_lora_ext.losses.SeverstalLoss": {"weight_dict": {"loss_mask": 20, "loss_dice": 1, "loss_iou": 1}},
    "sam2_lora_ext.meters.SegmentationMeter": {},
}


@pytest.mark.parametrize("target", BUILT)
def test_what_the_table_takes_the_class_takes(target):
    """A check in a constructor may not refuse a value that the table allows."""
    found, section = get_object(target), TARGETS[target]
    taken = inspect.signature(found).parameters
    for key in [key for key in section.rows if key in taken or "stock" in taken]:
        for value in POOL:
            settings = BUILT[target] | {key: value}
            if accepts(section, settings):
                found(**settings)


@pytest.mark.parametrize(
    ("section", "build", "start"),
    [
        (LORA, LoRAConfig.of, {"targets": ["a"]}),
        (ACTIVATIONS, ActivationsConfig.of, {}),
        (MEMORY, renamed, {}),
        (OURS["early_stop"].kind, lambda settings: EarlyStop(**settings), {}),
        (
            SECTIONS["dataset"].rows["windows"].kind,
            lambda settings: Windows(**settings),
            {"width": 9, "stride": 3, "num_frames": 2},
        ),
        (
            TARGETS[f"{DATA}phases.PhasedDataset"],
            lambda settings: PhasedDataset(
                **settings | {"datasets": [[1, 2]], "collate_fn": None, "worker_init_fn": None}
            ),
            {
                "datasets": [{"_target_": "a"}],
                "batch_sizes": [1],
                "num_workers": 0,
                "pin_memory": False,
                "steps_per_phase": 1,
                "steps": 1,
            },
        ),
    ],
)
def test_what_a_section_takes_its_class_takes(section, build, start):
    for key in (section if isinstance(section, Section) else section.kinds[1]).rows:
        for value in POOL:
            if accepts(section, start | {key: value}):
                build(start | {key: value})


@pytest.mark.parametrize(
    "name",
    [name for name in known_configs() if not name.startswith("configs/sam2")]
    + ["configs/sam2.1_training/sam2.1_hiera_b+_MOSE_finetune.yaml"],
)
def test_shipped_configs_pass(name):
    check(composed(name=name))


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("scratch.lr=-1e-3", "scratch.lr must be a number above 0 and at most 100, got -0.001"),
        ("scratch.lr=.inf", "scratch.lr must be .* got '.inf'"),
        ("scratch.lr=inf", "got inf"),
        ("scratch.lr=nan", "got nan"),
        ("scratch.lr=true", "scratch.lr must be a number .* got True"),
        ("scratch.lr=abc", "scratch.lr must be a number .* got 'abc'"),
        ("scratch.num_workers=-1", "scratch.num_workers must be a whole number from 0 to 1024, got -1"),
        ("scratch.num_workers=2.0", "must be a whole number .* got 2.0"),
        ("scratch.batch_size=1e9", "scratch.batch_size must be a whole number"),
        ("scratch.steps=1000000000000000000000000000000000", "a number of 34 digits"),
        ("scratch.steps=null", "steps or as epochs"),
        ("scratch.epochs=3", "steps or as epochs"),
        ("scratch.resolution=100", "scratch.resolution must be a multiple of 32 from 32 to 8192, got 100"),
        ("scratch.clean_share=1", "scratch.clean_share .* below 1, got 1"),
        ("scratch.steps='8'", "environment variable becomes a number with"),
        ("+scratch.learning_rate=1", "scratch has no setting 'learning_rate': choose from"),
        ("trainer.mode=foo", "trainer.mode must be one of train, train_only, val, got 'foo'"),
        ("~trainer.optim", "trainer: optim must be set for training"),
        ("trainer.data.train=null", "trainer: data.train must be set for training"),
        ("trainer.data.val=null", "data.val must be set .* train_only"),
        ("+scratch.foo=1", "scratch has no setting 'foo': choose from"),
        ("trainer.metrics_every=nan", "trainer.metrics_every must be a whole number of at least 1, got nan"),
        ("trainer.metrics_every=1.5", "trainer.metrics_every"),
        ("trainer.keep_previous=true", "trainer.keep_previous must be .* got True"),
        ("trainer.accelerator=tpu", "trainer.accelerator must be one of cuda, cpu"),
        ("trainer.seed_value=-1", "trainer.seed_value"),
        ("trainer.seed_value=99999999999999", "trainer.seed_value .* whole number"),
        ("+trainer.max_epoch=3", "trainer has no setting 'max_epoch', did you mean 'max_epochs'"),
        ("trainer.export.merged=1", "trainer.export.merged must be true or false, got 1"),
        ("+trainer.early_stop.patiense=3", "'patiense', did you mean 'patience'"),
        ("trainer.model.image_size=96", "only scratch.resolution"),
        ("+trainer.model.imagesize=96", "did you mean 'image_size'"),
        ("trainer.model.num_correction_pt_per_frame=0", "at least 1|from 1 to 100"),
        ("trainer.model.prob_to_use_pt_input_for_train=1.5", "at most 1, got 1.5"),
        ("trainer.model.activations=lots", "one of stock, fast, default, low"),
        ("trainer.loss.severstal.class_weights={9: nan}", "class_weights.9 must be .* got nan"),
        ("trainer.loss.severstal.class_weights={true: 1.0}", "whole number from 0 to 32767, got "),
        ("trainer.loss.severstal.class_weights={-1: 1.0}", "each key of .*class_weights must be"),
        ("~trainer.loss.severstal.weight_dict.loss_iou", "lacks loss_iou"),
        (
            "trainer.loss.severstal.weight_dict={loss_mask: 0, loss_dice: 0, loss_iou: 0, loss_class: 0}",
            "all weights are 0",
        ),
        ("trainer.optim.amp.amp_dtype=int8", "one of bfloat16, float16"),
        ("trainer.optim.gradient_clip.max_norm=0", "max_norm must be a number above 0"),
        ("scratch.lr_schedule.lengths=[0.5,0.4]", "sum to 1"),
        ("trainer.checkpoint.save_freq=-1", "trainer.checkpoint.save_freq"),
        ("trainer.logging.log_freq=0", "trainer.logging.log_freq"),
        ("dataset.bits=17", "dataset.bits must be a whole number from 8 to 16, got 17"),
        ("dataset.min_area=0", "dataset.min_area"),
        ("dataset.objects=blobs", "dataset.objects must be null or one of instances, components, classes, all"),
        ("dataset.root=''", "dataset.root must be a text"),
        ("dataset.readers.kaggle.size=[0,1]", "size.0 must be"),
        ("+dataset.readers.kaggle.clases=null", "did you mean 'classes'"),
        ("lora.rank=0", "lora.rank must be a whole number from 1 to 4096, got 0"),
        ("lora.rank=true", "lora.rank .* got True"),
        ("lora.dropout=1", "lora.dropout .* below 1, got 1"),
        ("lora.alpha=.nan", "lora.alpha"),
        ("lora.targets=image_encoder", "lora.targets must be a list"),
        ("launcher.gpus_per_node=0", "launcher.gpus_per_node"),
        ("launcher.experiment_log_dir=5", "launcher.experiment_log_dir must be"),
        ("submitit.port_range=[9,1]", "port_range begins with 9, above its end 1"),
        ("submitit.timeout_hour=-2", "submitit.timeout_hour"),
        ("vos.val_transforms.0.width=-3", "vos.val_transforms.0.width"),
    ],
)
def test_a_wrong_setting_is_one_sentence(override, said):
    with pytest.raises(UserError, match=said) as refused:
        composed(override)
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 1500


@pytest.mark.parametrize("steps", ["", "abc", "[1", "8.5", "-3", "null", "${nowhere}", "9" * 400])
def test_a_wrong_environment_variable_is_one_sentence(steps):
    with rank_environment({"SAM2_LORA_DEMO_STEPS": steps}), pytest.raises(UserError) as refused:
        compose("configs/demo.yaml", [])
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 1500


def test_an_unset_environment_variable_is_one_sentence():
    with pytest.raises(UserError, match="SURELY_UNSET"):
        composed("scratch.steps=${oc.decode:${oc.env:SURELY_UNSET}}")
    with pytest.raises(UserError, match="steps or as epochs"):
        composed("scratch.steps='${oc.decode:${oc.env:SURELY_UNSET,null}}'")


def test_a_users_own_key_is_taken_where_something_reads_it():
    """`scratch`, `dataset` and `vos` may hold more, but not what nothing reads."""
    assert composed("+scratch.my_width=96", "scratch.crop_width=${scratch.my_width}").scratch.crop_width == 96
    with pytest.raises(UserError, match="'my_width'"):
        composed("+scratch.my_width=96")


def sentence_of(env: dict[str, str], *overrides: str) -> str:
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors), pytest.raises(SystemExit) as stopped:
        train_here(env, *overrides)
    assert stopped.value.code == 2
    return errors.getvalue()


def test_a_weight_for_a_class_that_the_data_does_not_have(tmp_path, nano_base, strips):
    env = environment(nano_base, strips, tmp_path / "run")
    said = sentence_of(env, "trainer.loss.severstal.class_weights={9: 2.0}")
    assert "class_weights has a weight for class 9, but the data only has 0 (clean strips), 1 (" in said


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("metrics_every", float("nan"), "trainer.metrics_every must be"),
        ("mode", "foo", "trainer.mode must be"),
        ("run_dir", 5, "trainer.run_dir"),
        ("data.train.num_workers", -1, "scratch.num_workers (here trainer.data.train.num_workers) must be"),
        ("optim.options.lr.0.scheduler.schedulers.0.end_value", -1e-3, "scratch.lr (here trainer.optim.options"),
    ],
)
def test_the_trainer_checks_what_the_stock_launcher_gives_it(key, value, said, tmp_path, nano_base, strips):
    """The stock launcher checks nothing; the sentence names the setting by which a user knows it."""
    from hydra.utils import instantiate

    env = environment(nano_base, strips, tmp_path / "run")
    config = config_of(env)
    OmegaConf.update(config, f"trainer.{key}", value)
    errors = io.StringIO()
    with rank_environment(env), contextlib.redirect_stderr(errors), pytest.raises(SystemExit) as stopped:
        instantiate(config.trainer, _recursive_=False)
    assert stopped.value.code == 2 and said in errors.getvalue()
    assert not Path(tmp_path / "run").exists()


def test_the_sampler_is_checked_too():
    """A rule over several settings of one part, as its class has it."""
    section = TARGETS["sam2_lora_ext.data.sampler.ObjectSampler"]
    for settings in ({"training": False, "max_num_objects": 3}, {"training": False, "reverse_time_prob": 0.5}):
        assert not accepts(section, settings)
        with pytest.raises(UserError):
            ObjectSampler(**settings)
