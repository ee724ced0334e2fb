"""Text: from strings to tokens.

text_formats   prompts and templates: what the encoder reads of a query or passage
vocabularies   the SentencePiece vocabulary
packing        which texts share a row of tokens
word_rule      what counts as a word, in every script
overlap        texts of evaluation sets, found in training data
text_files     files of texts
"""
