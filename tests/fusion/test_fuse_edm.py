"""`fuse` on the networks of EDM: another way to compute the same."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from diffkern.integrations.fusion import fuse, unfuse
from diffkern.integrations.fusion.swap import Fused
from tests.fusion import golden
from tests.fusion.checks import assert_bitwise, assert_same, distance, images, randomised, recorded, results, trained
from tests.fusion.peers import edm, edm_layers, edm_preconditioners

SMALL = {"model_channels": 16, "channel_mult": [1, 2], "num_blocks": 1, "attn_resolutions": [8]}
NOISE = torch.tensor([0.4, -1.3])
OPTIONS = ["channels_last", "fold_upsample", "virtual_concat"]
ALL = dict.fromkeys(OPTIONS, True)


def song(**settings):
    return randomised(edm.SongUNet(16, 3, 3, **SMALL | settings))


def dhariwal(**settings):
    """With 64 channels at the second level, as many as it gives to a head of attention."""
    return randomised(edm.DhariwalUNet(16, 3, 3, **SMALL | {"model_channels": 32} | settings))


def block(*channels, **settings):
    return randomised(edm.UNetBlock(*channels, emb_channels=10, **settings))


def fused(model, **options):
    report = fuse(model := copy.deepcopy(model), **options)
    assert not report.skipped
    return model


@pytest.mark.parametrize("adaptive_scale", [False, True])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"out_channels": 24, "skip_scale": 0.7, "dropout": 0.4},
        {"up": True, "resample_proj": True},
        {"down": True, "skip_scale": 0.7},
        {"up": True, "resample_filter": [1, 3, 3, 1], "out_channels": 8},
        {"attention": True, "num_heads": 1, "skip_scale": 0.5, "eps": 1e-6},
        {"attention": True, "channels_per_head": 4},
        {"attention": True, "num_heads": 2, "down": True, "out_channels": 32},
    ],
    ids=str,
)
def test_block(settings, adaptive_scale):
    model = block(16, **{"out_channels": 16} | settings, adaptive_scale=adaptive_scale)
    same = fused(model)
    for x in (images(1, 16, 6, 10), images(2, 16, 4, 6).to(memory_format=torch.channels_last)):
        before, emb = x.clone(), images(len(x), 10, seed=3)
        found, expected = results(same, x, emb), results(model, x, emb)
        assert_same(found, expected)
        assert torch.equal(x, before)
        if x.is_contiguous():
            assert found["out"].is_contiguous()


SONG = {
    "default": {},
    "labels": {"label_dim": 4, "label_dropout": 0.5},
    "augmentation": {"augment_dim": 9, "dropout": 0.0},
    "fourier": {"embedding_type": "fourier", "channel_mult_noise": 2},
    "skip": {"encoder_type": "skip", "decoder_type": "skip", "resample_filter": [1, 3, 3, 1]},
    "residual": {"encoder_type": "residual", "channel_mult": [1, 2, 3], "resample_filter": [1, 3, 3, 1]},
    "skip decoder": {"decoder_type": "skip", "num_blocks": 2, "channel_mult": [2, 1]},
}
DHARIWAL = {
    "default": {},
    "labels and augmentation": {"label_dim": 4, "label_dropout": 0.5, "augment_dim": 9},
    "three levels": {"channel_mult": [1, 2, 3], "dropout": 0.4, "channel_mult_emb": 2},
    "two heads": {"model_channels": 64, "attn_resolutions": [16, 8]},
}


def conditions(settings):
    labels = torch.eye(4)[:2] if "label_dim" in settings else None
    return NOISE, labels, images(2, 9, seed=4) if "augment_dim" in settings else None


@pytest.mark.parametrize(
    ("make", "settings"),
    [*((song, settings) for settings in SONG.values()), *((dhariwal, settings) for settings in DHARIWAL.values())],
    ids=[f"song, {name}" for name in SONG] + [f"dhariwal, {name}" for name in DHARIWAL],
)
def test_network(make, settings):
    """In training, where dropout draws the same numbers."""
    model, x = make(**settings), images(2, 3, 8, 16)
    expected = results(model, x, *conditions(settings))
    for options in ({}, {"virtual_concat": True}):
        assert_same(results(fused(model, **options), x, *conditions(settings)), expected)


@pytest.mark.parametrize("option", [*OPTIONS, "all"])
@pytest.mark.parametrize("make", [song, dhariwal])
def test_options(option, make):
    """Without dropout: channels last, it draws in another order."""
    model = make(dropout=0)
    report = fuse(same := copy.deepcopy(model), **(ALL if option == "all" else {option: True}))
    assert not report.skipped
    for name in OPTIONS if option == "all" else [option]:
        assert any(name in done.effect for done in report.replaced)
    x = images(2, 3, 32, 16)  # enough pixels for the upsampling to be folded
    assert_same(results(same, x, NOISE, None), results(model, x, NOISE, None))


def test_other_filters_and_fused_resampling_are_not_folded():
    for settings in ({"resample_filter": [1, 3, 3, 1]}, {"fused_resample": True}, {"kernel": 1}, {"kernel": 0}):
        conv = edm_layers.Conv2d(4, 4, **{"kernel": 3, "up": True} | settings)
        assert fuse(conv, fold_upsample=True).replaced == ()


@pytest.mark.parametrize("bias", [False, True])
def test_folded_convolution(bias):
    conv = randomised(edm_layers.Conv2d(4, 6, kernel=3, up=True, bias=bias))
    x = images(2, 4, 12, 14)
    assert_same(results(fused(conv, fold_upsample=True), x), results(conv, x))
    half = x.bfloat16()
    assert distance(fused(conv, fold_upsample=True)(half), conv(x)) <= 1.2 * distance(conv(half), conv(x))


@pytest.mark.parametrize(
    ("name", "model_type"),
    [
        ("VPPrecond", "SongUNet"),
        ("VEPrecond", "SongUNet"),
        ("iDDPMPrecond", "DhariwalUNet"),
        ("EDMPrecond", "DhariwalUNet"),
    ],
)
def test_preconditioners(name, model_type):
    net = getattr(edm_preconditioners, name)(16, 3, label_dim=4, model_type=model_type, **SMALL)
    net = randomised(net).eval()
    x, sigma, labels = images(2, 3, 16, 16), torch.tensor([0.4, 3.0]), torch.eye(4)[:2]
    with torch.no_grad():
        assert golden.relative(fused(net, **ALL)(x, sigma, labels), net(x, sigma, labels)) <= 2e-5


@pytest.mark.parametrize("options", [{}, ALL], ids=["plain", "all options"])
@pytest.mark.parametrize("name", golden.EDM)
def test_golden(name, options):
    model = golden.build(name)
    report = fuse(model, **options)
    assert all("nothing in this model" in left.reason for left in report.skipped)
    golden.check_against_golden(model, name)


@pytest.mark.parametrize(("make", "options"), [(song, ALL), (dhariwal, {})])
def test_a_training_step(make, options):
    model, x = make(dropout=0), images(2, 3, 16, 16)
    assert_same(trained(fused(model, **options), x, NOISE, None), trained(model, x, NOISE, None))


def kinds(report):
    blocks = [done.block for done in report.replaced]
    return {name: blocks.count(name) for name in blocks}


def test_report():
    assert kinds(fuse(song())) == {"UNetBlock": 10, "GroupNorm": 1}
    whole = {"UNetBlock": 10, "GroupNorm": 1, "Conv2d": 1, "DhariwalUNet": 2}
    assert kinds(fuse(dhariwal(), **ALL)) == whole
    effects = {done.effect for done in fuse(dhariwal()).replaced}
    assert effects >= {
        "GroupNorm and SiLU twice, noise scale and shift",
        "GroupNorm and SiLU twice, noise scale and shift; attention",
    }


@pytest.mark.parametrize("make", [song, dhariwal])
def test_unfuse_gives_the_same_bits(make):
    model, x = make(), images(2, 3, 16, 16)
    types = [type(module) for module in model.modules()]
    expected = results(model, x, NOISE, None)
    fuse(model, **ALL)
    assert [type(module) for module in unfuse(model).modules()] == types
    assert_bitwise(results(model, x, NOISE, None), expected)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize("make", [song, dhariwal])
def test_copies(make, duplicate):
    model = fused(make(), **ALL)
    again = duplicate(model)
    assert [type(module) for module in again.modules()] == [type(module) for module in model.modules()]
    assert not {id(p) for p in model.parameters()} & {id(p) for p in again.parameters()}
    x = images(2, 3, 16, 16)
    assert_bitwise(results(again, x, NOISE, None), results(model, x, NOISE, None))
    assert not any(isinstance(module, Fused) for module in unfuse(again).modules())


def test_a_pickle_of_an_unfused_model_does_not_need_diffkern():
    model = song()
    assert b"diffkern" not in pickle.dumps(model)
    fuse(model, **ALL)
    assert b"diffkern" in pickle.dumps(model)
    assert b"diffkern" not in pickle.dumps(unfuse(model))


def test_a_pickle_brings_its_own_source(run_python, tmp_path):
    """As where EDM itself is not installed: the classes are then of a module that no import finds."""
    net, x = song().eval(), images(2, 3, 16, 16)
    fuse(net, virtual_concat=True)
    with torch.no_grad():
        torch.save((x, NOISE, net(x, NOISE, None)), tmp_path / "numbers.pt")
    (tmp_path / "net.pkl").write_bytes(pickle.dumps(net))
    code = f"""
import copy, pickle, sys, torch
net = pickle.load(open({str(tmp_path / "net.pkl")!r}, "rb"))
assert "tests.fusion.peers.edm" not in sys.modules
import diffkern
x, noise, out = torch.load({str(tmp_path / "numbers.pt")!r})
assert (net(x, noise, None) - out).abs().max() < 1e-5 * out.abs().max()
for again in (pickle.loads(pickle.dumps(net)), copy.deepcopy(net)):
    assert type(again) is type(net)
    assert (again(x, noise, None) - out).abs().max() < 1e-5 * out.abs().max()
diffkern.unfuse(net)
print(type(net).__module__.startswith("unpickled_source_"), len(diffkern.fuse(net, virtual_concat=True).replaced))
"""
    assert run_python(code) == "True 12"


@pytest.mark.parametrize(
    ("make", "dtype", "options"),
    [
        (song, torch.float16, {}),
        (song, torch.bfloat16, {"virtual_concat": True}),
        (dhariwal, torch.float16, {"virtual_concat": True, "fold_upsample": True}),
        (dhariwal, torch.bfloat16, {}),
    ],
)
def test_half_precision(make, dtype, options):
    """As a preconditioner calls its network with use_fp16: parameters in float32, activations in 16 bit."""
    model, x = make().eval(), images(2, 3, 16, 16)
    with torch.no_grad():
        expected = model(x, NOISE, None)
        wanted, found = model(x.to(dtype), NOISE, None), fused(model, **options)(x.to(dtype), NOISE, None)
    assert found.dtype == wanted.dtype
    assert distance(found, expected) <= 1.2 * distance(wanted, expected)


@pytest.mark.parametrize("make", [song, dhariwal])
def test_autocast(make):
    model, x = make().eval(), images(2, 3, 16, 16)
    with torch.no_grad():
        expected = model(x, NOISE, None)
        with torch.autocast("cpu", torch.bfloat16):
            wanted, found = model(x, NOISE, None), fused(model, **ALL)(x, NOISE, None)
    assert found.dtype == wanted.dtype
    assert distance(found, expected) <= 1.2 * distance(wanted, expected)


def test_double_precision_runs_the_original():
    model, x = dhariwal().double().eval(), images(2, 3, 16, 16).double()
    with torch.no_grad():
        assert torch.equal(fused(model, virtual_concat=True)(x, NOISE.double(), None), model(x, NOISE.double(), None))


@pytest.mark.parametrize(("make", "options"), [(song, {"virtual_concat": True}), (dhariwal, {})])
def test_hooks_see_what_they_saw(make, options):
    model, x = make(dropout=0), images(2, 3, 16, 16)
    of = {"GroupNorm", "Conv2d", "Linear", "UNetBlock"}
    expected = recorded(model, x, NOISE, None, kinds=of)
    found = recorded(fused(model, **options), x, NOISE, None, kinds=of)
    assert [name for name, _ in found] == [name for name, _ in expected]
    seen = len(found) // 2  # after which come the same tensors when the call is over, that EDM itself has written into
    for (name, after), (_, before) in zip(found[:seen], expected[:seen], strict=True):
        assert golden.relative(after, before) <= 2e-5, name


def test_a_hook_that_was_there_is_reported():
    model = dhariwal()
    calls = []
    model.dec["8x8_in0"].norm2.register_forward_hook(lambda *_: calls.append(1))
    assert [left.name for left in fuse(model).skipped] == ["dec.8x8_in0.norm2"]
    model(images(1, 3, 16, 16), NOISE[:1], None)
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


@pytest.mark.parametrize("make", [song, dhariwal])
def test_virtual_concat_does_not_concatenate(make):
    model, x = make(), images(2, 3, 16, 16)
    assert concatenations(model, x, NOISE, None) == 4
    assert concatenations(fused(model, virtual_concat=True), x, NOISE, None) == 0


@pytest.mark.parametrize("make", [song, dhariwal])
def test_blocks_that_someone_watches_or_changes_get_the_concatenation(make):
    model, x = fused(make(dropout=0), virtual_concat=True), images(2, 3, 16, 16)
    blocks = [layer for name, layer in model.dec.items() if "block" in name]
    blocks[0].register_forward_hook(lambda *_: None)
    blocks[1].norm0.register_forward_hook(lambda *_: None)
    blocks[2].skip = nn.Sequential(blocks[2].skip)
    blocks[3].skip.register_forward_pre_hook(lambda *_: None)
    assert concatenations(model, x, NOISE, None) == 4
    with torch.no_grad():
        assert golden.relative(model(x, NOISE, None), unfuse(copy.deepcopy(model))(x, NOISE, None)) <= 2e-5


class UNetBlock(edm.UNetBlock):
    """Of a fork that computes something else."""

    def forward(self, x, emb):
        return super().forward(x, emb).clamp(-1, 1)


def test_forks_that_differ_get_their_norms():
    model = randomised(UNetBlock(8, 8, 4))
    x, emb = images(2, 8, 4, 4), images(2, 4)
    expected = results(model, x, emb)
    report = fuse(model)
    assert kinds(report) == {"GroupNorm": 2}
    assert_same(results(model, x, emb), expected)


@pytest.mark.parametrize("make", [song, dhariwal])
def test_compiled_in_one_graph(make):
    model = make(num_blocks=0, attn_resolutions=[]).eval()
    compiled = torch.compile(fused(model, fold_upsample=True, virtual_concat=True), fullgraph=True, backend="aot_eager")
    x = images(2, 3, 16, 32)
    with torch.no_grad():
        assert golden.relative(compiled(x, NOISE, None), model(x, NOISE, None)) <= 2e-5


def test_training_compiled_in_one_graph():
    model = block(16, 16, attention=True, num_heads=2, adaptive_scale=False, skip_scale=0.5)
    compiled = torch.compile(fused(model), fullgraph=True, backend="aot_eager")
    x, emb = images(2, 16, 4, 4), images(2, 10)
    found = {key.replace("_orig_mod.", ""): value for key, value in results(compiled, x, emb).items()}
    assert_same(found, results(model, x, emb))


def test_a_norm_with_a_hook_is_followed_by_silu():
    model, seen = fused(block(16, 16)), []
    model.norm0.register_forward_hook(lambda module, inputs, output: seen.append(output))
    model.conv0.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        model(images(2, 16, 4, 4), images(2, 10))
    torch.testing.assert_close(seen[1], F.silu(seen[0]))


def test_a_hook_that_keeps_an_output_sees_what_the_original_does_to_it():
    """Which adds to it, and no more."""
    kept = []
    for model in (original := block(16, 16, skip_scale=0.5), fused(original)):
        model.conv1.register_forward_hook(lambda module, inputs, output: kept.append(output))
        with torch.no_grad():
            model(images(2, 16, 4, 4), images(2, 10))
    torch.testing.assert_close(kept[1], kept[0])
