"""Compilation for TPUs that are not there.

aot    compiles the train step for a TPU topology on a CPU host
hlo    reads memory and collectives from the compiled program
"""
