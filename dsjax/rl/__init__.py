"""Reinforcement learning on rewards that can be checked. Knows nothing about HTTP."""
