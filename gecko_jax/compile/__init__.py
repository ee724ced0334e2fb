"""Compilation of the train step for TPUs that the host does not have.

aot     compiles the step for a TPU topology on a CPU host
hlo     reads memory traffic and collectives from the compiled program
search  compares settings, and keeps the results in a file
"""
