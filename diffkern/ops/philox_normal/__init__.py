from diffkern.ops.philox_normal.op import philox_normal as philox_normal
