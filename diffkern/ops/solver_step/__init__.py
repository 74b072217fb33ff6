from diffkern.ops.solver_step.op import solver_step as solver_step
