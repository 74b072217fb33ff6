"""`fuse` on the networks of guided-diffusion and improved-diffusion: another way to compute the same."""

import copy
import pickle

import pytest
import torch
from torch import nn

from diffkern.integrations.fusion import fuse, unfuse
from diffkern.integrations.fusion.swap import Fused
from tests.fusion import golden
from tests.fusion.checks import assert_bitwise, assert_same, distance, images, randomised, recorded, results, trained
from tests.fusion.peers import guided_diffusion, improved_diffusion
from tests.fusion.peers.guided_encoder import EncoderUNetModel

# Two channels a group at least: of one alone, a norm takes away whatever is added to it, and the gradient is zero.
SMALL = {"model_channels": 64, "num_res_blocks": 1, "attention_resolutions": (2,), "channel_mult": (1, 1)}
TIMES = torch.tensor([3, 712])
OPTIONS = ["channels_last", "fold_upsample", "virtual_concat"]
ALL = dict.fromkeys(OPTIONS, True)


def guided(**settings):
    return randomised(guided_diffusion.UNetModel(16, 3, out_channels=3, **SMALL | settings))


def improved(**settings):
    return randomised(improved_diffusion.UNetModel(3, out_channels=3, **SMALL | settings))


def fused(model, **options):
    report = fuse(model := copy.deepcopy(model), **options)
    assert not report.skipped
    return model


CONFIGURATIONS = {
    "default": {},
    "scale and shift": {"use_scale_shift_norm": True},
    "labels": {"num_classes": 5},
    "dropout, other widths": {"dropout": 0.3, "channel_mult": (1, 2)},
    "plain resampling": {"conv_resample": False, "num_heads": 2, "num_heads_upsample": 4},
    "one level": {"channel_mult": (1,), "num_res_blocks": 2, "attention_resolutions": (1,)},
    "checkpoints": {"use_checkpoint": True},
}
IMPROVED = ["default", "scale and shift", "dropout, other widths", "checkpoints"]
GUIDED_ONLY = {
    "resampling blocks": {"resblock_updown": True, "num_head_channels": 16},
    "resampling blocks, scale and shift": {"resblock_updown": True, "use_scale_shift_norm": True, "dropout": 0.2},
    "new order": {"use_new_attention_order": True, "num_heads": 4},
}


@pytest.mark.parametrize(
    ("make", "settings"),
    [(guided, settings) for settings in (CONFIGURATIONS | GUIDED_ONLY).values()]
    + [(improved, CONFIGURATIONS[name]) for name in IMPROVED],
    ids=[*CONFIGURATIONS, *GUIDED_ONLY, *(f"improved, {name}" for name in IMPROVED)],
)
def test_unet(make, settings):
    """In training, where dropout draws the same numbers; checkpointed or not."""
    model = make(**settings)
    labels = [torch.tensor([0, 4])] if "num_classes" in settings else []
    x = images(2, 3, 8, 12)
    expected = results(model, x, TIMES, *labels)
    for virtual_concat in (False, True):
        assert_same(results(fused(model, virtual_concat=virtual_concat), x, TIMES, *labels), expected)


@pytest.mark.parametrize("option", [*OPTIONS, "all"])
@pytest.mark.parametrize("updown", [False, True])
def test_options(option, updown):
    model = guided(resblock_updown=updown, use_scale_shift_norm=updown)
    report = fuse(same := copy.deepcopy(model), **(ALL if option == "all" else {option: True}))
    assert not report.skipped
    for name in OPTIONS if option == "all" else [option]:
        assert any(name in done.effect for done in report.replaced)
    x = images(2, 3, 32, 16)  # enough pixels for the upsampling to be folded
    assert_same(results(same, x, TIMES), results(model, x, TIMES))


@pytest.mark.parametrize("dims", [1, 3])
@pytest.mark.parametrize("settings", [{}, {"resblock_updown": True, "use_scale_shift_norm": True}])
def test_other_dimensions(dims, settings):
    model = guided(dims=dims, **settings)
    report = fuse(same := copy.deepcopy(model), **ALL)
    assert {left.reason.partition(":")[0] for left in report.skipped} == {"channels_last", "fold_upsample"}
    x = images(2, 3, *(16,) if dims == 1 else (3, 4, 4))
    assert_same(results(same, x, TIMES), results(model, x, TIMES))


@pytest.mark.parametrize("num_classes", [None, 4])
@pytest.mark.parametrize("peer", [guided_diffusion, improved_diffusion])
def test_super_resolution(peer, num_classes):
    sizes = [16] if peer is guided_diffusion else []
    model = randomised(peer.SuperResModel(*sizes, 3, out_channels=6, num_classes=num_classes, **SMALL))
    x, given = images(2, 3, 8, 8), {"low_res": images(2, 3, 4, 4, seed=3)}
    if num_classes:
        given["y"] = torch.tensor([3, 0])
    assert_same(results(fused(model, **ALL), x, TIMES, **given), results(model, x, TIMES, **given))


@pytest.mark.parametrize("num_classes", [None, 4])
def test_labels_that_do_not_fit_are_refused_as_before(num_classes):
    model = fused(guided(num_classes=num_classes), virtual_concat=True)
    with pytest.raises(AssertionError):
        model(images(2, 3, 8, 8), TIMES, None if num_classes else torch.tensor([3, 0]))


@pytest.mark.parametrize("pool", ["adaptive", "attention"])
def test_classifier(pool):
    model = randomised(EncoderUNetModel(12, 3, out_channels=7, num_head_channels=16, pool=pool, **SMALL))
    x = images(2, 3, 12, 12)
    assert_same(results(fused(model), x, TIMES), results(model, x, TIMES))


@pytest.mark.parametrize("options", [{}, ALL], ids=["plain", "all options"])
@pytest.mark.parametrize("name", [*golden.GUIDED, *golden.IMPROVED])
def test_golden(name, options):
    model = golden.build(name)
    report = fuse(model, **options)
    assert all("nothing in this model" in left.reason for left in report.skipped)
    golden.check_against_golden(model, name)


@pytest.mark.parametrize("options", [{}, ALL], ids=["plain", "all options"])
def test_a_training_step(options):
    model = guided(use_scale_shift_norm=True)
    x = images(2, 3, 8, 8)
    assert_same(trained(fused(model, **options), x, TIMES), trained(model, x, TIMES))


def kinds(report):
    blocks = [done.block for done in report.replaced]
    return {block: blocks.count(block) for block in blocks}


def test_report():
    assert kinds(fuse(guided())) == {"ResBlock": 8, "AttentionBlock": 4, "Sequential": 1}
    assert kinds(fuse(improved(), virtual_concat=True))["UNetModel"] == 1
    effects = {done.effect for done in fuse(guided(use_scale_shift_norm=True)).replaced}
    assert "GroupNorm and SiLU twice, residual in place, time scale and shift" in effects


@pytest.mark.parametrize("settings", [{}, {"use_scale_shift_norm": True, "resblock_updown": True}])
def test_unfuse_gives_the_same_bits(settings):
    model = guided(**settings)
    types = [type(module) for module in model.modules()]
    expected = results(model, images(2, 3, 8, 8), TIMES)
    fuse(model, **ALL)
    assert [type(module) for module in unfuse(model).modules()] == types
    assert_bitwise(results(model, images(2, 3, 8, 8), TIMES), expected)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies(duplicate):
    model = fused(guided(use_scale_shift_norm=True), **ALL)
    again = duplicate(model)
    assert [type(module) for module in again.modules()] == [type(module) for module in model.modules()]
    assert not {id(p) for p in model.parameters()} & {id(p) for p in again.parameters()}
    x = images(2, 3, 8, 8)
    assert_bitwise(results(again, x, TIMES), results(model, x, TIMES))
    assert not any(isinstance(module, Fused) for module in unfuse(again).modules())


def test_state_dict_and_parameters_are_kept():
    model = guided()
    keys, parameters = list(model.state_dict()), [id(p) for p in model.parameters()]
    fuse(model, **ALL)
    assert list(model.state_dict()) == keys
    assert [id(p) for p in model.parameters()] == parameters


@pytest.mark.parametrize("make", [guided, improved])
@pytest.mark.parametrize("options", [{}, {"virtual_concat": True}])
def test_half_precision(make, options):
    """The body in float16, norms and projections in float32, as `convert_to_fp16` leaves it."""
    model = make(use_scale_shift_norm=True, **({"use_fp16": True} if make is guided else {})).eval()
    x = images(2, 3, 8, 8)
    precise = copy.deepcopy(model)
    precise.dtype = torch.float32
    model.convert_to_fp16()
    with torch.no_grad():
        expected, wanted = precise(x, TIMES), model(x, TIMES)
        found = fused(model, **options)(x, TIMES)
    assert found.dtype == wanted.dtype == torch.float32
    assert distance(found, expected) <= 1.2 * distance(wanted, expected)


def test_dtype_is_kept_by_trying():
    model = guided(use_fp16=True)
    model.convert_to_fp16()
    fuse(model, virtual_concat=True)
    assert model.dtype is torch.float16


def test_autocast():
    model = guided().eval()
    x = images(2, 3, 8, 8)
    with torch.no_grad():
        expected = model(x, TIMES)
        with torch.autocast("cpu", torch.bfloat16):
            wanted, found = model(x, TIMES), fused(model, **ALL)(x, TIMES)
    assert found.dtype == wanted.dtype
    assert distance(found, expected) <= 1.2 * distance(wanted, expected)


@pytest.mark.parametrize("settings", [{}, {"use_scale_shift_norm": True, "resblock_updown": True}])
@pytest.mark.parametrize("options", [{}, {"virtual_concat": True}])
def test_hooks_see_what_they_saw(settings, options):
    model = guided(**settings).eval()
    x, of = images(2, 3, 8, 8), {"GroupNorm32", "SiLU", "Sequential", "Conv2d", "ResBlock", "TimestepEmbedSequential"}
    expected = recorded(model, x, TIMES, kinds=of)
    found = recorded(fused(model, **options), x, TIMES, kinds=of)  # hooks that came after fusing
    before = recorded(copy.deepcopy(model), x, TIMES, kinds=of, then=lambda hooked: fuse(hooked, **options))
    assert [name for name, _ in before] == [name for name, _ in expected]
    assert [name for name, _ in found] == [name for name, _ in expected]
    for (name, after), (_, before) in zip(found, expected, strict=True):
        assert golden.relative(after, before) <= 2e-5, name


@pytest.mark.parametrize("part", ["in_layers", "in_layers.0", "in_layers.1", "out_layers", "out_layers.0"])
def test_a_hook_that_was_there_is_reported(part):
    model = guided()
    calls = []
    model.middle_block[0].get_submodule(part).register_forward_hook(lambda *_: calls.append(1))
    report = fuse(model)
    assert [left.name for left in report.skipped] == [f"middle_block.0.{part}"]
    model(images(1, 3, 8, 8), TIMES[:1])
    assert calls == [1]


def concatenations(model, *args):
    """How many times `torch.cat` is called on images."""

    class Counting(torch.overrides.TorchFunctionMode):
        calls = 0

        def __torch_function__(self, function, types, args=(), kwargs=None):
            Counting.calls += function is torch.cat and args[0][0].dim() == 4
            return function(*args, **(kwargs or {}))

    with Counting():
        model(*args)
    return Counting.calls


def test_virtual_concat_does_not_concatenate():
    model = guided()
    x = images(2, 3, 8, 8)
    assert concatenations(model, x, TIMES) == 4
    assert concatenations(fused(model, virtual_concat=True), x, TIMES) == 0


def test_blocks_that_someone_watches_or_changes_get_the_concatenation():
    model = fused(guided(), virtual_concat=True)
    blocks, x = model.output_blocks, images(2, 3, 8, 8)
    blocks[0].register_forward_hook(lambda *_: None)
    blocks[1][0].register_forward_pre_hook(lambda *_: None)
    blocks[2][0].in_layers[0].register_forward_hook(lambda *_: None)
    blocks[3][0].skip_connection = nn.Sequential(blocks[3][0].skip_connection)
    assert concatenations(model, x, TIMES) == 4
    with torch.no_grad():
        assert golden.relative(model(x, TIMES), unfuse(copy.deepcopy(model))(x, TIMES)) <= 2e-5


def test_checkpointed_blocks_are_checkpointed_as_before():
    model = fused(guided(use_checkpoint=True), virtual_concat=True)
    x = images(2, 3, 8, 8).requires_grad_()
    assert concatenations(model, x, TIMES) == 4
    with torch.no_grad():
        assert concatenations(model, x, TIMES) == 0


class ResBlock(guided_diffusion.ResBlock):
    """Of a fork that computes something else."""

    def _forward(self, x, emb):
        return super()._forward(x, emb) / 2**0.5


class UnrelatedResBlock(nn.Module):
    """With the attributes, without ``_forward``."""

    def __init__(self):
        super().__init__()
        self.in_layers = nn.Sequential(nn.GroupNorm(2, 8), nn.SiLU(), nn.Conv2d(8, 8, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(4, 8))
        self.out_layers = nn.Sequential(nn.GroupNorm(2, 8), nn.SiLU(), nn.Dropout(0), nn.Conv2d(8, 8, 3, padding=1))
        self.skip_connection = nn.Identity()

    def forward(self, x, emb):
        return x + self.out_layers(self.in_layers(x) * self.emb_layers(emb)[..., None, None])


UnrelatedResBlock.__name__ = "ResBlock"


def test_forks_that_differ_get_the_norms_of_their_sequentials():
    for model, x, emb in (
        (randomised(ResBlock(64, 16, 0.0)), images(2, 64, 4, 4), images(2, 16)),
        (randomised(UnrelatedResBlock()), images(2, 8, 4, 4), images(2, 4)),
    ):
        same = copy.deepcopy(model)
        assert {done.block for done in fuse(same).replaced} == {"Sequential"}
        assert_same(results(same, x, emb), results(model, x, emb))


def test_compiled_in_one_graph():
    model = guided(channel_mult=(1,), num_classes=3).eval()
    model.middle_block[1] = nn.Identity()  # the peer's own checkpointing does not compile in one graph
    compiled = torch.compile(fused(model, virtual_concat=True), fullgraph=True, backend="aot_eager")
    x, labels = images(2, 3, 8, 8), torch.tensor([2, 0])
    with torch.no_grad():
        assert golden.relative(compiled(x, TIMES, labels), model(x, TIMES, labels)) <= 2e-5


def test_training_compiled_in_one_graph():
    block = randomised(guided_diffusion.ResBlock(64, 16, 0.0, use_scale_shift_norm=True, up=True))
    compiled = torch.compile(fused(block, fold_upsample=True), fullgraph=True, backend="aot_eager")
    x, emb = images(2, 64, 12, 12), images(2, 16)
    found = {key.replace("_orig_mod.", ""): value for key, value in results(compiled, x, emb).items()}
    assert_same(found, results(block, x, emb))


def test_the_input_is_left_alone():
    block = fused(randomised(guided_diffusion.ResBlock(64, 16, 0.0)))
    x, emb = images(2, 64, 4, 4), images(2, 16)
    before = x.clone(), emb.clone()
    with torch.no_grad():
        out = block(x, emb)
    assert torch.equal(x, before[0])
    assert torch.equal(emb, before[1])
    assert out.data_ptr() != x.data_ptr()
