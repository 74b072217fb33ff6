import copy
import pickle

import pytest
import torch
from torch import nn

from diffkern.models import UNet
from tests.models.small import GUIDED, KINDS, PLAIN, small_config, small_model


def inputs(n=3, size=8):
    torch.manual_seed(1)
    return torch.randn(n, 3, size, size), torch.randint(0, 1000, (n,)), torch.arange(n) % 3


def gradients(model, x, t, y):
    """Of a random projection of the output, for x and all parameters; the generator starts anew, for dropout."""
    torch.manual_seed(2)
    x = x.detach().requires_grad_()
    out = model(x, t, y)
    grads = torch.autograd.grad(
        (out * torch.linspace(-1, 1, out.numel()).reshape(out.shape)).sum(), [x, *model.parameters()]
    )
    return out, grads


def relative(a, b):
    return ((a.float() - b.float()).abs().max() / b.float().abs().max()).item()


@pytest.mark.parametrize("kind", KINDS)
def test_a_sample_does_not_see_the_batch(kind):
    model = small_model(**kind).eval()
    x, t, y = inputs()
    together = model(x, t, y)
    for n in range(len(x)):
        assert relative(model(x[n : n + 1], t[n : n + 1], y[n : n + 1]), together[n : n + 1]) < 1e-5
    x[1] = float("nan")
    with_nan = model(x, t, y)
    assert with_nan[1].isnan().all()
    assert relative(with_nan[::2], together[::2]) < 1e-5
    assert model(x[:0], t[:0], y[:0]).shape == (0, *together.shape[1:])


def test_output_depends_on_image_time_and_label():
    model = small_model(**PLAIN)
    x, t, y = inputs()
    out = model(x, t, y)
    assert out.shape == x.shape
    for other in (
        model(x + 0.1, t, y),
        model(x, t + 1, y),
        model(x, t, (y + 1) % 3),
        model(x, t, torch.full_like(y, 3)),
    ):
        assert relative(other, out) > 1e-4
    assert torch.equal(model(x, t.float(), y), out)


def test_a_fresh_network_returns_zeros_of_the_right_shape():
    x, t, _ = inputs(size=12)
    out = UNet(small_config(learn_sigma=True, channel_mult=(1, 1.5, 2), attention_resolutions=(4,)))(x, t)
    assert out.shape == (3, 6, 12, 12)
    assert not out.any()


@pytest.mark.parametrize("kind", KINDS)
def test_memory_format_holds_throughout(kind):
    """No layer falls back to the other format (each would cost a copy), and the numbers are the same."""
    model = small_model(**kind).eval()
    x, t, y = inputs()
    results = {}
    for memory_format in (torch.contiguous_format, torch.channels_last):
        model = model.to(memory_format=memory_format)
        outputs = []
        hooks = [module.register_forward_hook(lambda *call, to=outputs: to.append(call)) for module in model.modules()]
        results[memory_format] = gradients(model, x.contiguous(memory_format=memory_format), t, y)
        for hook in hooks:
            hook.remove()
        for module, _, out in outputs:
            assert out.dim() != 4 or out.is_contiguous(memory_format=memory_format), module
    (out, grads), (out_last, grads_last) = results.values()
    assert relative(out_last, out) < 1e-5
    for grad_last, grad in zip(grads_last, grads, strict=True):
        assert (grad_last - grad).abs().max() <= 2e-5 * grad.abs().max() + 1e-6


@pytest.mark.parametrize("kind", [PLAIN, GUIDED])
def test_gradient_checkpointing_changes_no_gradient(kind):
    """With labels, and with dropout, whose mask must be drawn again when a block is recomputed."""
    model = small_model(**{**kind, "dropout": 0.4})
    x, t, y = inputs()
    out, grads = gradients(model, x, t, y)
    model.gradient_checkpointing = True
    recomputed = []
    hook = model.encoder[0].block.conv1.register_forward_hook(lambda *_: recomputed.append(1))
    out_checkpointed, grads_checkpointed = gradients(model, x, t, y)
    hook.remove()
    assert len(recomputed) == 2
    assert torch.equal(out_checkpointed, out)
    assert all(torch.equal(a, b) for a, b in zip(grads_checkpointed, grads, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_compiles_into_one_graph(kind):
    model = small_model(**{**kind, "dropout": 0.0})
    x, t, y = inputs()
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    out, grads = gradients(model, x, t, y)
    out_compiled, grads_compiled = gradients(compiled, x, t, y)
    assert relative(out_compiled, out) < 1e-5
    for a, b in zip(grads_compiled, grads, strict=True):
        assert (a - b).abs().max() <= 2e-5 * b.abs().max() + 1e-6


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_equal_and_independent(clone):
    model = small_model(**GUIDED).eval()
    x, t, y = inputs()
    out = model(x, t, y)
    other = clone(model)
    assert other.config == model.config
    assert torch.equal(other(x, t, y), out)
    nn.init.zeros_(other.conv_out.weight)
    assert torch.equal(model(x, t, y), out)


@pytest.mark.parametrize("kind", KINDS)
def test_runs_in_bfloat16_and_under_autocast(kind):
    model = small_model(**kind).eval()
    x, t, y = inputs()
    out = model(x, t, y)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        autocast = model(x, t, y)
    half, grads = gradients(model.bfloat16(), x.bfloat16(), t, y)
    assert autocast.dtype == half.dtype == torch.bfloat16
    assert relative(autocast, out) < 0.05
    assert relative(half, out) < 0.05
    assert all(grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"x": torch.zeros(2, 3, 8)}, ValueError, r"x must be \(N, 3, H, W\), not \(2, 3, 8\)"),
        ({"x": torch.zeros(2, 1, 8, 8)}, ValueError, r"x must be \(N, 3, H, W\)"),
        ({"x": torch.zeros(2, 3, 8, 9)}, ValueError, r"x must have .* multiples of 2, not \(8, 9\)"),
        ({"x": torch.zeros(2, 3, 0, 8)}, ValueError, r"x must have"),
        ({"t": torch.zeros(3)}, ValueError, r"t must be \(2,\)"),
        ({"t": torch.tensor(5)}, ValueError, r"t must be \(2,\)"),
        ({"t": torch.zeros(2, device="meta")}, ValueError, r"t must be \(2,\) on cpu"),
        ({"y": None}, ValueError, "y must be given"),
        ({"y": torch.zeros(2)}, TypeError, "y must hold int64 or int32 labels"),
        ({"y": torch.zeros(2, dtype=torch.uint8)}, TypeError, "y must hold int64 or int32 labels"),
        ({"y": torch.zeros(2, 1, dtype=torch.long)}, ValueError, r"y must be \(2,\)"),
        ({"y": torch.tensor([0, 4])}, ValueError, r"y must be in \[0, 3\], not 0 … 4"),
        ({"y": torch.tensor([-1, 0])}, ValueError, r"y must be in \[0, 3\]"),
    ],
)
def test_names_the_argument_that_is_wrong(arguments, error, message):
    model = small_model(**PLAIN)
    good = {"x": torch.zeros(2, 3, 8, 8), "t": torch.zeros(2), "y": torch.zeros(2, dtype=torch.long)}
    model(**good)
    with pytest.raises(error, match=message):
        model(**{**good, **arguments})


def test_without_classes_labels_are_refused():
    model = small_model()
    assert model.num_classes is None
    with pytest.raises(ValueError, match="y must be None"):
        model(torch.zeros(2, 3, 8, 8), torch.zeros(2), torch.zeros(2, dtype=torch.long))


def test_without_a_null_label_the_last_class_is_the_last():
    model = small_model(**GUIDED)
    assert model.num_classes == 3
    with pytest.raises(ValueError, match=r"y must be in \[0, 2\]"):
        model(torch.zeros(1, 3, 8, 8), torch.zeros(1), torch.tensor([3]))


def test_self_conditioning():
    """None is zeros; what is known changes the output; the first convolution alone is wider; checkpoints keep it."""
    plain, model = small_model(**PLAIN).eval(), small_model(**PLAIN, self_condition=True).eval()
    assert model.self_condition
    assert not plain.self_condition
    shapes, wider = ({name: tuple(w.shape) for name, w in net.state_dict().items()} for net in (plain, model))
    assert wider == shapes | {"conv_in.weight": (16, 6, 3, 3)}
    x, t, y = inputs()
    blind = model(x, t, y)
    assert torch.equal(model(x, t, y, torch.zeros_like(x)), blind)
    assert relative(model(x, t, y, x), blind) > 1e-4
    # [x0; x]: with the same weights on x, and none on x0, it is the network without.
    state = model.state_dict()
    weight = torch.cat([torch.zeros(16, 3, 3, 3), plain.conv_in.weight], dim=1)
    model.load_state_dict(plain.state_dict() | {"conv_in.weight": weight.detach()})
    assert relative(model(x, t, y, x), plain(x, t, y)) < 1e-5
    model.load_state_dict(state)


@pytest.mark.parametrize("kind", KINDS)
def test_self_conditioning_compiles_and_takes_gradients(kind):
    model = small_model(**{**kind, "dropout": 0.0}, self_condition=True)
    x, t, y = inputs()
    known = torch.rand_like(x, requires_grad=True)
    out = model(x, t, y, known)
    (gradient,) = torch.autograd.grad(out.square().sum(), known)
    assert gradient.abs().max() > 0
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, t, y, known), out)


def test_what_is_known_must_be_like_x():
    plain, model = small_model(), small_model(self_condition=True)
    x, t = torch.zeros(2, 3, 8, 8), torch.zeros(2)
    with pytest.raises(ValueError, match="x_self_cond must be None: this model takes no x0"):
        plain(x, t, None, x)
    for known in (x[:1], x[:, :1], x.double(), x.to("meta")):
        with pytest.raises(ValueError, match=r"x_self_cond must be torch.float32 \(2, 3, 8, 8\) on cpu as x is, not"):
            model(x, t, None, known)
