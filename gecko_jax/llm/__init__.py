"""Language models for FRet: behind a server, or in this process.

protocol            the interface of a language model, and recorded answers
server              an OpenAI-compatible server
wire, connections   request bodies and replies; HTTP with a deadline
pacing              rate limits
alignments, canary  checks of a server's log-probabilities
request_log         answered requests, their cost, and the budget
local, in_process   a model in this process, and its adapter to the request log
decoding, text_sampling, decoder_batches     scores and samples, in batches
decoder_*, gguf*, safetensors_folder         a model's files, settings and tokenizer
"""
