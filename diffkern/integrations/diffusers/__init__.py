"""Schedulers for diffusers' pipelines and training scripts: change the import, keep the code.

Our own classes on SchedulerMixin and ConfigMixin. Each takes its namesake's arguments and configs, and one more,
`noise` (see `scheduler.Scheduler`). docs/diffusers.md says what differs.
"""

from diffusers.schedulers.scheduling_utils import SchedulerMixin as SchedulerMixin

from diffkern.integrations.diffusers.ddim import DDIMScheduler as DDIMScheduler
from diffkern.integrations.diffusers.ddim_inverse import DDIMInverseScheduler as DDIMInverseScheduler
from diffkern.integrations.diffusers.ddpm import DDPMScheduler as DDPMScheduler
from diffkern.integrations.diffusers.dpmsolver_multistep import (
    DPMSolverMultistepScheduler as DPMSolverMultistepScheduler,
)
from diffkern.integrations.diffusers.euler import EulerDiscreteScheduler as EulerDiscreteScheduler
from diffkern.integrations.diffusers.euler_ancestral import (
    EulerAncestralDiscreteScheduler as EulerAncestralDiscreteScheduler,
)
from diffkern.integrations.diffusers.heun import HeunDiscreteScheduler as HeunDiscreteScheduler
from diffkern.integrations.diffusers.pndm import PNDMScheduler as PNDMScheduler
from diffkern.integrations.diffusers.unipc import UniPCMultistepScheduler as UniPCMultistepScheduler
