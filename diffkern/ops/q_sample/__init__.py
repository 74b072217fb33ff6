from diffkern.ops.q_sample.op import q_sample as q_sample
