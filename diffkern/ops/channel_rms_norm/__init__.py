from diffkern.ops.channel_rms_norm.op import channel_rms_norm as channel_rms_norm
