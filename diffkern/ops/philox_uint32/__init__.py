from diffkern.ops.philox_uint32.op import philox_uint32 as philox_uint32
