"""The ops as the tests of the contract see them: one file an op."""

from tests.ops.contract import (
    attention,
    channel_rms_norm,
    diffusion_loss,
    dynamic_threshold,
    group_norm,
    guidance_rescale,
    linear_attention,
    philox,
    q_sample,
    solver_step,
    vb_terms,
)

CASES = [
    *philox.CASES,
    *q_sample.CASES,
    *group_norm.CASES,
    *solver_step.CASES,
    *diffusion_loss.CASES,
    *guidance_rescale.CASES,
    *dynamic_threshold.CASES,
    *vb_terms.CASES,
    *channel_rms_norm.CASES,
    *group_norm.JOINED,
    *attention.CASES,
    *linear_attention.CASES,
]
