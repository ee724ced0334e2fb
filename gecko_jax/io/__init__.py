"""Files and messages: what every other room reads, writes and reports with.

reading        lines and JSON records, with file and line in every error
writing        files and folders written whole or not at all
inputs         rules for a field of a user's file
columns        rows with named columns, as JSON lines or TSV
qrels          relevance judgements
field_rules    the fields that a JSON object must have, declared once
npy            `.npy` arrays, mapped into memory
checksums      checksums of files and arrays
progress       a progress bar, or log lines
wording        plurals, and other people's text made printable
"""
