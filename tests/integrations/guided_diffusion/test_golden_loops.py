"""Whole sampling runs against those of guided-diffusion, fed with the noise that it drew."""

import pytest

from tests.golden_data import error
from tests.integrations.guided_diffusion.replay import GOLDEN, diffusion_of, replay, stub_model, tensor

RUNS = [
    (loop, run)
    for loop in GOLDEN.meta["loops"]
    for run in ("p_sample_loop", "ddim_loop_eta0.0", "ddim_loop_eta0.5")
    if f"{loop}/{run}/samples" in GOLDEN
]


@pytest.mark.parametrize(("loop", "run"), RUNS)
def test_loop(loop, run, monkeypatch):
    _, key, mean, variance, clip = loop.split("/")
    diffusion, stored = diffusion_of(key, mean, variance), f"{loop}/{run}"
    if f"{stored}/noise" in GOLDEN:
        noise = GOLDEN[f"{stored}/noise"]
        assert len(noise) == diffusion.num_timesteps  # one draw a step, the last one too
        replay(monkeypatch, noise)
    x_T = tensor("loops/x_T")
    arguments = {"noise": x_T, "clip_denoised": clip == "clip1"}
    if run == "p_sample_loop":
        outs = diffusion.p_sample_loop_progressive(stub_model(variance), x_T.shape, **arguments)
    else:
        outs = diffusion.ddim_sample_loop_progressive(stub_model(variance), x_T.shape, **arguments, eta=float(run[-3:]))
    kept = GOLDEN[f"{stored}/kept"].tolist()
    samples = [out["sample"].numpy() for out in outs]
    assert len(samples) == diffusion.num_timesteps
    for step, expected in zip(kept, GOLDEN[f"{stored}/samples"], strict=True):
        # Rounding of all the steps before; in DDIM's last ones the peer's float32 coefficients (test_ddim).
        assert error(samples[step], expected) < (5e-6 if run == "p_sample_loop" else 2e-5), step
