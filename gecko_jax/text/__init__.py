"""Text: from strings to tokens.

text_formats   how queries and passages are written for the encoder
vocabularies   SentencePiece vocabularies
json_vocabularies   vocabularies in tokenizer.json
packing        which texts share a row of tokens, and rows of tokens as arrays
word_rule      how text splits into words, in every script
overlap        texts of evaluation sets in training data
text_files     files of texts, and passages from files and folders
"""
