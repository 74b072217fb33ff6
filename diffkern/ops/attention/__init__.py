from diffkern.ops.attention.op import attention as attention
from diffkern.ops.attention.op import attention_qkv as attention_qkv
