"""The operations, each in a folder of its own: the public function, its reference and its kernels."""

from diffkern.ops.attention import attention as attention
from diffkern.ops.attention import attention_qkv as attention_qkv
from diffkern.ops.channel_rms_norm import channel_rms_norm as channel_rms_norm
from diffkern.ops.diffusion_loss import diffusion_loss as diffusion_loss
from diffkern.ops.diffusion_loss import diffusion_loss_and_grad as diffusion_loss_and_grad
from diffkern.ops.dynamic_threshold import dynamic_threshold as dynamic_threshold
from diffkern.ops.group_norm import group_norm as group_norm
from diffkern.ops.guidance_rescale import guidance_rescale as guidance_rescale
from diffkern.ops.linear_attention import linear_attention as linear_attention
from diffkern.ops.philox_normal import philox_normal as philox_normal
from diffkern.ops.philox_uint32 import philox_uint32 as philox_uint32
from diffkern.ops.q_sample import q_sample as q_sample
from diffkern.ops.solver_step import solver_step as solver_step
from diffkern.ops.vb_terms import VbTerms as VbTerms
from diffkern.ops.vb_terms import vb_terms as vb_terms
