"""diffkern in other codebases: one module a codebase, with the names that its users import."""
