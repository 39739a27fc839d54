"""The stages of `jaxgpt prepare`: units of source text become shards of tokens.

    order.py        all of them, in their order; worker.py is a process that works through them
    read.py         unit -> its documents as bytes, with their hashes
    duplicates.py   equal documents of all units: all but the first are dropped
    checks.py       what was left out, and whether both splits have documents
    vocabulary.py   the tokenizer, trained on documents or taken as it is
    encode.py       documents -> tokens
    shards.py       a unit's validation documents, then its shard of training tokens
    overlap.py      validation documents that share a run of tokens with training are dropped
    finish.py       the dataset folder, of what the stages left

Memory is bounded by the size of a unit: hashes lie on disk, and are sorted and matched part by part.
"""
