from diffkern.ops.group_norm.op import group_norm as group_norm
