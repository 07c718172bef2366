"""Kernels as functions of arrays. Needs jax alone; knows nothing about models, meshes or training.

An op is a package: its public function chooses an implementation, `reference` is its definition in
plain `jnp`, one file a backend, `shapes` lists the sizes that tests and benchmarks share.
"""
