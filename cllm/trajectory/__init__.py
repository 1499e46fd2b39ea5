"""Jacobi trajectories: collecting, filtering, storing and reading them. Token ids only, never text."""
