"""The mathematics of diffusion: schedules, parameterizations, guidance, solvers, the consistency function, samplers."""
