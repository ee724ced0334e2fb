"""Models: pure functions and Flax modules, arrays in and arrays out.

dual_encoder   the Gecko dual encoder: shared tower, mean pooling, projection, MRL
t5             the layers of a T5 encoder
from_scratch   initial parameters of a model without a pre-trained encoder
transformer    the decoder of the in-process language model (Llama, Gemma 3)
"""
