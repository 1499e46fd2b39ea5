"""Jacobi trajectories: how they are collected, cleaned, stored and read again. Token ids only, never text."""
