from diffkern.ops.linear_attention.op import linear_attention as linear_attention
