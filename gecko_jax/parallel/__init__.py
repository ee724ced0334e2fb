"""Devices: meshes, shardings, and facts about chips.

sharding       meshes, and the sharding of every array of a run
chips          peak numbers of TPUs and GPUs, from data sheets
platforms      keeps JAX from looking for a TPU that is absent
numerics       the XLA flag that CPU results need, and a probe for it
"""
