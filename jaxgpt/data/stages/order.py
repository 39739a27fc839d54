"""The stages of a preparation, in their order."""

from jaxgpt.data.stages.duplicates import DUPLICATES
from jaxgpt.data.stages.overlap import FILTER, MERGED, OVERLAP
from jaxgpt.data.stages.read import READ
from jaxgpt.data.stages.shards import TRAINING, VALIDATION
from jaxgpt.data.stages.vocabulary import TOKENIZER

STAGES = (READ, DUPLICATES, TOKENIZER, VALIDATION, FILTER, TRAINING, MERGED, OVERLAP)
