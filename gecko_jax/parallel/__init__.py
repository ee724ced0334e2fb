"""Devices: meshes, shardings, and facts about chips.

sharding       meshes, and the sharding of every array of a run
chips          peak rates of TPUs and GPUs, from data sheets
platforms      keeps JAX from starting libtpu on a host without a TPU
numerics       the XLA flag that correct results on CPU need, and a check for it
"""
