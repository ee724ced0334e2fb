"""FRet: an LLM reads passages, writes queries, and relabels what a retriever finds."""
