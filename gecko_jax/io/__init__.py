"""Files and messages, for all rooms.

reading        lines and JSON records, with file and line in every error
writing        files and folders, written atomically
inputs         rules for a field of a user's file
columns        rows with named columns, as JSON lines or TSV
qrels          relevance judgements
field_rules    declared types for the fields of JSON objects
npy            `.npy` arrays, mapped into memory
checksums      checksums of files and arrays
progress       a progress bar, or log lines
wording        plurals, and untrusted text made printable
"""
