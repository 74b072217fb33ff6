from diffkern.ops.diffusion_loss.op import diffusion_loss as diffusion_loss
from diffkern.ops.diffusion_loss.op import diffusion_loss_and_grad as diffusion_loss_and_grad
