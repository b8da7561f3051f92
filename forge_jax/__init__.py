"""forge-jax: reinforcement learning of agents, in JAX.

Read the packages in the order of the data flow:
tasks -> rollout -> agents -> gateway -> engine -> pool -> tree -> algo ->
trainer -> (weights) -> engine.
"""

__version__ = "0.1.0"
