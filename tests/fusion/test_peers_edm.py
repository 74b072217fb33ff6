"""What the stand-ins for EDM's networks do beyond the configurations of the golden data."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F

from tests.fusion.peers import edm, edm_preconditioners
from tests.fusion.peers.edm_layers import AttentionOp, Conv2d

SMALL = {"model_channels": 16, "channel_mult": [1, 2, 2], "num_blocks": 1, "attn_resolutions": [8]}
X = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
SIGMA = torch.tensor([0.4, 3.0])


def randomised(model):
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.mark.parametrize("encoder_type", ["standard", "skip", "residual"])
@pytest.mark.parametrize("decoder_type", ["standard", "skip"])
@pytest.mark.parametrize("embedding_type", ["positional", "fourier"])
def test_every_kind_of_song_unet_runs_and_uses_all_its_parameters(encoder_type, decoder_type, embedding_type):
    kinds = {"encoder_type": encoder_type, "decoder_type": decoder_type, "embedding_type": embedding_type}
    extra = {"label_dim": 4, "augment_dim": 9, "resample_filter": [1, 3, 3, 1], "label_dropout": 0.5}
    model = randomised(edm.SongUNet(16, 3, 3, **SMALL, **kinds, **extra))
    out = model(X, SIGMA, torch.eye(4)[:2] * 2, augment_labels=torch.randn(2, 9))
    assert out.shape == X.shape
    out.square().mean().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_heads_of_dhariwal_unet_have_the_channels_asked_for():
    block = edm.UNetBlock(32, 64, 16, attention=True, channels_per_head=16)
    assert block.num_heads == 4
    model = edm.DhariwalUNet(16, 3, 3, model_channels=64, channel_mult=[1, 2], num_blocks=1, attn_resolutions=[8])
    assert {b.num_heads for b in model.modules() if isinstance(b, edm.UNetBlock)} == {0, 2}


def test_the_box_filter_is_average_pooling_and_nearest_neighbour():
    down, up = (Conv2d(3, 3, kernel=0, **{way: True}) for way in ("down", "up"))
    torch.testing.assert_close(down(X), F.avg_pool2d(X, 2))
    torch.testing.assert_close(up(X), F.interpolate(X, scale_factor=2.0, mode="nearest"))


@pytest.mark.parametrize("way", ["up", "down"])
def test_fused_resampling_is_the_same_away_from_the_border(way):
    torch.manual_seed(0)
    plain = Conv2d(3, 5, kernel=3, resample_filter=[1, 3, 3, 1], **{way: True})
    fused = Conv2d(3, 5, kernel=3, resample_filter=[1, 3, 3, 1], fused_resample=True, **{way: True})
    fused.load_state_dict(plain.state_dict())
    if way == "up":
        torch.testing.assert_close(fused(X)[..., 4:-4, 4:-4], plain(X)[..., 4:-4, 4:-4])
    else:  # the convolution is at another resolution: what it blurs and what blurs it are exchanged for a constant
        ones = torch.ones_like(X)
        torch.testing.assert_close(fused(ones)[..., 2:-2, 2:-2], plain(ones)[..., 2:-2, 2:-2])


def test_attention_has_the_gradient_of_a_softmax():
    q, k, grad = torch.randn(3, 5, 7), torch.randn(3, 5, 9), torch.randn(3, 7, 9)
    found, wanted = [], []
    for leaves, compute in (
        (found, AttentionOp.apply),
        (wanted, lambda q, k: (torch.einsum("ncq,nck->nqk", q, k) * 5**-0.5).softmax(dim=2)),
    ):
        leaves += [q.clone().requires_grad_(), k.clone().requires_grad_()]
        compute(*leaves).backward(grad)
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


@pytest.mark.parametrize("name", ["VPPrecond", "VEPrecond", "iDDPMPrecond", "EDMPrecond"])
@pytest.mark.parametrize("model_type", ["SongUNet", "DhariwalUNet"])
def test_preconditioners_denoise_to_the_size_of_the_image(name, model_type):
    precond = getattr(edm_preconditioners, name)
    net = randomised(precond(16, 3, label_dim=4, model_type=model_type, **SMALL)).eval()
    with torch.no_grad():
        out = net(X, SIGMA, torch.eye(4)[:2])
        assert out.shape == X.shape
        assert not torch.allclose(out, net(X, SIGMA))
        # An almost clean image is returned as it is: c_skip → 1 and c_out → 0 as σ → 0.
        assert (net(X, torch.tensor([1e-4])) - X).abs().max() < 1e-2


def test_noise_levels_of_the_preconditioners():
    vp = edm_preconditioners.VPPrecond(16, 3, **SMALL)
    t = torch.tensor([0.01, 0.3, 1.0])
    torch.testing.assert_close(vp.sigma_inv(vp.sigma(t)), t)
    iddpm = edm_preconditioners.iDDPMPrecond(16, 3, model_type="SongUNet", **SMALL)
    assert (iddpm.u.diff() < 0).all()
    assert torch.equal(iddpm.round_sigma(iddpm.u[5:9] * 1.0001), iddpm.u[5:9])
    assert torch.equal(iddpm.round_sigma(iddpm.u[5:9], return_index=True), torch.arange(5, 9))


def make():
    torch.manual_seed(0)
    return randomised(edm_preconditioners.EDMPrecond(16, 3, model_type="SongUNet", **SMALL)).eval()


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))])
def test_a_copy_is_of_the_same_classes_and_computes_the_same(duplicate):
    net = make()
    again = duplicate(net)
    assert [type(m) for m in again.modules()] == [type(m) for m in net.modules()]
    assert not {id(p) for p in net.parameters()} & {id(p) for p in again.parameters()}
    with torch.no_grad():
        assert torch.equal(again(X, SIGMA), net(X, SIGMA))


def test_a_pickle_brings_its_own_source(run_python, tmp_path):
    net = make()
    with torch.no_grad():
        torch.save((X, SIGMA, net(X, SIGMA)), tmp_path / "numbers.pt")
    (tmp_path / "net.pkl").write_bytes(pickle.dumps(net))
    code = f"""
import pickle, sys, torch
net = pickle.load(open({str(tmp_path / "net.pkl")!r}, "rb"))
assert "tests.fusion.peers.edm_preconditioners" not in sys.modules
x, sigma, out = torch.load({str(tmp_path / "numbers.pt")!r})
assert (net(x, sigma) - out).abs().max() < 1e-5 * out.abs().max()
again = pickle.loads(pickle.dumps(net))
assert type(again) is type(net)
print(type(net).__name__, type(net).__module__.startswith("unpickled_source_"))
"""
    assert run_python(code) == "EDMPrecond True"
