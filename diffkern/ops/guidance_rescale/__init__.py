from diffkern.ops.guidance_rescale.op import guidance_rescale as guidance_rescale
