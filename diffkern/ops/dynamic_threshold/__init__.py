from diffkern.ops.dynamic_threshold.op import dynamic_threshold as dynamic_threshold
