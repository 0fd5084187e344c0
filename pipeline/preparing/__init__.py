"""From the user's files to token ids, one part at a time.

In: the config's `prepare` section and a model's tokenizer. Out: `prepared/`, with a row per example and a quarantine for
every record that could not become one. Start with part_worker.py, which takes a chunk of records through all steps:
sources/ reads it, formats/ turns records into examples, render_chat.py and encoder.py make text and ids of them, and
truncation.py fits them into the length. finalize.py puts the parts together.
"""
