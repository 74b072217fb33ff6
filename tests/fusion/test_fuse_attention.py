"""The attention of every codebase on the op: the same numbers, the original where something else is asked for."""

import copy
import pickle
from functools import partial

import pytest
import torch
from torch import nn

import diffkern
from diffkern.integrations.fusion.method import FusedBlock
from tests.fusion.checks import assert_bitwise, assert_same, distance, images, randomised, recorded, results
from tests.fusion.golden import relative
from tests.fusion.peers import edm, guided_diffusion, improved_diffusion, k_diffusion, lucidrains


def guided(heads=2, new_order=False):
    return guided_diffusion.AttentionBlock(32, heads, use_new_attention_order=new_order)


def improved(heads=4, use_checkpoint=False):
    return improved_diffusion.AttentionBlock(32, heads, use_checkpoint)


def spatial(**settings):
    """As diffusers' U-Nets and autoencoders have it."""
    processor = pytest.importorskip("diffusers.models.attention_processor")
    default = {"heads": 4, "dim_head": 8, "norm_num_groups": 8, "residual_connection": True, "bias": True}
    return processor.Attention(32, **default | settings)


def in_transformer(**settings):
    processor = pytest.importorskip("diffusers.models.attention_processor")
    return processor.Attention(32, **{"heads": 2, "dim_head": 40} | settings)


def lucid(kind="denoising_diffusion_pytorch", **settings):
    return lucidrains.imported(kind).Attention(32, **settings)


def linear(kind="denoising_diffusion_pytorch", **settings):
    return lucidrains.imported(kind).LinearAttention(32, **settings)


class Conditioned(nn.Module):
    """k-diffusion's, with its condition."""

    def __init__(self, heads=2, dropout=0.0):
        super().__init__()
        layers = k_diffusion.layers()
        self.attention = layers.SelfAttention2d(32, heads, partial(layers.AdaGN, 12, num_groups=4), dropout)

    def forward(self, x):
        return self.attention(x, {"cond": images(len(x), 12, seed=5).to(x.dtype)})


class EDMBlock(nn.Module):
    def __init__(self, heads=2, **settings):
        super().__init__()
        self.block = edm.UNetBlock(32, 32, 12, attention=True, num_heads=heads, **settings)

    def forward(self, x):
        return self.block(x, images(len(x), 12, seed=5).to(x.dtype))


BLOCKS = {
    "diffusers": spatial,
    "diffusers, one head": lambda: spatial(heads=1, dim_head=32),
    "diffusers, rescaled": lambda: spatial(rescale_output_factor=2**0.5, upcast_attention=True),
    "diffusers, no residual": lambda: spatial(residual_connection=False, rescale_output_factor=2.0),
    "diffusers, no bias": lambda: spatial(bias=False, out_bias=False, upcast_softmax=True),
    "diffusers, other scale": lambda: spatial(scale_qk=False),
    "guided-diffusion, legacy order": guided,
    "guided-diffusion, new order": lambda: guided(4, new_order=True),
    "improved-diffusion": improved,
    "improved-diffusion, checkpointed": lambda: improved(use_checkpoint=True),
    "EDM": EDMBlock,
    "EDM, SongUNet's": lambda: EDMBlock(1, skip_scale=0.5, adaptive_scale=False),
    "denoising-diffusion-pytorch": lambda: lucid(heads=3, dim_head=5),
    "denoising-diffusion-pytorch, flash": lambda: lucid(flash=True),
    "denoising-diffusion-pytorch, no memory": lambda: lucid("classifier_free_guidance"),
    "denoising-diffusion-pytorch, linear": lambda: linear(heads=3, dim_head=5),
    "denoising-diffusion-pytorch, linear, no memory": lambda: linear("classifier_free_guidance"),
    "denoising-diffusion-pytorch, linear, UViT's": lambda: linear("simple_diffusion"),
    "k-diffusion": Conditioned,
    "diffkern": lambda: diffkern.nn.Attention(32, num_heads=4, order="hcqkv"),
}
INPUTS = {
    "contiguous": images(2, 32, 5, 7),
    "channels last": images(2, 32, 5, 7).to(memory_format=torch.channels_last),
    "one pixel": images(3, 32, 1, 1),
    "batch 1": images(1, 32, 8, 8),
    "strided": images(2, 32, 8, 12)[..., 1:-1, 1::2],
}
CALLED = ("Conv1d", "Conv2d", "Linear", "Dropout", "GroupNorm", "GroupNorm32", "RMSNorm", "AdaGN", "Attend")


def made(name):
    torch.manual_seed(0)
    return randomised(BLOCKS[name]())


def in_float64(model):
    """A copy in float64, also of a GroupNorm32, whose own arithmetic is float32."""
    wide = copy.deepcopy(model).double()
    for norm in wide.modules():
        if type(norm).__name__ == "GroupNorm32":
            norm.forward = partial(nn.GroupNorm.forward, norm)
    return wide


def exact(model, x):
    return results(in_float64(model), x.double())


def fused(model, **options):
    report = diffkern.fuse(model := copy.deepcopy(model), **options)
    assert not report.skipped
    assert any("attention" in done.effect for done in report.replaced) or isinstance(model, diffkern.nn.Attention)
    return model


@pytest.mark.parametrize("x", INPUTS.values(), ids=INPUTS)
@pytest.mark.parametrize("name", BLOCKS)
def test_the_same_numbers_and_gradients(name, x):
    if x.shape[2:] == (1, 1) and name.startswith("EDM"):
        x = x.expand(-1, -1, 2, 2)  # of which its convolutions see more than one pixel
    if not x.is_contiguous() and name.startswith("diffusers") and x.stride(1) != 1:
        x = x.contiguous()  # as the original asks for
    model, before = made(name), x.clone()
    found, unfused, expected = results(fused(model), x), results(model, x), exact(model, x)
    largest = max(value.abs().max() for value in expected.values() if value is not None)
    for key, value in expected.items():
        assert (value is None) == (found[key] is None)
        if value is not None:
            # A bias of k moves all scores of a row alike: its gradient is zero but for rounding.
            scale = largest if value.abs().max() <= 1e-9 * largest else value.abs().max()
            bound = max(2e-5 * scale, 2 * (unfused[key] - value).abs().max())
            assert (found[key] - value).abs().max() <= bound, key
    assert torch.equal(x, before)


@pytest.mark.parametrize("what", ["dropout", "hook"])
@pytest.mark.parametrize("x", INPUTS.values(), ids=INPUTS)
def test_diffusers_strides_where_the_projection_is_called(x, what):
    """Later blocks draw their dropout in the order in memory of what they are given."""
    model, x = randomised(spatial(dropout=0.5 if what == "dropout" else 0.0)), x if x.stride(1) == 1 else x.contiguous()
    same = fused(model)
    if what == "hook":
        for m in (model, same):
            m.to_out[0].register_forward_hook(lambda module, arguments, output: None)
    found, expected = (results(m, x) for m in (same, model))
    for stride, other, size in zip(found["out"].stride(), expected["out"].stride(), x.shape, strict=True):
        assert size == 1 or stride == other


@pytest.mark.parametrize("options", [{}, {"channels_last": True}])
@pytest.mark.parametrize("name", BLOCKS)
def test_of_double_precision_the_original_runs(name, options):
    if name == "diffkern":
        pytest.skip("it is the original")
    model, x = made(name), images(2, 32, 5, 7)
    same = copy.deepcopy(model)
    diffkern.fuse(same, **options)
    assert relative(in_float64(same)(x.double()), in_float64(model)(x.double())) <= 1e-13


@pytest.mark.parametrize("name", BLOCKS)
def test_bfloat16(name):
    if name.endswith("other scale"):
        pytest.skip("whose scores are too large for 16 bit")
    model, x = made(name).eval(), images(2, 32, 6, 6)
    same, exact = fused(model), model(x)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        ours, theirs = same(x), model(x)
    assert ours.dtype == theirs.dtype
    assert distance(ours, exact) <= 1.1 * distance(theirs, exact)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("name", BLOCKS)
def test_hooks_are_called_with_what_they_saw(name, when):
    if name == "diffkern":
        pytest.skip("it is the original")
    model, x = made(name).eval(), images(2, 32, 5, 7)
    for kinds in (CALLED, *[(kind,) for kind in CALLED if any(type(m).__name__ == kind for m in model.modules())]):
        same = copy.deepcopy(model)
        expected = recorded(copy.deepcopy(model), x, kinds=kinds)
        if when == "after":
            diffkern.fuse(same)
        seen = recorded(same, x, kinds=kinds, then=diffkern.fuse if when == "before" else None)
        assert [name for name, _ in seen] == [name for name, _ in expected]
        if name.startswith("EDM"):  # which itself writes into what its convolutions returned
            seen, expected = seen[: len(seen) // 2], expected[: len(expected) // 2]
        assert all(relative(a, b) <= 2e-5 for (_, a), (_, b) in zip(seen, expected, strict=True))


@pytest.mark.parametrize("name", BLOCKS)
def test_unfused_it_is_what_it_was(name):
    model, x = made(name), images(2, 32, 5, 7)
    expected, kinds = results(model, x), [type(m) for m in model.modules()]
    state = {key: value.clone() for key, value in model.state_dict().items()}
    diffkern.fuse(model, channels_last=True)
    assert_bitwise(model.state_dict(), state)
    diffkern.unfuse(model)
    assert [type(m) for m in model.modules()] == kinds
    assert_bitwise(results(model, x), expected)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize("name", BLOCKS)
def test_copies(name, copied):
    if copied is not copy.deepcopy and any(type(m).__name__ == "Attend" for m in made(name).modules()):
        pytest.skip("the original cannot be pickled")
    model, x = fused(made(name)), images(2, 32, 5, 7)
    same = copied(model)
    assert [type(m) for m in same.modules()] == [type(m) for m in model.modules()]
    assert any(isinstance(m, FusedBlock) for m in same.modules())
    assert_bitwise(results(same, x), results(model, x))


@pytest.mark.parametrize("name", BLOCKS)
def test_twice_the_same_bits(name):
    model, x = fused(made(name)), images(2, 32, 5, 7)
    assert_bitwise(results(model, x), results(model, x))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", ["diffusers", "guided-diffusion, new order", "denoising-diffusion-pytorch"])
def test_compile_without_graph_breaks(name, training):
    torch.compiler.reset()
    model, x = fused(made(name)).train(training), images(2, 32, 5, 7)
    if name.startswith("guided"):
        model.forward = model._forward  # which else goes through an autograd.Function of its own
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.set_grad_enabled(training):
        assert relative(compiled(x), made(name)(x)) <= 2e-5


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_dropout_in_training(dropout):
    x = images(2, 32, 5, 7)
    for model in (spatial(dropout=dropout), Conditioned(dropout=dropout)):
        model = randomised(model).train()
        found, expected = results(fused(model), x), results(model, x)
        assert relative(found["out"], expected["out"]) <= 2e-5
        assert relative(found["grad.x"], expected["grad.x"]) <= 2e-5


class TestDiffusersTransformer:
    """A sequence, and the text beside it."""

    @pytest.mark.parametrize("cross", [None, 24])
    def test_of_a_sequence(self, cross):
        model = randomised(in_transformer(cross_attention_dim=cross))
        report = diffkern.fuse(same := copy.deepcopy(model))
        assert [done.effect for done in report.replaced] == ["attention without copies"]
        text = None if cross is None else images(2, 77, 24, seed=4)
        for length in (9, 64):
            x = images(2, length, 32)
            assert_same(results(same, x, text), results(model, x, text))
            assert same(x, text).stride() == model(x, text).stride()

    @pytest.mark.parametrize(
        "given",
        [
            {"attention_mask": torch.zeros(2, 9).index_fill_(1, torch.tensor([0, 3]), -1e4)},
            {"encoder_hidden_states": images(2, 4, 32, seed=6), "attention_mask": torch.full((2, 4), -1.0)},
            {"temb": images(2, 3)},
        ],
        ids=["mask", "mask of the text", "embedding"],
    )
    def test_other_arguments(self, given):
        model, x = randomised(in_transformer()), images(2, 9, 32)
        expected = model(x, **given)
        diffkern.fuse(model)
        assert relative(model(x, **given), expected) <= 2e-5

    @pytest.mark.parametrize("settings", [{"qk_norm": "layer_norm"}, {"added_kv_proj_dim": 16}, {"kv_heads": 1}])
    def test_of_other_settings_it_is_left_alone(self, settings):
        model = in_transformer(**settings)
        assert not [done for done in diffkern.fuse(model).replaced if done.block == "Attention"]

    def test_what_is_set_later_is_looked_at(self):
        from diffusers.models import attention_processor as of_diffusers

        model, x = randomised(in_transformer()).eval(), images(2, 9, 32)
        same = fused(model)
        calls = []

        class Counting(of_diffusers.AttnProcessor2_0):
            def __call__(self, *args, **kwargs):
                calls.append(len(args))
                return 2 * super().__call__(*args, **kwargs)

        for processor in (Counting(), of_diffusers.SlicedAttnProcessor(1), of_diffusers.AttnProcessor()):
            for net in (model, same):
                net.set_processor(processor)
            assert relative(same(x), model(x)) <= 2e-5
        assert len(calls) == 2
        for net in (model, same):
            net.norm_q = nn.LayerNorm(40)
            net.set_processor(of_diffusers.AttnProcessor2_0())
        assert relative(same(x), model(x)) <= 2e-5

    def test_fused_projections_and_back(self):
        from diffusers.models import attention_processor as of_diffusers

        model, x = randomised(in_transformer()).eval(), images(2, 9, 32)
        same, expected = fused(model), model(x)
        with torch.no_grad():
            same.fuse_projections()
        same.set_processor(of_diffusers.FusedAttnProcessor2_0())
        with torch.no_grad():
            same.to_q.weight.zero_()
        assert relative(same(x), expected) <= 2e-5

    @pytest.mark.parametrize("first", ["fuse", "adapter"])
    def test_lora(self, first):
        peft = pytest.importorskip("peft")
        config = peft.LoraConfig(r=3, target_modules=["to_q", "to_v", "to_out.0"], init_lora_weights=False)
        x, found = images(2, 32, 5, 7), []
        for fuses in (False, True):
            model = randomised(spatial())
            if fuses and first == "fuse":
                model = fused(model)
            torch.manual_seed(3)
            model = peft.inject_adapter_in_model(config, model)
            found.append(results(fused(model) if fuses and first == "adapter" else model, x))
        assert_same(found[1], found[0])


def test_a_fork_with_other_attention_is_found_out():
    class QKVAttention(guided_diffusion.QKVAttention):
        def forward(self, qkv):
            return super().forward(qkv) * 1.01

    model = guided(2, new_order=True)
    model.attention = QKVAttention(2)
    report = diffkern.fuse(model)
    assert ["differs" in left.reason for left in report.skipped if left.block == "AttentionBlock"] == [True]
    assert [done.block for done in report.replaced] == ["GroupNorm32"]


def test_a_hook_on_guided_diffusions_attention_sees_the_projection():
    model, x, seen = made("guided-diffusion, new order"), images(2, 32, 5, 7), []
    same = fused(model)
    same.attention.register_forward_hook(lambda m, inputs, output: seen.append(inputs[0].shape))
    assert relative(same(x), model(x)) <= 2e-5
    assert seen == [(2, 96, 35)]


def test_the_residual_is_written_into_the_projection(monkeypatch):
    names = ("diffusers", "guided-diffusion, new order", "k-diffusion", "diffkern")
    models = {name: fused(made(name)) for name in names}
    written, add = [], torch.Tensor.add_
    monkeypatch.setattr(torch.Tensor, "add_", lambda self, other: written.append(self.data_ptr()) or add(self, other))
    for name, model in models.items():
        for x in (INPUTS["contiguous"], INPUTS["channels last"]):
            with torch.no_grad():
                out = model._forward(x) if name.startswith("guided") else model(x)
            assert written == [out.data_ptr()], name
            written.clear()
