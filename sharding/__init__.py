"""Meshes, axis rules and what moves between devices. Needs jax; knows nothing about models."""
