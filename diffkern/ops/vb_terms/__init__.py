from diffkern.ops.vb_terms.op import VbTerms as VbTerms
from diffkern.ops.vb_terms.op import vb_terms as vb_terms
